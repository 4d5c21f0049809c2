"""Label tensors stay small without changing what they say, and a reshape is trusted only where whole slices hold the channels."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_compress.labels import FIXED, aligned, collapsed, fixed, splits, spread, to_numpy, varies, vector_along


@st.composite
def labels(draw):
    """Labels that follow a few of their dimensions, some stored once and repeated by stride, some written out."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    followed = [draw(st.booleans()) for _ in shape]
    small = [size if follow else 1 for size, follow in zip(shape, followed, strict=True)]
    values = draw(st.lists(st.integers(FIXED, 3), min_size=math.prod(small), max_size=math.prod(small)))
    tensor = torch.tensor(values).view(small).expand(shape)
    return tensor.contiguous() if draw(st.booleans()) else tensor


@given(labels())
def test_collapsing_loses_nothing_and_leaves_no_constant_dimension(tensor):
    small = collapsed(tensor)
    assert torch.equal(small.expand(tensor.shape), tensor)
    for dim in range(tensor.ndim):
        constant = all(torch.equal(part, tensor.select(dim, 0)) for part in tensor.unbind(dim))
        assert (small.shape[dim] == 1) == constant
        assert varies(tensor, dim) != constant
    assert (to_numpy(tensor) == small.numpy()).all()


@given(labels())
def test_a_vector_is_found_exactly_where_only_one_dimension_counts(tensor):
    for dim in range(-tensor.ndim, tensor.ndim):
        found = vector_along(tensor, dim)
        rows = tensor.movedim(dim, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]
        if bool((rows == rows[:, :1]).all()):
            assert found is not None
            assert torch.equal(found, rows[:, 0])
        else:
            assert found is None


def test_a_spread_vector_is_found_again_and_takes_no_room():
    vector = torch.tensor([3, 1, FIXED])
    tensor = spread(vector, (2, 3, 500, 500), 1)
    assert tensor.shape == (2, 3, 500, 500)
    assert tensor.untyped_storage().nbytes() == vector.untyped_storage().nbytes()
    assert torch.equal(vector_along(tensor, 1), vector)
    assert vector_along(tensor, 2) is None
    assert aligned(vector, 3).shape == (1, 1, 3)
    assert fixed((2, 3)).tolist() == [[FIXED] * 3] * 2


@st.composite
def reshapes(draw):
    """A shape, one that holds as many elements, and the dimension that carries channels."""
    factors = draw(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=4))

    def grouped():
        shape = [1] * draw(st.integers(1, 4))
        place = 0
        for factor in factors:
            place = draw(st.integers(place, len(shape) - 1))
            shape[place] *= factor
        return shape

    before, after = grouped(), draw(st.permutations(factors)) if draw(st.booleans()) else grouped()
    return before, list(after), draw(st.integers(0, len(before) - 1))


@given(reshapes())
def test_where_a_reshape_only_merges_a_channel_is_a_set_of_whole_slices(case):
    before, after, dim = case
    followed = spread(torch.arange(before[dim]), before, dim)
    if not splits(before, after, [index == dim and size > 1 for index, size in enumerate(before)]):
        moved = followed.reshape(after)
        along = [d for d in range(len(after)) if vector_along(moved, d) is not None]
        assert along
        # And the network without one channel makes the tensor without these slices, by the same reshape.
        kept = [channel for channel in range(before[dim]) if channel != before[dim] // 2]
        if kept:
            cut = torch.arange(math.prod(before)).view(before).index_select(dim, torch.tensor(kept))
            whole = torch.arange(math.prod(before)).view(after)
            slices = (vector_along(moved, along[0]) != before[dim] // 2).nonzero().flatten()
            assert torch.equal(cut.flatten(), whole.index_select(along[0], slices).flatten())


@pytest.mark.parametrize(
    ("before", "after", "dim", "expected"),
    [
        ((1, 8, 3, 3), (1, 72), 1, True),  # flatten
        ((1, 8, 3, 3), (1, 8, 9), 1, True),  # to tokens
        ((5, 8, 3, 3), (40, 3, 3), 1, True),  # into the batch
        ((1, 8, 12), (1, 8, 3, 4), 1, True),  # positions split, channels not
        ((1, 8), (1, 8, 1, 1), 1, True),
        ((1, 8, 3, 3), (1, 2, 4, 3, 3), 1, False),  # groups
        ((1, 8, 6), (1, 6, 8), 1, False),
        ((4, 8), (8, 4), 1, False),
        ((1, 72), (1, 8, 3, 3), 1, False),  # unflatten
    ],
)
def test_reshapes_of_known_networks(before, after, dim, expected):
    assert bool(splits(before, after, [index == dim for index in range(len(before))])) is not expected
