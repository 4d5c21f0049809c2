"""Every benchmark runs end to end on tiny sizes and fills its table; how fast anything was is not looked at."""

import re
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# In the tests, the checkout comes last, so that an installed package is the one that is tested.
sys.path.append(str(ROOT))

from benchmarks import page, subjects  # noqa: E402
from benchmarks.timing import Candidate, Comparison, Quartiles, Span, Timing, interleaved  # noqa: E402
from lit_compress import analyze  # noqa: E402
from lit_compress.graph import trace  # noqa: E402
from lit_compress.spectra import group_spectra  # noqa: E402
from lit_compress.statistics import gather_covariances  # noqa: E402

BENCHMARKS = {
    path.stem: import_module(f"benchmarks.{path.stem}")
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.stem != "supported_networks"  # see test_zoo.py
}
NOT_TIMED_IN_TURNS = {"side_by_side"}  # see test_side_by_side.py
PUBLISHED = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def rows(markdown):
    """The cells of every row of every table, headings and rules left out."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rule = [number for number, line in enumerate(lines) if re.fullmatch(r"[|:-]+", line)]
    assert rule, f"no table in:\n{markdown}"
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for number, line in enumerate(lines)
        if number not in rule and number + 1 not in rule
    ]


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in NOT_TIMED_IN_TURNS])
def test_every_benchmark_fills_its_table(name, tmp_path, capsys):
    written = tmp_path / "page.md"
    written.write_text("# Benchmarks\n", encoding="utf-8")
    threads = torch.get_num_threads()
    page.main(name, BENCHMARKS[name].measure, ["--quick", "--rounds", "1", "--write", str(written)])
    printed = capsys.readouterr().out.strip()
    assert printed in written.read_text(encoding="utf-8")
    assert f"`python -m benchmarks.{name} --quick --rounds 1`" in printed
    assert torch.__version__ in printed
    assert torch.get_num_threads() == threads
    for first, *cells in rows(printed):
        measured = all(re.match(r"-?\d", cell) for cell in cells)
        assert measured or cells[0] == "not installed" or "does not run" in cells[0], (first, cells)
    assert any(first.endswith(", again") for first, *_ in rows(printed)), "the baseline is to be measured twice"


def test_what_takes_a_device_is_measured_on_every_one_that_is_here(monkeypatch, capsys):
    """With the CPU in the place of another device, which no machine of the tests has."""
    monkeypatch.setattr(page, "devices", lambda: {"Another": torch.device("cpu", 0)})
    able = {name for name, module in BENCHMARKS.items() if "device" in signature(module.measure).parameters}
    assert able == {"analysis_pass", "cut_time", "distillation_step", "linear_layers", "pruned_speed"}
    for name in ("analysis_pass", "distillation_step", "linear_layers"):
        page.main(name, BENCHMARKS[name].measure, ["--quick", "--rounds", "1"])
        captions = re.findall(r"^\*\*(.*)\*\*$", capsys.readouterr().out, flags=re.MULTILINE)
        there = [caption.removeprefix("Another: ") for caption in captions if caption.startswith("Another: ")]
        assert there
        assert set(there) <= {caption for caption in captions if not caption.startswith("Another: ")}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_published_with_its_figures(name):
    """On the real sizes, with the question, the target and the command that the benchmark has today."""
    found = re.search(
        rf"<!-- {name}: written by the benchmark -->\n(.*?)\n<!-- {name}: end -->\n\n(.*)", PUBLISHED, flags=re.DOTALL
    )
    assert found, f"`python -m benchmarks.{name} --write` is to be run."
    assert "--quick" not in found[1]
    assert f"`python -m benchmarks.{name}" in found[1]
    assert rows(found[1])
    assert re.match(r"[A-Z]", found[2]), "a sentence of reading is to follow the table"


def test_the_network_of_the_peer_is_the_same_or_is_refused():
    """Otherwise two times would stand side by side that are not of the same work."""
    cut_time = BENCHMARKS["cut_time"]
    peer = pytest.importorskip("torch_pruning")
    _, net, images = subjects.resnet56(quick=True)
    graph = trace(net, lambda: net(images))
    inside = subjects.every_other_channel(graph, tied=False)
    assert inside.keep
    assert cut_time._peer_fails(peer, net, images, inside) == ""
    assert cut_time._peer_fails(peer, net, images, subjects.every_other_channel(graph, tied=True)) != ""


def test_a_peer_that_is_not_installed_leaves_its_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # importing it now fails
    section = BENCHMARKS["graph_and_recipe"].measure(True, 1)
    theirs = [row for table in section.tables.values() for row in rows(table) if row[0].startswith("Torch-Pruning")]
    assert [row[1] for row in theirs] == ["not installed"] * 4
    assert section.settings["Torch-Pruning"] == "not installed"


@pytest.mark.parametrize("subject", [subjects.resnet56, subjects.resnet50])
def test_drawn_statistics_cover_all_that_an_analysis_looks_at(subject):
    """What they leave out would be timed as if it cost nothing."""
    _, net, images = subject(quick=True, batch=200)
    graph = trace(net, lambda: net(images[:1]))
    drawn, _ = group_spectra(graph, subjects.random_covariances(graph))
    found = analyze(net, [images]).spectra
    assert {name: len(spectrum.spectrum) for name, spectrum in drawn.items()} == {
        name: len(spectrum.spectrum) for name, spectrum in found.items()
    }
    assert len(drawn) == len(graph.groups())
    assert any(len(group.members) > 1 for group in graph.groups())


def test_statistics_that_leave_a_group_out_are_refused():
    _, net, images = subjects.resnet56(quick=True)
    graph = trace(net, lambda: net(images))
    covariances = subjects.random_covariances(graph)
    covariances.popitem()
    with pytest.raises(RuntimeError, match="Groups without a spectrum"):
        BENCHMARKS["graph_and_recipe"]._analysis(net, graph, covariances)


def test_keeping_all_responses_gives_what_the_pass_gives():
    """Otherwise two times would stand side by side that are not of the same work."""
    _, net, images = subjects.resnet56(quick=True, batch=20)
    layers, taps = subjects.observations(trace(net, lambda: net(images)))
    assert taps
    kept = BENCHMARKS["analysis_pass"].kept_responses(net, images.split(8), layers, taps)
    gathered = gather_covariances(net, images.split(8), layers, net, taps=taps)
    assert kept.keys() == gathered.keys() == layers.keys()
    for name, metric in gathered.items():
        torch.testing.assert_close(kept[name], metric.compute(), rtol=1e-5, atol=1e-7)


def test_memory_is_that_of_a_process_of_its_own():
    small, large, end = BENCHMARKS["memory"].peaks_in_a_process("plain evaluation pass", (8, 16), 8, True)
    assert 50 < small <= large <= end  # MiB; PyTorch alone takes more


def test_candidates_take_turns_and_the_baseline_stands_at_both_ends():
    ran = []
    candidates = [Candidate(name, lambda prepared: ran.append(prepared), lambda name=name: name) for name in ("b", "c")]
    compared = interleaved(Candidate("a", lambda _: ran.append("a")), candidates, rounds=2, warmup=1)
    assert ran == ["a", "c", "b", "a", "a", "b", "c", "a", "a", "c", "b", "a"]
    assert [len(timing.spans) for timing in (compared.baseline, *compared.others, compared.again)] == [2, 2, 2, 2]


def test_what_is_timed_from_within_counts_instead():
    compared = interleaved(Candidate("a", lambda _: Span(2.0, 1.0)), [Candidate("b", lambda _: Span(3.0, 4.0))], rounds=3)
    assert compared["b"].ratio(compared.baseline) == Quartiles(1.5, 1.5, 1.5)
    assert compared["b"].ratio(compared.baseline, cpu=True).median == 4.0


def test_ratios_are_taken_within_each_round():
    """The machine was ten times slower in the second round; both feel it, and the ratio does not."""
    slow = Timing("a", (Span(1, 1), Span(10, 1), Span(1, 1)))
    other = Timing("b", (Span(2, 1), Span(20, 1), Span(2, 1)))
    assert other.ratio(slow) == Quartiles(2, 2, 2)


def test_the_spread_is_that_of_the_same_thing_measured_twice():
    baseline = Timing("a", tuple(Span(1, 1) for _ in range(5)))
    again = Timing("a, again", tuple(Span(wall, 1) for wall in (0.8, 0.9, 1.0, 1.25, 1.5)))
    inside, outside = Timing("inside", (Span(1.2, 1),) * 5), Timing("outside", (Span(1.3, 1),) * 5)
    compared = Comparison(baseline, again, (inside, outside))
    assert compared.spread() == (0.8, 1.25)  # quartiles 0.9 and 1.25, and both ways round
    assert compared.within_spread("inside")
    assert not compared.within_spread("outside")


def test_a_missing_candidate_is_not_run_and_its_row_says_why():
    compared = interleaved(Candidate("a", lambda _: None), [Candidate("b", lambda _: 1 / 0, missing="not installed")], rounds=1)
    assert "| b | not installed | | | |" in compared.table()


def test_timing_says_what_is_wrong():
    nothing = Candidate("a", lambda _: None)
    with pytest.raises(ValueError, match="`rounds` must be at least 1 but got 0"):
        interleaved(nothing, [], rounds=0)
    with pytest.raises(ValueError, match="a name of its own"):
        interleaved(nothing, [nothing], rounds=1)


def test_a_section_is_written_in_place_of_the_old_one(tmp_path):
    place = tmp_path / "page.md"
    place.write_text("# Title\n", encoding="utf-8")
    page.write(place, "one", "old \\1")
    page.write(place, "two", "second")
    place.write_text(place.read_text(encoding="utf-8") + "\nBy hand.\n", encoding="utf-8")
    page.write(place, "one", "new \\1")
    text = place.read_text(encoding="utf-8")
    assert "old" not in text
    assert re.sub(r"<!--.*-->\n?", "", text).split() == ["#", "Title", "new", "\\1", "second", "By", "hand."]
    with pytest.raises(ValueError, match="There is no page"):
        page.write(tmp_path / "nowhere.md", "one", "text")
