"""Makes `python -m lit_compress` the same as `lit-compress`."""

from lit_compress.cli import main

if __name__ == "__main__":
    main()
