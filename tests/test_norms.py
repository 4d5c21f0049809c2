"""Running statistics taken anew are those of the data under the weights as they are."""

import copy

import pytest
import torch
from torch import nn

from lit_compress import ranks
from lit_compress.norms import reestimate_norms
from tests.modules import rng_states, same
from tests.test_ddp import pools, processes  # noqa: F401  # fixtures


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    )


IMAGES = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1


def by_hand(net, batches):
    """Averages over batches of what enters each norm, while the norms before it go by their batch."""
    first = [net[0](batch) for batch in batches]
    normed = [nn.functional.batch_norm(x, None, None, net[1].weight, net[1].bias, training=True) for x in first]
    second = [net[4](x.relu()) for x in normed]
    return [
        (torch.stack([x.mean((0, 2, 3)) for x in xs]).mean(0), torch.stack([x.var((0, 2, 3)) for x in xs]).mean(0))
        for xs in (first, second)
    ]


def test_statistics_are_averages_over_batches_and_nothing_else_changes():
    net = network().train()
    net[2].eval()
    with torch.no_grad():
        net[1].running_mean.fill_(100)
    before, states = {name: tensor.clone() for name, tensor in net.named_parameters()}, rng_states()
    batches = [*IMAGES.split(20), IMAGES[:1]]
    assert reestimate_norms(net, batches, net) == 2
    assert same(rng_states(), states)  # dropout was off
    with torch.no_grad():
        for norm, (mean, var) in zip((net[1], net[5]), by_hand(net, batches[:3]), strict=True):
            torch.testing.assert_close(norm.running_mean, mean)
            torch.testing.assert_close(norm.running_var, var)
    assert [module.training for module in net] == [True, True, False, True, True, True]
    assert (net[1].momentum, net[5].momentum) == (0.3, 0.1)
    assert same(dict(net.named_parameters()), before)


def share_of(rank_batches):
    net = network()
    reestimate_norms(net, rank_batches[ranks.rank()], net)
    return dict(net.state_dict())


def test_two_processes_average_what_they_saw(processes):  # noqa: F811
    parts = [list(IMAGES[:40].split(20)), [IMAGES[40:]]]
    alone = network()
    reestimate_norms(alone, IMAGES.split(20), alone)
    for found in processes(2)(share_of, parts):
        for name in ("1.running_mean", "1.running_var", "5.running_mean", "5.running_var"):
            torch.testing.assert_close(found[name], alone.state_dict()[name], msg=name)


@pytest.mark.parametrize("batches", [[], [IMAGES[:1]]])
def test_without_data_everything_stays_and_a_network_without_norms_is_none_of_its_business(batches):
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="two samples or more"):
        reestimate_norms(net, batches, net)
    assert same(dict(net.state_dict()), dict(before))
    assert reestimate_norms(nn.Linear(2, 2), [], net) == 0


def test_a_failing_run_puts_everything_back():
    net = network()
    before = copy.deepcopy(net.state_dict())

    def run(batch):
        net(batch)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        reestimate_norms(net, IMAGES.split(20), run)
    assert same(dict(net.state_dict()), dict(before))
    assert all(module.training for module in net.modules())
