"""The table of tools side by side: what a tool took is read off the weights, and right, wrong and broken are told apart."""

import copy
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
# In the tests, the checkout comes last, so that an installed package is the one that is tested.
sys.path.append(str(ROOT))

from benchmarks import page, peers, side_by_side  # noqa: E402
from benchmarks.side_by_side import Outcome, compared, kept  # noqa: E402
from benchmarks.zoo import ZOO, Specimen, image  # noqa: E402
from tests.networks import Net, conv, randomized  # noqa: E402

IMAGES = image(6, 2)


def specimen(**options):
    return Specimen("couplings and conventions", build, lambda size: IMAGES, 6, **options)


def build():
    """Two branches that are added, which end in one of three kinds of layers that read."""
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.end(m.up((m.a(x) + m.b(x)).relu())),
        a=conv(3, 6), b=conv(3, 6), up=nn.ConvTranspose2d(6, 4, 2), end=conv(4, 2),
    )  # fmt: skip
    return randomized(net).eval()


def sliced(net, **kept):
    """A copy with slices in place of weights, given as ``a_weight=(output channels, input channels)`` or ``a_bias=channels``."""
    net = copy.deepcopy(net)
    for name, indices in kept.items():
        layer, _, tensor = name.rpartition("_")
        value = getattr(net.get_submodule(layer), tensor).data
        for dim, chosen in enumerate(indices if tensor == "weight" else (indices,)):
            value = value if chosen is None else value[(slice(None),) * dim + (list(chosen),)]
        setattr(net.get_submodule(layer), tensor, nn.Parameter(value.clone()))
    return net


RIGHT = {"a_weight": ((0, 3), None), "a_bias": (0, 3), "b_weight": ((0, 3), None), "b_bias": (0, 3), "up_weight": ((0, 3),)}


@pytest.mark.parametrize(
    ("pruned", "verdict", "said"),
    [
        ({}, "exact", ""),
        (RIGHT, "exact", ""),
        (RIGHT | {"b_weight": ((0, 4), None)}, "wrong", "differs by"),  # another channel than that of the skip
        (RIGHT | {"up_weight": ((0, 4),)}, "wrong", "differs by"),  # another than is read
        (RIGHT | {"up_weight": ((3, 0),)}, "wrong", "differs by"),  # in another order
        (RIGHT | {"b_bias": (0, 4)}, "wrong", "differs by"),
        (RIGHT | {"up_weight": ((0, 1, 3),)}, "crashed", "the network left does not run: RuntimeError: "),
        ({"end_weight": ((1,), None), "end_bias": (1,)}, "wrong", "shape (2, 1, 7, 7) instead of (2, 2, 7, 7)"),
    ],
    ids=["whole", "right", "skip", "reader", "order", "bias", "does not run", "output"],
)
def test_a_network_cut_by_hand_is_judged(pruned, verdict, said):
    net = build()
    found, text = compared(net, sliced(net, **pruned), specimen(), IMAGES)
    assert found == verdict
    assert text.startswith(said)
    assert bool(text) is bool(said)


def test_weights_that_are_others_than_before_are_wrong():
    net = build()
    other = sliced(net, **RIGHT)
    other.up.weight.data *= 2
    assert compared(net, other, specimen(), IMAGES) == ("wrong", "the weights of 'up' are others than before")
    del other.up
    assert compared(net, other, specimen(), IMAGES) == ("wrong", "the weights of 'up' are others than before")


def test_what_is_right_in_evaluation_may_be_broken_in_training():
    training = specimen(trains=True)
    net = randomized(ZOO["a head that only training runs"].build()).eval()
    pruned = sliced(
        net, stem_weight=((0, 1), None), stem_bias=(0, 1), norm_weight=((0, 1),), norm_bias=(0, 1), head_weight=(None, (0, 1))
    )
    pruned.norm.running_mean, pruned.norm.running_var = pruned.norm.running_mean[:2], pruned.norm.running_var[:2]
    assert compared(net, pruned, specimen(), IMAGES) == ("exact", "")
    verdict, said = compared(net, pruned.float(), training, IMAGES)
    assert verdict == "crashed"
    assert said.startswith("the network left does not run in training mode")


@pytest.mark.parametrize("values", [10**6, 1500])
def test_indices_are_told_by_values_also_where_these_repeat(values):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(values, (40, 30, 3), generator=generator).float()
    rows, columns = torch.randperm(40, generator=generator)[:13], torch.randperm(30, generator=generator)[:20].sort().values
    found = kept(whole, whole[rows][:, columns])
    assert [indices.tolist() for indices in found] == [rows.tolist(), columns.tolist(), [0, 1, 2]]
    with pytest.raises(ValueError, match=r"shape \(13, 20, 3\) holds other values"):
        kept(whole, whole[rows][:, columns] + 0.5)
    with pytest.raises(ValueError, match=r"\(3, 20\) is no part of one of shape \(40, 30, 3\)"):
        kept(whole, whole[0, columns].T)


