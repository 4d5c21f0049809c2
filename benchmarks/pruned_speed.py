"""Whether a pruned network runs as fast as the same architecture built at its widths."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import VGG
from torchvision.models.vgg import make_layers

from benchmarks.page import Section, main
from benchmarks.timing import CPU, Candidate, interleaved, threads
from lit_compress import analyze, cut
from lit_compress.models import MLP, LeNet300100

BUILT, PRUNED = "built at the widths", "pruned to them"
FULL = "before pruning"


def measure(quick: bool, rounds: int | None, device: torch.device = CPU) -> Section:
    """A network of linear layers and one of convolutions, pruned, and built anew with the widths that pruning left."""
    tables, verdicts = {}, []
    for caption, (*networks, inputs) in _subjects(quick).items():
        full, pruned, built = (network.to(device) for network in networks)
        images = inputs.to(device)
        with threads(1), torch.no_grad():
            compared = interleaved(
                Candidate(BUILT, lambda _: built(images)),  # noqa: B023  # called at once
                [Candidate(PRUNED, lambda _: pruned(images)), Candidate(FULL, lambda _: full(images))],  # noqa: B023
                rounds=rounds or (2 if quick else 30),
            )
        tables[caption] = compared.table()
        verdicts += [f"{caption}: {name}, {compared.beside_spread(name)}" for name in (PRUNED, FULL)]
    return Section(
        question="Does a pruned network run as fast as one built at its widths?",
        target="within the spread of measuring one of them twice.",
        tables=tables,
        verdicts=verdicts,
        settings={"threads": 1},
    )


def _subjects(quick: bool) -> dict[str, tuple[nn.Module, nn.Module, nn.Module, Tensor]]:
    torch.manual_seed(0)
    batch = 8 if quick else 32
    config = [16, "M", 32, "M"] if quick else [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M"]
    vgg, lenet = _vgg(config), LeNet300100().eval()
    images, vectors = torch.randn(batch, 3, 32, 32), torch.randn(8 * batch, 784)
    pruned_vgg, pruned_lenet = _vgg(config), LeNet300100().eval()
    _halve(pruned_vgg, images)
    _halve(pruned_lenet, vectors)
    widths = iter([module.out_channels for module in pruned_vgg.modules() if isinstance(module, nn.Conv2d)])
    built_vgg = _vgg([entry if entry == "M" else next(widths) for entry in config])
    sizes = [module.out_features for module in pruned_lenet.modules() if isinstance(module, nn.Linear)]
    built_lenet = MLP(784, sizes[:-1], 10).eval()
    for pruned, built in ((pruned_vgg, built_vgg), (pruned_lenet, built_lenet)):
        shapes = [[tuple(tensor.shape) for tensor in network.state_dict().values()] for network in (pruned, built)]
        if shapes[0] != shapes[1]:
            raise RuntimeError("The two networks are not of the same sizes, so that their times say nothing.")
    return {
        f"VGG-16 with batch norm, 32 px, batch {batch}": (vgg, pruned_vgg, built_vgg, images),
        f"LeNet-300-100, batch {8 * batch}": (lenet, pruned_lenet, built_lenet, vectors),
    }


def _vgg(config: list[int | str]) -> nn.Module:
    network = VGG(make_layers(config, batch_norm=True), num_classes=10, init_weights=False)
    last = [entry for entry in config if isinstance(entry, int)][-1]
    network.avgpool, network.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(last, 10)
    return network.eval()


def _halve(network: nn.Module, inputs: Tensor) -> None:
    analysis = analyze(network, [torch.randn(520, *inputs.shape[1:])])
    cut(network, analysis.random_recipe(keep_params=0.5, seed=0), inputs[:2])


if __name__ == "__main__":
    main("pruned_speed", measure)
