"""What is written for users runs: examples in docstrings, Python in README and docs, the headers of configs."""

import doctest
import re
import runpy
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


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