def test_the_layers_to_leave_alone_are_those_that_give_the_outputs():
    for name, expected in {
        "resnet18": {"fc"},
        "squeezenet1_1": {"classifier.1"},
        "vit_b_16": {"heads.head"},
        "heads and outputs": {"boxes", "scores"},
        "dict batch, as Hugging Face's": {"head"},
        "three dimensions": {"3"},
    }.items():
        model, size = ZOO[name].build().eval(), ZOO[name].size
        paths = {module: path for path, module in model.named_modules()}
        assert {paths[layer] for layer in peers.output_layers(ZOO[name], model, ZOO[name].inputs(size))} == expected


def hangs(sending):
    time.sleep(60)


def hangs_when_judged(sending):
    sending.send(0.5)
    time.sleep(60)


def dies(sending):
    os._exit(3)


def answers(sending):
    sending.send(0.5)
    sending.send(Outcome("exact", off=0.25, seconds=0.5))


def test_a_process_that_hangs_or_dies_is_a_row(monkeypatch):
    monkeypatch.setattr(side_by_side, "SECONDS", {"to cut": 60, "to judge": 60})
    assert side_by_side.in_a_process(answers).cell() == "exact, 25 % off, 0.5 s"
    assert side_by_side.in_a_process(dies).cell() == "**crashed**: its process died with status 3"
    monkeypatch.setattr(side_by_side, "SECONDS", {"to cut": 10, "to judge": 0.1})
    assert side_by_side.in_a_process(hangs_when_judged).cell() == "**crashed**: more than 0.1 s to judge, 0.5 s"
    monkeypatch.setattr(side_by_side, "SECONDS", {"to cut": 0.1, "to judge": 0.1})
    assert side_by_side.in_a_process(hangs).cell() == "**crashed**: more than 0.1 s to cut"


def test_what_a_tool_raises_on_purpose_is_a_refusal_and_what_it_runs_into_is_a_crash(monkeypatch):
    from lit_compress import Recipe, cut

    def refuses(specimen, model, inputs, leave):
        cut(model, Recipe(keep={"nowhere": (0,)}), inputs)

    def crashes(specimen, model, inputs, leave):
        model(inputs[:, :2])

    for prune, verdict, said in (
        (refuses, "refused", "ValueError: The recipe names 'nowhere'"),
        (crashes, "crashed", "RuntimeError: "),
    ):
        monkeypatch.setitem(side_by_side.TOOLS, "ours", peers.Tool(prune, ("lit_compress",)))
        outcome = side_by_side.judged("ours", specimen())
        assert outcome.verdict == verdict
        assert outcome.said.startswith(said)


def test_ours_is_cut_by_half_and_right():
    outcome = side_by_side.judged("ours", ZOO["U-Net skips"])
    assert outcome.verdict == "exact"
    assert 0.5 < outcome.off < 0.8
    assert side_by_side.judged("ours", ZOO["weight norm"]).verdict == "nothing cut"


@pytest.mark.parametrize("tool", ["Torch-Pruning", "fasterai"])
def test_a_peer_runs_as_its_documentation_says(tool):
    if peers.TOOLS[tool].missing:
        pytest.skip(f"{tool} is not installed")
    assert side_by_side.in_a_process(side_by_side._tried, tool, "SE gate").verdict == "exact"


def test_wins_and_losses_are_said():
    exact, more = Outcome("exact", off=0.5, seconds=1.0), Outcome("exact", off=0.6, seconds=0.5)
    wrong, nothing = Outcome("wrong", "differs by 1e-01", 0.5, 1.0), Outcome("nothing cut", seconds=1.0)
    said = side_by_side.section(
        {
            "SE gate": {"ours": exact, "Torch-Pruning": more, "fasterai": wrong},
            "chunk-GLU": {"ours": exact, "Torch-Pruning": exact, "fasterai": exact},
            "weight norm": {"ours": nothing, "Torch-Pruning": exact, "fasterai": nothing},
            "resnet18": {"ours": wrong, "Torch-Pruning": wrong, "fasterai": wrong},
        }
    )
    assert said.verdicts == [
        "ours is never wrong and never crashes: NOT met by 1 (resnet18)",
        "Torch-Pruning: of 2 networks that both cut exactly, it takes less time on 1 (ours takes 1.5 times as long in the "
        "median), and more parameters on 1 (SE gate); it alone is exact on 1 (weight norm)",
        "fasterai: of 1 networks that both cut exactly, it takes less time on 0 (ours takes 1 times as long in the median), and "
        "more parameters on none; it alone is exact on none",
    ]
    assert said.tables["Networks"].splitlines()[2] == "| ours | 2 | 1 | 1 | 0 | 0 | 1 |"
    assert (
        "| SE gate | exact, 50 % off, 1 s | exact, 60 % off, 0.5 s | **wrong**: differs by 1e-01, 50 % off, 1 s |"
        in (said.tables["Couplings and conventions"])
    )


def test_the_section_is_written_with_a_row_for_each_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(side_by_side.TOOLS, "fasterai", peers.Tool(lambda *_: None, ("a_package_that_nobody_has",)))
    monkeypatch.setattr(side_by_side, "QUICK", ("SE gate",))
    written = tmp_path / "page.md"
    written.write_text("# Benchmarks\n", encoding="utf-8")
    page.main("side_by_side", side_by_side.measure, ["--quick", "--write", str(written)])
    text = written.read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| SE gate |"))
    assert row.startswith("| SE gate | exact, ")
    assert row.endswith("| **not installed** |")
    assert "fasterai not installed" in text
