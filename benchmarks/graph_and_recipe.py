"""What it takes to find out which channels are tied, and to choose among them, once the statistics are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.page import Section, main
from benchmarks.subjects import random_covariances, resnet50, resnet56, torch_pruning, torch_pruning_version
from benchmarks.timing import Candidate, Comparison, figure, interleaved, threads
from lit_compress import Analysis, count_parameters
from lit_compress.graph import ChannelGraph, trace
from lit_compress.spectra import PFA, group_spectra
from lit_compress.statistics import StreamingCovariance

WHOLE = "graph, groups, spectra, recipe by energy"
GROUPS, PEER_GROUPS = "graph and groups", "Torch-Pruning: graph and groups"
SEARCHED = "graph, groups, spectra, recipe by parameters"
Covariances = Mapping[str, StreamingCovariance]


def measure(quick: bool, rounds: int | None) -> Section:
    """ResNet-56 and ResNet-50, from covariances drawn at random, beside Torch-Pruning's graph."""
    tables, verdicts = {}, []
    for subject in (resnet56, resnet50):
        caption, net, images = subject(quick=quick)
        with threads(1):
            compared = _compared(net, images, rounds or (2 if quick else 10))
        tables[caption] = compared.table()
        for name in (WHOLE, SEARCHED):
            seconds = compared[name].wall.median
            verdicts.append(f"{caption}: {'met' if seconds < 2 else 'NOT met'}, {name} take {figure(seconds)} s")
        ours, theirs = compared[GROUPS].wall.median, compared[PEER_GROUPS]
        if not theirs.missing:
            verdicts.append(f"{caption}: graph and groups take {ours / theirs.wall.median:.2f}× what Torch-Pruning's take")
    return Section(
        question="How long do graph and recipe take?",
        target="under 2 s each for ResNet-56 and ResNet-50, from ready covariances.",
        tables=tables,
        verdicts=verdicts,
        settings={"threads": 1, "batch size": 1, "Torch-Pruning": torch_pruning_version()},
    )


def _compared(net: nn.Module, images: Tensor, rounds: int) -> Comparison:
    graph = trace(net, lambda: net(images))
    covariances = random_covariances(graph)
    analysis = _analysis(net, graph, covariances)
    peer = torch_pruning()
    missing = "" if peer else "not installed"

    def anew() -> Analysis:
        return _analysis(net, trace(net, lambda: net(images)), covariances)

    return interleaved(
        Candidate("one forward", lambda _: _forward(net, images)),
        [
            Candidate("graph", lambda _: trace(net, lambda: net(images))),
            Candidate(GROUPS, lambda _: trace(net, lambda: net(images)).groups()),
            Candidate("Torch-Pruning: graph", lambda _: _peer_graph(peer, net, images), missing=missing),
            Candidate(PEER_GROUPS, lambda _: _peer_groups(peer, net, images), missing=missing),
            Candidate("groups and their spectra", lambda _: group_spectra(graph, covariances), lambda: _forget(covariances)),
            Candidate("recipe by energy", lambda _: analysis.recipe(energy=0.9)),
            Candidate("recipe by parameters", lambda _: analysis.recipe(keep_params=0.5)),
            Candidate(WHOLE, lambda _: anew().recipe(energy=0.9), lambda: _forget(covariances)),
            Candidate(SEARCHED, lambda _: anew().recipe(keep_params=0.5), lambda: _forget(covariances)),
        ],
        rounds=rounds,
    )


def _analysis(net: nn.Module, graph: ChannelGraph, covariances: Covariances) -> Analysis:
    spectra, whole = group_spectra(graph, covariances)
    if len(spectra) < len(graph.groups()):
        raise RuntimeError(f"Groups without a spectrum would be timed as if they cost nothing: {whole}.")
    return Analysis(graph, PFA(), spectra, whole, samples=1, example_batch=1, parameters=count_parameters(net), before=None)


def _forget(covariances: Covariances) -> None:
    """A metric keeps what it computed; each run is to compute it."""
    for metric in covariances.values():
        metric._computed = None


def _forward(net: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        net(images)


def _peer_graph(peer: Any, net: nn.Module, images: Tensor) -> Any:
    return peer.DependencyGraph().build_dependency(net, example_inputs=images)


def _peer_groups(peer: Any, net: nn.Module, images: Tensor) -> list[Any]:
    return list(_peer_graph(peer, net, images).get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))


if __name__ == "__main__":
    main("graph_and_recipe", measure)
