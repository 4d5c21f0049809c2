"""What a cut takes, and how much of it is the self-check."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.page import Section, main
from benchmarks.subjects import every_other_channel, resnet50, resnet56, torch_pruning, torch_pruning_version
from benchmarks.timing import CPU, Candidate, Comparison, figure, interleaved, threads
from lit_compress import Recipe, count_parameters, cut
from lit_compress.graph import trace

CHECKED, UNCHECKED = "cut", "cut(verify=False)"
PEER = "Torch-Pruning: graph and prune"


def measure(quick: bool, rounds: int | None, device: torch.device = CPU) -> Section:
    """Half of the channels of ResNet-56 and ResNet-50, beside Torch-Pruning cutting the very same."""
    tables, verdicts = {}, []
    # With its zero-padded shortcuts cut by Torch-Pruning, ResNet-56 does not run; the layers inside its blocks both can cut.
    for subject, tied in ((resnet56, False), (resnet56, True), (resnet50, True)):
        name, net, images = subject(quick=quick, device=device)
        caption = f"{name}, {'all layers' if tied else 'the layers inside the blocks'}"
        with threads(1):
            compared = _compared(net, images, tied, rounds or (2 if quick else 10))
        tables[caption] = compared.table()
        checked, unchecked = (compared[name].wall.median for name in (CHECKED, UNCHECKED))
        verdict = f"{caption}: {figure(checked)} s in all, {figure(unchecked)} s without the self-check"
        theirs = compared[PEER]
        verdicts.append(
            verdict if theirs.missing else f"{verdict}; Torch-Pruning, which checks nothing, {figure(theirs.wall.median)} s"
        )
    return Section(
        question="How long does a cut take, and its self-check?",
        target="none set; a cut happens a few times in a training.",
        tables=tables,
        verdicts=verdicts,
        settings={"threads": 1, "batch size": 1, "Torch-Pruning": torch_pruning_version()},
    )


def _compared(net: nn.Module, images: Tensor, tied: bool, rounds: int) -> Comparison:
    graph = trace(net, lambda: net(images))
    recipe = every_other_channel(graph, tied=tied)
    peer = torch_pruning()

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(images)

    def fresh() -> nn.Module:
        return copy.deepcopy(net)

    return interleaved(
        Candidate("one forward", forward, lambda: net),
        [
            Candidate("cut(graph=graph, verify=False)", lambda m: cut(m, recipe, images, graph=graph, verify=False), fresh),
            Candidate("cut(graph=graph)", lambda m: cut(m, recipe, images, graph=graph), fresh),
            Candidate(UNCHECKED, lambda m: cut(m, recipe, images, verify=False), fresh),
            Candidate(CHECKED, lambda m: cut(m, recipe, images), fresh),
            Candidate(PEER, lambda m: peer_cut(peer, m, images, recipe), fresh, _peer_fails(peer, net, images, recipe)),
        ],
        rounds=rounds,
    )


def peer_cut(peer: Any, net: nn.Module, images: Tensor, recipe: Recipe) -> None:
    """The recipe, carried out by Torch-Pruning."""
    graph = peer.DependencyGraph().build_dependency(net, example_inputs=images)
    modules = dict(net.named_modules())
    for name, channels in recipe.keep.items():
        removed = sorted(set(range(recipe.original.get(name, modules[name].weight.shape[0]))) - set(channels))
        graph.get_pruning_group(modules[name], peer.prune_conv_out_channels, removed).prune()


def _peer_fails(peer: Any, net: nn.Module, images: Tensor, recipe: Recipe) -> str:
    """Why the peer's time is none, or an empty string: it must have made the network that ours makes."""
    if peer is None:
        return "not installed"
    ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
    cut(ours, recipe, images)
    try:
        peer_cut(peer, theirs, images, recipe)
        with torch.no_grad():
            error = float((ours(images) - theirs(images)).abs().max())
    except Exception as failure:  # whatever it is, the row says so
        return f"the cut network does not run: {failure}"
    if error > 1e-3 or count_parameters(ours) != count_parameters(theirs):
        return f"another network: {count_parameters(theirs)} parameters instead of {count_parameters(ours)}"
    return ""


if __name__ == "__main__":
    main("cut_time", measure)
