"""The command line: Lightning's own verbs, and those that only a compression library has."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

_HELP = """\
usage: lit-compress VERB [options]

Make networks smaller inside PyTorch Lightning.

  fit, validate, test, predict   run a config: lit-compress fit --config configs/pfa_digits.yaml
  analyze                        say what a cut would do, and change nothing:
                                 lit-compress analyze --config configs/pfa_digits.yaml --ckpt last.ckpt --out analysis
  shrink                         cut a checkpoint on disk, optimizer state included:
                                 lit-compress shrink --config C.yaml --ckpt in.ckpt --recipe recipe.json --out out.ckpt
  export                         write a checkpoint's network for deployment, and compare it with the original:
                                 lit-compress export --config C.yaml --ckpt last.ckpt --format onnx --verify --out model.onnx
  report                         write one HTML page about a run, from its logs and checkpoints:
                                 lit-compress report --run lit_compress_runs/pfa_digits/version_0
  jpeg                           learn quantisation tables from images, and write JPEG files of a size:
                                 lit-compress jpeg photo.png --bits 1.0 --out photo.jpg
  score                          miss rates of pedestrian detectors, by Caltech's protocol:
                                 lit-compress score --gt annotations --dt ours=results --picture curves.png

Each verb has its own --help. Any value of a config can be overridden: --trainer.max_epochs 5, --data.batch_size 32.
"""
_LIGHTNING_VERBS = ("fit", "validate", "test", "predict")
_OWN_VERBS = ("analyze", "shrink", "export", "report", "jpeg", "score")  # each a module of `lit_compress.commands`


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments without the program's name; ``sys.argv`` if None.

    Raises:
        SystemExit: With status 0 after ``--help``, 2 if the arguments are wrong, and 1 with one line on the standard error if
            the run fails over something that the user can change. Set ``LIT_COMPRESS_TRACEBACK=1`` to see where.
    """
    if args is None:
        args = sys.argv[1:]
        sys.path.insert(0, os.getcwd())  # as for `python -m`: a config may name a module of the user's that lies here
    args = list(args)
    if not args or args[0] in ("-h", "--help"):
        print(_HELP, end="")
        raise SystemExit(0 if args else 2)
    if args[0] == "--version":
        from lit_compress import __version__

        print(__version__)
        return
    if args[0] not in (*_LIGHTNING_VERBS, *_OWN_VERBS):
        verbs = ", ".join((*_LIGHTNING_VERBS, *_OWN_VERBS))
        print(f"lit-compress: unknown verb {args[0]!r}; it is one of {verbs}", file=sys.stderr)
        raise SystemExit(2)
    # Only now: importing torch takes seconds, and --help should not.
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        if args[0] in _OWN_VERBS:
            import_module(f"lit_compress.commands.{args[0]}").main(args[1:])
        else:
            import_module("lit_compress.commands.lightning").lightning_cli(args)
    except (ValueError, MisconfigurationException, OSError, ImportError) as error:
        if os.environ.get("LIT_COMPRESS_TRACEBACK"):
            raise
        print(f"lit-compress: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from error
