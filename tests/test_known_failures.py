"""What other tools are known to fail at, each as a test of its own: the list of docs/design.md, "What others get wrong"."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import shufflenet_v2_x0_5, swin_t
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import FrozenBatchNorm2d

from lit_compress import Recipe, count_parameters, cut, load_pruned
from lit_compress.callbacks import PFAPruning
from lit_compress.graph import trace
from lit_compress.models import MLP, ResNetCIFAR
from tests.modules import Small, every_epoch, new_trainer, same, small_loaders
from tests.networks import random_recipe, randomized, relative_error


def cut_and_silenced(network, x, seed=0):
    """Outputs of a randomly cut network, and of the uncut one whose removed channels read as zero: weights that read them are."""
    network = network.double().eval()
    graph = trace(network, lambda: network(x))
    recipe = random_recipe(graph.groups(), seed)
    small = copy.deepcopy(network)
    plan = cut(small, recipe, x, graph=graph)
    removed = graph.mark(
        [c for name, kept in plan.recipe.keep.items() for i, c in enumerate(graph.layers[name].classes.tolist()) if i not in kept]
    )
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for use in graph.uses:
            for index, channel in enumerate(graph.tensors.get(use.weight, {}).get(use.in_dim, ())):
                if removed[channel]:
                    parameters[use.weight].select(use.in_dim, index).zero_()
        return count_parameters(small) / count_parameters(network), small(x), network(x)


def frozen_norms():
    network = ResNetCIFAR(8, width=8)
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            owner, _, name = path.rpartition(".")
            setattr(network.get_submodule(owner), name, FrozenBatchNorm2d(module.num_features))
    return network


NETWORKS = {
    "zero-padded skips, which one tool corrupts without a word": (lambda: ResNetCIFAR(20), (2, 3, 16, 16)),
    "sigmoid after a linear layer: a removed unit gives 0.5, not 0": (lambda: MLP(12, (9, 7), 3, activation="sigmoid"), (2, 12)),
    "frozen batch norms": (frozen_norms, (2, 3, 16, 16)),
    "channel shuffle": (lambda: shufflenet_v2_x0_5(num_classes=5), (2, 3, 64, 64)),
    "shifted windows": (lambda: swin_t(num_classes=5), (1, 3, 64, 64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_others_corrupt_or_cannot_cut_are_cut_exactly(name):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    share, found, expected = cut_and_silenced(randomized(build(), 0), torch.randn(shape, dtype=torch.float64))
    assert share < 0.99
    assert relative_error([found], [expected]) < 1e-9


def test_a_whole_detector_is_cut_inside_its_backbone():
    torch.manual_seed(0)
    network = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=96
    ).eval()
    images = [torch.rand(3, 96, 96)]
    graph = trace(network, lambda: network(images))
    names = [group.name for group in graph.groups() if group.name.startswith("backbone.body")]
    assert len(names) > 10
    group = next(group for group in graph.groups() if group.name == names[0])
    keep = tuple(range(len(group.members[names[0]]) // 2))
    before = count_parameters(network)
    cut(network, Recipe(keep={names[0]: keep}), (images,), graph=graph)  # the self-check runs the whole detector
    assert count_parameters(network) < before
    assert set(network(images)[0]) == {"boxes", "labels", "scores"}


def test_frozen_parameters_stay_frozen_and_modes_as_they_are():
    network = MLP(6, (8,), 3).train()
    network.requires_grad_(False)
    next(iter(network.children())).eval()
    modes = [module.training for module in network.modules()]
    cut(network, Recipe(keep={next(iter(trace(network, lambda: network(torch.rand(1, 6))).layers)): (0, 2)}), torch.rand(1, 6))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize("channels", [(0, 16), (-1, 2), (3, 3), (5, 2), ()])
def test_indices_that_do_not_exist_repeat_or_do_not_ascend_are_refused(channels):
    with pytest.raises(ValueError, match=r"net\.0"):
        cut(Small(), Recipe(keep={"net.0": channels}), torch.rand(1, 6), forward_fn=lambda model, x: model.net(x))


def test_what_was_cut_is_not_lost_on_resume_and_the_optimizer_holds_nothing_dead(tmp_path):
    module = Small()
    trainer = new_trainer(tmp_path, PFAPruning(energy=0.8, at_epoch=1), every_epoch(tmp_path), enable_checkpointing=True)
    trainer.fit(module, *small_loaders())
    size = count_parameters(module)
    assert size < count_parameters(Small())
    resumed = Small()
    again = new_trainer(tmp_path / "again", PFAPruning(energy=0.8, at_epoch=1), max_epochs=4)
    again.fit(resumed, *small_loaders(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert count_parameters(resumed) == size
    (optimizer,) = again.optimizers
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in resumed.parameters()}
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in held)


def test_a_pruned_file_loads_and_the_network_is_plain(tmp_path):
    module = Small()
    trainer = new_trainer(tmp_path, PFAPruning(energy=0.8, at_epoch=1), every_epoch(tmp_path), enable_checkpointing=True)
    trainer.fit(module, *small_loaders())
    loaded = load_pruned(Small, tmp_path / "epoch=2.ckpt")
    assert same(dict(loaded.state_dict()), dict(module.state_dict()))
    for part in (*loaded.net.modules(), *module.net.modules()):
        assert type(part) in (nn.Sequential, nn.Linear, nn.ReLU)
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert not any("mask" in name for name in module.state_dict())
