"""What is written for users holds: examples in docstrings, Python in README and docs, links, the headers of configs, the site."""

import doctest
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METHODS = ["pfa", "methods", "compressed_layers", "distillation", "budget", "jpeg", "pedestrians", "roi_autoencoder"]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps")


class Block(NamedTuple):
    """A fenced block of a page, with the line before it."""

    language: str
    before: str
    line: int  # of the first line of code, counted from 1
    code: str


def fenced_blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text.

    A block ends at a fence at least as long as the one that opened it, so that a block may show another one.
    """
    lines = text.splitlines()
    start, fence = None, ""
    for number, line in enumerate(lines):
        if start is None and (opening := re.match(r"(`{3,})(.*)", line)):
            start, fence = number, opening[1]
        elif start is not None and re.fullmatch(rf"`{{{len(fence)},}}\s*", line):
            language = lines[start][len(fence) :].strip()
            before = lines[start - 1].strip() if start else ""
            yield Block(language, before, start + 2, "\n".join(lines[start + 1 : number]) + "\n")
            start = None
    if start is not None:
        raise ValueError(f"The block that opens on line {start + 1} is never closed.")


def python_blocks() -> list[Any]:
    return [
        pytest.param(page, block, id=f"{page.relative_to(ROOT)}:{block.line}")
        for page in PAGES
        if page.exists()
        for block in fenced_blocks(page.read_text(encoding="utf-8"))
        if block.language == "python"
    ]


def class_paths(config: Any) -> Iterator[str]:
    """Every `class_path` in a parsed config, at any depth."""
    if isinstance(config, Mapping):
        if "class_path" in config:
            yield config["class_path"]
        config = list(config.values())
    if isinstance(config, list):
        for entry in config:
            yield from class_paths(entry)


def test_examples_in_docstrings_run(module_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, attempted = doctest.testmod(import_module(module_name))
    assert failed == 0, f"{failed} of {attempted} lines of example in {module_name} fail; see the captured output."


@pytest.mark.parametrize(("page", "block"), python_blocks())
def test_python_in_pages_runs(page, block, tmp_path, monkeypatch):
    if block.before.startswith("<!-- not run"):
        reason = re.fullmatch(r"<!-- not run: (\S.*) -->", block.before)
        assert reason, f"{page.name}:{block.line - 2} must read `<!-- not run: reason -->` but reads {block.before!r}."
        compile(block.code, page.name, "exec")
        pytest.skip(reason[1])
    # Empty lines in front give a traceback the line numbers of the page; a real file lets `inspect` find the source of a class.
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n" * (block.line - 1) + block.code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_mark_python_as_python(page):
    """A block under another name of Python would not be run by the test above."""
    languages = {block.language for block in fenced_blocks(page.read_text(encoding="utf-8"))}
    assert not [name for name in languages - {"python"} if name.lower().startswith(("py", "{.py"))]


def prose(page: Path) -> str:
    """The Markdown of a page or a notebook, without what stands in blocks of code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for block in fenced_blocks(text):
        text = text.replace(block.code, "\n")
    return text


def anchors(page: Path) -> set[str]:
    """What GitHub, and the site likewise, calls the headings of a page."""
    headings = re.findall(r"^#+ (.+?)\s*$", prose(page), flags=re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {f"{slug}-{slugs[:place].count(slug)}" if slug in slugs[:place] else slug for place, slug in enumerate(slugs)}


def links(page: Path) -> list[str]:
    """Targets of links and images inside of the repository."""
    targets = re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "``", prose(page)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


LINKING = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *NOTEBOOKS]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_of_pages_are_there(page):
    lost = []
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost, f"{page.name} points at {lost}"


def test_links_and_headings_are_found():
    """A reader that finds none would let every page pass."""
    assert {"pfa.md", "images/pfa_spectra.png", "#target-latency"} - set(links(ROOT / "docs" / "pfa.md")) == {"pfa.md"}
    assert "the-papers-experiments" in anchors(ROOT / "docs" / "pfa.md")
    assert "pib-the-parametric-information-bottleneck" in anchors(ROOT / "docs" / "methods.md")


