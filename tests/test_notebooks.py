"""Notebooks run from the first cell to the last, and the outputs that are stored in them can be shown to anybody."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 500_000  # bytes: they are in everybody's clone for good

# Where a home, a checkout or a temporary folder lies, on any system.
PLACE = re.compile(r"(?<![\w.])/(home|root|tmp|Users|usr|opt|work|mnt|private)/|[A-Z]:\\\\|site-packages|ipykernel_")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(notebook):
    """What stands in outputs to be read, pictures left out."""
    for output in outputs(notebook):
        yield output.get("text", "")
        yield from (str(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 5


@every_notebook
def test_notebooks_run_without_a_word_on_stderr(path, tmp_path, monkeypatch, request):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(path)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=300, record_timing=False, coalesce_streams=True, resources=resources)
    client.execute()
    assert not [output.text for output in outputs(notebook) if output.output_type == "stream" and output.name == "stderr"]
    if request.config.getoption("--update-notebooks"):
        notebook.metadata["language_info"] = {"name": "python"}  # not its version, nor this machine's
        nbformat.write(notebook, path)


@every_notebook
def test_stored_outputs_are_those_of_one_run_in_order(path):
    notebook = read(path)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert pictures, "a notebook shows pictures"


@every_notebook
def test_stored_outputs_hold_no_noise_and_no_place_on_a_machine(path):
    notebook = read(path)
    assert not [output.text for output in outputs(notebook) if output.output_type == "stream" and output.name == "stderr"]
    assert not [text for text in texts(notebook) if PLACE.search(text)]
    assert not [text for text in texts(notebook) if "it/s" in text or "\r" in text], "a progress bar"
    assert "widgets" not in notebook.metadata
    assert not [cell for cell in notebook.cells if "execution" in cell.metadata], "when it ran says nothing"


@every_notebook
def test_notebooks_are_small(path):
    assert path.stat().st_size < LARGEST
    assert 6 <= len(code_cells(read(path))) <= 12


def test_a_place_on_a_machine_is_found():
    for text in ("/home/me/x.py", "in /tmp/abc", "lib/python3.11/site-packages/x.py"):
        assert PLACE.search(text)
    assert not PLACE.search("lit_compress_runs/notebook/version_1/compress and 1/home")
