"""The zoo of docs/supported-networks.md: every network is cut exactly, and the page says what it was made from."""

import copy
import random
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

ROOT = Path(__file__).resolve().parents[1]
# In the tests, the checkout comes last, so that an installed package is the one that is tested.
sys.path.append(str(ROOT))

from benchmarks import page, supported_networks  # noqa: E402
from benchmarks.zoo import QUICK, ZOO  # noqa: E402
from lit_compress import analyze, cut  # noqa: E402
from lit_compress.graph import trace  # noqa: E402
from tests.networks import clone, random_recipe, randomized, relative_error, unsized  # noqa: E402

COUPLINGS = [name for name, specimen in ZOO.items() if specimen.kind == "couplings and conventions"]
OVER_CHANNELS = {"group norm", "layer norm"}
REFUSED = {"weight norm", "spectral norm", "transposed convolution in groups"}  # by name: all their channels stay
PUBLISHED = supported_networks.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", QUICK)
def test_what_is_cut_in_a_network_of_the_zoo_is_exact(name):
    outcome = supported_networks.observed(name, QUICK[name])
    assert outcome.failure == ""
    assert bool(outcome.groups) is (name not in REFUSED)
    assert outcome.error < 1e-9  # float64 leaves 1e-14; a wrong channel gives an error of order 1
    assert outcome.whole  # the output at least, with its reason


@pytest.mark.parametrize("name", [name for name in QUICK if name not in REFUSED])
def test_a_cut_in_the_zoo_is_compensated_or_said_not_to_be(name):
    """On the very inputs that the statistics are from, in float64."""
    specimen, size = ZOO[name], QUICK[name]
    torch.manual_seed(0)
    model, inputs = randomized(specimen.build()).double().eval(), specimen.inputs(size)
    inputs = tree_map(lambda value: value.double() if torch.is_tensor(value) and value.is_floating_point() else value, inputs)
    errors = {}
    for how in (False, "linear"):
        small = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which layers cannot be compensated
            analysis = analyze(
                small, [inputs], method="magnitude", compensate=how, forward_fn=specimen.run, example_inputs=inputs
            )
            cut(small, analysis.recipe(keep_channels=0.6), inputs, forward_fn=specimen.run, inputs=analysis.inputs)
        with torch.no_grad():
            errors[how] = relative_error(clone(specimen.run(small, inputs)), clone(specimen.run(model, inputs)))
    if name in OVER_CHANNELS:
        assert errors["linear"] < 1.3 * errors[False]  # a norm takes back some of it
    elif errors[False] > 0:
        assert errors["linear"] < errors[False]


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ZOO if name not in QUICK])
def test_what_is_cut_in_a_large_network_of_the_zoo_is_exact(name):
    outcome = supported_networks.observed(name, min(ZOO[name].size, 320))
    assert outcome.failure == ""
    assert outcome.groups
    assert outcome.error < 1e-9
    assert outcome.trace < ZOO[name].bound


@pytest.mark.parametrize("name", [name for name in COUPLINGS if name not in REFUSED])
def test_a_cut_of_the_zoo_changes_sizes_and_nothing_else(name):
    draw = random.Random(0)
    specimen = ZOO[name]
    model, inputs = specimen.build(), specimen.inputs(specimen.size)
    for module in model.modules():
        module.training = draw.random() < 0.5
        module.register_forward_hook(lambda *_: None)
        module.register_full_backward_hook(lambda *_: None)
    for parameter in model.parameters():
        parameter.tag = object()
        if draw.random() < 0.7:
            parameter.register_hook(lambda grad: grad)
        else:
            parameter.requires_grad_(False)
    before, sizes = unsized(model), [parameter.shape for parameter in model.parameters()]
    graph = trace(model, lambda: specimen.run(model, inputs))
    assert unsized(model) == before
    cut(model, random_recipe(graph.groups(), seed=0, share=1.0), inputs, forward_fn=specimen.run, graph=graph)
    assert unsized(model) == before
    assert [parameter.shape for parameter in model.parameters()] != sizes


def test_the_page_is_written_with_a_row_for_each_network(tmp_path, capsys, monkeypatch):
    some = {name: QUICK[name] for name in ("SE gate", "weight norm")}
    monkeypatch.setattr(supported_networks, "QUICK", some)
    written = tmp_path / "page.md"
    written.write_text("# Networks\n\nBy hand.\n", encoding="utf-8")
    page.main("supported_networks", supported_networks.measure, ["--quick", "--write", str(written)])
    text = written.read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in text
    assert "By hand." in text
    assert torch.__version__ in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == list(some)
    assert rows[0][1:3] == ["2", "20 of 22"]
    assert rows[1][-1] == "nothing is cut"
    assert "is computed from other tensors" in rows[1][3]


def test_a_network_that_is_wrong_slow_or_refused_is_said_to_be():
    right = supported_networks.Outcome("SE gate", groups=1, error=1e-16)
    wrong = supported_networks.Outcome("chunk-GLU", groups=1, error=1e-3, trace=3.0)
    refused = supported_networks.Outcome("U-Net skips", groups=1, failure="The cut is not exact: so.", memory=2.5)
    said = "\n".join(supported_networks.section([right, wrong, refused]).verdicts)
    assert "exact: NOT met by chunk-GLU, U-Net skips" in said
    assert "time: NOT met by chunk-GLU" in said
    assert "memory: NOT met by U-Net skips" in said
    assert wrong.row().endswith("| **wrong by 1e-03** |")
    assert refused.row().endswith("| **The cut is not exact: so.** |")


def test_every_reason_in_the_tables_is_explained_on_the_page():
    explained = re.findall(
        r"^\| ([^|`]+?) \| [^|]+ \|$", PUBLISHED.partition("says why")[2].partition("## How to read")[0], re.MULTILINE
    )
    phrases = [phrase for said in explained[1:] for phrase in said.removesuffix(" …").split("; ")]
    assert len(phrases) > 15
    lines = [line for cell in re.findall(r"\| (`[^|]+) \|", PUBLISHED) for line in cell.split("<br>")]
    reasons = [why for line in lines if (why := line.partition(": ")[2])]  # without "and 2 reasons more"
    assert len(reasons) > 60
    for why in reasons:
        assert any(phrase in why for phrase in phrases), why


def test_the_published_page_holds_the_whole_zoo_and_met_its_targets():
    for name in ZOO:
        assert re.search(rf"^\| {re.escape(name)} \|", PUBLISHED, flags=re.MULTILINE), name
    assert "NOT met" not in PUBLISHED
    assert "python -m benchmarks.supported_networks`" in PUBLISHED