def test_every_picture_is_shown_somewhere():
    shown = {(page.parent / link).resolve() for page in LINKING for link in links(page)}
    pictures = [path for path in (ROOT / "docs" / "images").iterdir() if path.suffix != ".json"]
    assert not [path.name for path in pictures if path.resolve() not in shown]


@pytest.mark.parametrize("method", METHODS)
def test_pages_of_methods_have_one_form(method):
    """The idea with a picture, when to use it and when not, an example, what it was measured to do, where it is from."""
    page = ROOT / "docs" / f"{method}.md"
    text = page.read_text(encoding="utf-8")
    assert "](images/" in text
    assert re.search(r"\*\*[Uu]se \w+( \w+)?\*\*", text)
    assert "**Do not use" in text
    assert any(block.language == "python" for block in fenced_blocks(text))
    _, found, measured = text.partition("# Measured\n")
    assert found
    assert re.search(r"\((results|benchmarks)\.md#", measured)
    assert re.search(r"^Sources?: ", measured, flags=re.MULTILINE)


def test_the_site_has_every_page_and_every_public_room():
    contents = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^[\w/-]+$", contents, flags=re.MULTILINE))
    assert listed == {page.stem for page in PAGES[1:] if page.stem != "index"} | {f"notebooks/{path.stem}" for path in NOTEBOOKS}
    rooms = {line.partition(":")[0] for line in (ROOT / "tests" / "public_surface.txt").read_text(encoding="utf-8").split()}
    reference = set(
        re.findall(r"^ +(lit_compress[\w.]*)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    assert rooms - {"lit_compress.selection"} <= reference


def test_the_site_is_built_without_a_warning(tmp_path):
    options = ("-W", "--keep-going", "-q", "-d", tmp_path / "cache")
    command = [sys.executable, "-m", "sphinx", *options, ROOT / "docs", tmp_path / "site"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PFAPruning" in (tmp_path / "site" / "api" / "lit_compress.callbacks.html").read_text(encoding="utf-8")
    front = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "What a cut does" in front
    assert "Try it" in front


def test_readme_shows_python():
    assert any(block.language == "python" for block in fenced_blocks((ROOT / "README.md").read_text(encoding="utf-8")))


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_configs_say_purpose_command_and_needs(config):
    text = config.read_text(encoding="utf-8")
    header = re.match(r"(?:#.*\n)*", text)[0].splitlines()
    where = config.relative_to(ROOT)
    assert len(header) >= 3, f"{where} must open with comment lines: purpose, command, needs."
    assert re.match(r"# \S.*\.$", header[0]), f"The first line of {where} must be its purpose, a sentence, but is {header[0]!r}."
    command = rf"#\s+lit-compress \w+ (.* )?--config {re.escape(str(where))}( .*)?"
    assert any(re.fullmatch(command, line) for line in header), f"No header line of {where} is `lit-compress … --config {where}`."
    assert any(re.match(r"# Needs: \S", line) for line in header), f"No header line of {where} begins with `# Needs: `."
    assert isinstance(yaml.safe_load(text), dict), f"{where} holds no settings."


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_configs_write_full_class_paths(config):
    """Short names depend on what happens to be imported, and cannot be searched for."""
    assert not [path for path in class_paths(yaml.safe_load(config.read_text(encoding="utf-8"))) if "." not in path]


def test_fenced_blocks_are_found():
    """A reader that finds nothing would let every page pass."""
    first = "# Title\n<!-- not run: why -->\n```python\na = 1\n\nb = 2\n```\n"
    second = "\n````text\n```python\ninner\n```\n````\n"
    third = "```bash\nls\n```\n"
    assert list(fenced_blocks(first + second + third)) == [
        Block("python", "<!-- not run: why -->", 4, "a = 1\n\nb = 2\n"),
        Block("text", "", 10, "```python\ninner\n```\n"),
        Block("bash", "````", 15, "ls\n"),
    ]
    with pytest.raises(ValueError, match="opens on line 2 is never closed"):
        list(fenced_blocks("\n```python\na\n"))
