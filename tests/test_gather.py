"""The pass over the data: what is listened to, in what order data are read, and what a batch is made of."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lit_compress.statistics.gather import batch_size, first_samples, gather_covariances, in_order, to_device
from tests.modules import rng_states, same

NUMBERS = TensorDataset(torch.arange(20.0))


def read(loader):
    return [number for (batch,) in loader for number in batch.tolist()]


def images(count=30, seed=0):
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def test_responses_are_seen_where_they_leave_the_layer():
    """Before the norm and the activation; the spatial max of a convolution, the output of a linear layer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    found = gather_covariances(network, images().split(8), {"0": 4, "4": 3}, network)
    network.eval()
    with torch.no_grad():
        convolved, out = network[0](images()), network(images())
    for name, responses in (("0", convolved.amax((2, 3))), ("4", out)):
        assert int(found[name].count) == 30
        np.testing.assert_allclose(found[name].compute().numpy(), np.cov(responses.double().numpy().T), rtol=1e-5, atol=1e-7)


def test_a_layer_that_runs_twice_is_seen_twice():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    inputs = images().flatten(1)[:, :3]
    found = gather_covariances(nn.Sequential(layer), [inputs], {"0": 3}, lambda batch: layer(layer(batch)))["0"]
    with torch.no_grad():
        both = torch.cat([layer(inputs), layer(layer(inputs))])
    np.testing.assert_allclose(found.compute().numpy(), np.cov(both.double().numpy().T), rtol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_modes_and_random_numbers_are_put_back(fails):
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    network[0].eval()
    before = rng_states()
    inputs = torch.full((4, 3), float("nan")) if fails else torch.ones(4, 3)

    def run(batch):
        assert not network.training
        torch.rand(3), np.random.rand()
        return network(batch)

    if fails:
        with pytest.raises(ValueError, match="Layer '0' cannot be analysed: Responses must be finite"):
            gather_covariances(network, [inputs], {"0": 3}, run)
    else:
        gather_covariances(network, [inputs], {"0": 3}, run)
    assert [module.training for module in network.modules()] == [True, False, True]
    assert not network[0]._forward_hooks
    assert same(before, rng_states())


def test_no_gradient_is_kept():
    network = nn.Sequential(nn.Linear(3, 3))
    outputs = []
    gather_covariances(network, [torch.ones(4, 3)], {"0": 3}, lambda batch: outputs.append(network(batch)))
    assert not outputs[0].requires_grad


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="needs data, but the loader gave no batch"):
        gather_covariances(nn.Linear(2, 2), [], {}, print)


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True}, {"drop_last": True}], ids=str)
def test_a_plain_loader_is_read_in_order_and_whole(options):
    loader = DataLoader(NUMBERS, batch_size=6, **options)
    assert read(in_order(loader)) == list(range(20))
    assert [len(batch) for (batch,) in in_order(loader)] == [6, 6, 6, 2]


def test_max_samples_draws_by_its_seed_and_keeps_the_order():
    loader = DataLoader(NUMBERS, batch_size=6, shuffle=True)
    one, other, another = (read(in_order(loader, max_samples=9, seed=seed)) for seed in (0, 0, 1))
    assert one == other == sorted(set(one))
    assert len(one) == len(another) == 9
    assert one != another
    assert read(in_order(loader, max_samples=20)) == read(in_order(loader, max_samples=99)) == list(range(20))


def test_collation_and_workers_of_the_loader_are_kept():
    loader = DataLoader(NUMBERS, 6, shuffle=True, collate_fn=lambda samples: len(samples), worker_init_fn=print)
    ordered = in_order(loader)
    assert list(ordered) == [6, 6, 6, 2]
    assert ordered.worker_init_fn is print


class Stream(IterableDataset):
    def __iter__(self):
        return iter(NUMBERS)


class Doubling(DataLoader):
    """Changes the batches on their way, as loaders that move them to a device do."""

    def __iter__(self):
        return ([2 * batch] for (batch,) in super().__iter__())


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(DataLoader(NUMBERS, 5, sampler=WeightedRandomSampler([1.0] * 20, 8)), id="weighted"),
        pytest.param(DataLoader(NUMBERS, 5, sampler=RandomSampler(NUMBERS, replacement=True)), id="with replacement"),
        pytest.param(DataLoader(NUMBERS, 5, sampler=RandomSampler(NUMBERS, num_samples=7)), id="a share of the data"),
        pytest.param(DataLoader(NUMBERS, 5, sampler=[3, 1, 2]), id="indices"),
        pytest.param(DataLoader(NUMBERS, batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 5, True)), id="batch sampler"),
        pytest.param(DataLoader(NUMBERS, batch_size=None), id="no batches"),
        pytest.param(DataLoader(Stream(), 5), id="stream"),
        pytest.param(Doubling(NUMBERS, 5), id="a loader of its own kind"),
        pytest.param([1, 2], id="list"),
    ],
)
def test_what_has_an_order_of_its_own_is_left_alone(loader):
    assert in_order(loader) is loader
    assert in_order(loader, max_samples=3) is loader


# ---------------------------------------------------------------- batches

Pair = namedtuple("Pair", "image label")
FOUR, LABELS = torch.zeros(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (FOUR, 4),
        ((FOUR, LABELS), 4),
        ({"label": LABELS, "image": FOUR}, 4),
        (Pair(FOUR, LABELS), 4),
        ([[torch.zeros(3, 8, 8)] * 5, [{"boxes": torch.zeros(2, 4)}] * 5], 5),  # as detectors take them
        ((torch.zeros(()), FOUR), 4),
        (("a name", 3), 1),
    ],
    ids=str,
)
def test_a_batch_has_a_size(batch, size):
    assert batch_size(batch) == size


def test_the_first_samples_keep_the_form_of_the_batch():
    short = first_samples({"image": FOUR, "label": LABELS, "scale": torch.tensor(2.0), "name": "a", "anchors": torch.zeros(9, 4)})
    assert {key: getattr(value, "shape", value) for key, value in short.items()} == {
        "image": (2, 3),
        "label": (2,),
        "scale": (),
        "name": "a",
        "anchors": (9, 4),
    }
    pair = first_samples(Pair(FOUR, LABELS), count=1)
    assert isinstance(pair, Pair)
    assert pair.label.tolist() == [0]
    detector = first_samples(([torch.zeros(3, 8, 8)] * 5, [{"boxes": torch.zeros(2, 4)}] * 5))
    assert [len(part) for part in detector] == [2, 2]
    assert detector[1][0]["boxes"].shape == (2, 4)
    assert first_samples(FOUR[:1]).shape == (1, 3)


def test_every_tensor_of_a_batch_moves():
    moved = to_device([{"image": FOUR}, ("a", LABELS)], torch.device("meta"))
    assert moved[0]["image"].is_meta
    assert moved[1][0] == "a"
    assert moved[1][1].is_meta
