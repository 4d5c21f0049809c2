"""StreamingCovariance against numpy and torch on the concatenated stream, and over two real processes."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.statistics import StreamingCovariance
from lit_compress.statistics.covariance import spatial_max


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def streamed(batches, channels=5):
    metric = StreamingCovariance(channels=channels)
    for batch in batches:
        metric.update(batch)
    return metric


def states(metric):
    return {name: state.clone() for name, state in metric.metric_state.items()}


def assert_same_states(metric, expected):
    assert set(expected) == {"count", "mean", "scatter"}
    for name, state in metric.metric_state.items():
        assert torch.equal(state, expected[name]), name


@pytest.mark.parametrize("split", [(64,), (1, 63), (20, 20, 24), (1,) * 64], ids=["whole", "1+63", "20+20+24", "ones"])
@pytest.mark.parametrize("shape", [(64, 5), (64, 5, 3), (64, 5, 3, 2), (64, 5, 2, 3, 2)], ids=str)
def test_matches_torch_cov(shape, split):
    responses = normal(*shape) * 3 + 100
    metric = streamed(responses.split(split))
    expected = torch.cov(responses.reshape(64, 5, -1).max(2).values.T)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-12, atol=1e-12)
    assert int(metric.count) == 64


@given(splits=st.lists(st.integers(0, 60), max_size=8), seed=st.integers(0, 2**32 - 1))
@example(splits=[0, 0, 1, 60], seed=0)  # first and last batches without a sample
@settings(max_examples=30)
def test_any_split_into_batches_gives_the_same(splits, seed):
    responses = (normal(60, 5, 2, 2, seed=seed) * torch.logspace(-3, 3, 5).view(5, 1, 1)).float() + 7
    metric = streamed(responses.tensor_split(sorted(splits)))
    expected = np.cov(responses.double().amax((2, 3)).numpy(), rowvar=False)
    deviations = np.sqrt(np.diag(expected))
    # In units of the deviations: rounding of one channel must not hide behind the size of another.
    scale = np.outer(deviations, deviations)
    np.testing.assert_allclose(metric.compute().numpy() / scale, expected / scale, atol=1e-10)


def test_a_mean_of_1e4_and_a_spread_of_1e_2_keep_the_spectrum():
    # float32 resolves 1e4 to 1e-3: coarse, but what is measured is these very values.
    responses = (1e4 + 1e-2 * normal(2000, 6) @ normal(6, 6, seed=1)).float()
    stream = responses.double().numpy()
    expected = np.linalg.eigvalsh(np.cov(stream, rowvar=False))
    measured = np.linalg.eigvalsh(streamed(responses.split(128), channels=6).compute().numpy())
    np.testing.assert_allclose(measured, expected, rtol=1e-9)
    # The plain sums that this is not, also in float64, do not pass.
    sums = (stream.T @ stream - 2000 * np.outer(stream.mean(0), stream.mean(0))) / 1999
    assert np.abs(np.linalg.eigvalsh(sums) / expected - 1).max() > 1e-6


def test_means_that_drift_between_batches_are_merged():
    batches = [normal(30, 5, seed=seed) + 1000 * seed for seed in range(6)]
    expected = np.cov(torch.cat(batches).numpy(), rowvar=False)
    np.testing.assert_allclose(streamed(batches).compute().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("shape", [(9, 5, 4, 6), (9, 5, 1, 1), (9, 1, 3, 2), (1, 5, 2, 2)], ids=str)
def test_the_spatial_max_is_numpys_for_every_dtype_and_layout(dtype, layout, shape):
    responses = normal(*shape, dtype=torch.float32).sub(3).to(dtype)
    laid_out = {
        "contiguous": lambda x: x.contiguous(),
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda x: torch.cat([x, x + 9], dim=3)[..., : shape[3]],
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout](responses)
    maxima = spatial_max(laid_out)
    assert maxima.dtype == dtype
    np.testing.assert_array_equal(maxima.double().numpy(), responses.double().numpy().max((2, 3)))
    metric = streamed([laid_out, laid_out + 1], channels=shape[1])
    rows = torch.cat([responses, responses + 1]).double().amax((2, 3)).numpy()
    np.testing.assert_allclose(metric.compute().numpy(), np.cov(rows, rowvar=False).reshape(shape[1], shape[1]), atol=1e-12)


def test_one_channel_gives_a_matrix():
    metric = streamed([torch.tensor([[1.0], [3.0]])], channels=1)
    assert metric.compute().tolist() == [[2.0]]
    assert metric.compute().shape == (1, 1)  # from the cache
    assert pickle.loads(pickle.dumps(metric)).compute().shape == (1, 1)


@pytest.mark.parametrize("value", [0.1, 1e4 / 3, -1e-7])
def test_a_channel_that_never_changes_has_no_variance_at_all(value):
    responses = normal(50, 5)
    responses[:, [1, 3]] = value
    covariance = streamed(responses.split([7, 1, 30, 12])).compute()
    for channel in (1, 3):
        assert covariance[channel].count_nonzero() == 0
        assert covariance[:, channel].count_nonzero() == 0
    assert (covariance.diagonal()[[0, 2, 4]] > 0.1).all()


def test_a_batch_without_samples_changes_nothing():
    metric = streamed([normal(4, 5)])
    before = states(metric)
    for empty in (torch.zeros(0, 5), torch.zeros(0, 5, 3, 2), torch.zeros(0, 5, 3, 2).to(memory_format=torch.channels_last)):
        metric.update(empty)
    assert_same_states(metric, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("first", [True, False], ids=["first-batch", "later-batch"])
@pytest.mark.parametrize("row", [0, 2])
def test_nan_and_infinity_are_refused_and_leave_the_states_as_they_were(bad, first, row):
    metric = streamed([] if first else [normal(4, 5)])
    before = states(metric)
    responses = normal(4, 5, seed=1)
    responses[row, [1, 4]] = bad
    with pytest.raises(ValueError, match=r"must be finite but channels \[1, 4\] hold NaN or infinity"):
        metric.update(responses)
    assert_same_states(metric, before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_nan_in_a_map_is_found(dtype, memory_format):
    responses = normal(4, 5, 3, 3).to(dtype).contiguous(memory_format=memory_format)
    responses[2, 3, 0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"channels \[3\] hold NaN"):
        StreamingCovariance(channels=5).update(responses)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="`channels` must be at least 1 but got 0"):
        StreamingCovariance(channels=0)
    metric = StreamingCovariance(channels=3)
    with pytest.raises(ValueError, match=r"3 channels but got shape \(2, 4\)"):
        metric.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"3 channels but got shape \(3,\)"):
        metric.update(torch.zeros(3))
    with pytest.raises(ValueError, match=r"floating point dtype but got torch.int64"):
        metric.update(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"none empty, but got shape \(2, 3, 0, 4\)"):
        metric.update(torch.zeros(2, 3, 0, 4))
    with pytest.raises(ValueError, match=r"none empty, but got shape \(3,\)"):
        spatial_max(torch.zeros(3))
    metric.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 samples but has 1"):
        metric.compute()
    with pytest.raises(ValueError, match="covariance of 3 channels but got one of 4"):
        metric.merge_state(StreamingCovariance(channels=4))
    with pytest.raises(ValueError, match="StreamingCovariance or its `metric_state` but got Tensor"):
        metric.merge_state(torch.zeros(3))
    with pytest.raises(ValueError, match="StreamingCovariance or its `metric_state` but got dict"):
        metric.merge_state({"mean": torch.zeros(3)})


@pytest.mark.parametrize("sizes", [(30, 34), (64, 0), (0, 64), (1, 63)], ids=str)
def test_two_metrics_merge_into_one(sizes):
    responses = normal(64, 5) + torch.linspace(0, 50, 64, dtype=torch.float64)[:, None]
    one, other = (streamed([part]) for part in responses.split(sizes))
    if sizes[0] > 1:
        one.compute()  # a result from before the merge must not come back
    before = states(other)
    one.merge_state(other)
    torch.testing.assert_close(one.compute(), torch.cov(responses.T), rtol=1e-12, atol=1e-12)
    assert int(one.count) == 64
    assert_same_states(other, before)
    by_state = streamed([responses.split(sizes)[0]])
    by_state.merge_state(other.metric_state)
    assert torch.equal(by_state.compute(), one.compute())


def test_two_that_saw_nothing_merge_into_one_that_saw_nothing():
    metric = streamed([])
    metric.merge_state(streamed([]))
    assert_same_states(metric, states(streamed([])))


def test_forward_gives_the_batchs_covariance_and_adds_the_batch():
    first, second = normal(20, 5), normal(30, 5, seed=1) + 4
    metric = streamed([first])
    torch.testing.assert_close(metric(second), torch.cov(second.T))
    torch.testing.assert_close(metric.compute(), torch.cov(torch.cat([first, second]).T))
    metric.update(first * 2)
    torch.testing.assert_close(metric.compute(), torch.cov(torch.cat([first, second, first * 2]).T))


@pytest.mark.parametrize(
    "copy", [lambda metric: pickle.loads(pickle.dumps(metric)), StreamingCovariance.clone], ids=["pickle", "clone"]
)
def test_a_copy_goes_on_alone(copy):
    responses = normal(64, 5)
    metric = streamed([responses[:40]])
    twin = copy(metric)
    before = states(metric)
    twin.update(responses[40:])
    torch.testing.assert_close(twin.compute(), torch.cov(responses.T))
    assert_same_states(metric, before)


def test_reset_forgets_everything():
    metric = streamed([normal(20, 5) + 1e6])
    metric.compute()
    metric.reset()
    assert int(metric.count) == 0
    metric.update(normal(30, 5, seed=1))
    assert torch.equal(metric.compute(), streamed([normal(30, 5, seed=1)]).compute())


def test_batches_inside_and_outside_of_inference_mode_mix():
    responses = normal(64, 5)
    with torch.inference_mode():
        metric = streamed([responses[:10]])
        metric.reset()
        metric.update(responses[:20])
    metric.update(responses[20:40])
    with torch.inference_mode():
        metric.update(responses[40:])
    torch.testing.assert_close(metric.compute(), torch.cov(responses.T))


def test_mixed_precision_does_not_reach_the_sums():
    responses = normal(64, 5, 2, 2, dtype=torch.float32) + 100
    plain = streamed(responses.split(16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (responses[:, :, 0, 0].T @ responses[:, :, 0, 0]).dtype == torch.bfloat16  # it is on
        mixed = streamed(responses.split(16))
    assert_same_states(mixed, states(plain))


def test_no_graph_is_kept():
    metric = streamed([normal(8, 5).requires_grad_() * 2])
    assert not any(state.requires_grad for state in metric.metric_state.values())


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.float, nn.Module.double],
    ids=["to", "half", "float", "double"],
)
def test_a_cast_of_the_module_that_holds_it_leaves_float64(cast):
    responses = normal(64, 5) + 1e3
    holder = nn.ModuleDict({"layer": nn.Linear(2, 2), "covariance": streamed([responses[:40]])})
    metric = holder["covariance"]
    metric.compute()
    before = states(metric)
    cast(holder)
    assert_same_states(metric, before)
    metric.update(responses[40:])
    torch.testing.assert_close(metric.compute(), torch.cov(responses.T))
    metric.reset()
    assert all(state.dtype == torch.float64 for state in metric.metric_state.values())


def test_stays_on_the_cpu_where_a_device_has_no_float64():
    def to_mps(tensor):
        """What `.to("mps")` does, on a machine that has none."""
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        return SimpleNamespace(device=torch.device("mps"), dtype=tensor.dtype)

    metric = streamed([normal(20, 5)])
    metric.compute()
    before = states(metric)
    metric._apply(to_mps)
    assert metric.device.type == "mps"
    assert metric.scatter.device.type == "cpu"
    assert_same_states(metric, before)


def test_keeps_no_more_with_every_batch():
    metric = streamed([normal(16, 5, 4, 4)])
    after_one = len(pickle.dumps(metric))
    for seed in range(20):
        metric.update(normal(16, 5, 4, 4, seed=seed))
    assert len(pickle.dumps(metric)) == after_one


# What two processes see: rank 0 more than rank 1, of another mean, and one channel that never changes.
def _shared_out(rank):
    responses = (normal(50, 5) + 1e4).float()
    responses[30:] += 3
    responses[:, 2] = 0.1
    return (responses[:37], responses[37:])[rank]


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metric = streamed(_shared_out(rank).split(10))
    alone = StreamingCovariance(channels=5)  # rank 1 has no data for this one
    if rank == 0:
        alone.update(_shared_out(0))
    found = {"together": metric.compute(), "own_count": metric.count, "alone": alone.compute()}
    metric.update(_shared_out(rank) + 1)  # the sync left each rank its own states
    found["later"] = metric.compute()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    seen = torch.cat([_shared_out(0), _shared_out(1)])
    for ours in found:
        torch.testing.assert_close(ours["together"], torch.cov(seen.double().T), rtol=1e-9, atol=1e-12)
        assert ours["together"][2].count_nonzero() == 0
        torch.testing.assert_close(ours["alone"], torch.cov(_shared_out(0).double().T), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours["later"], torch.cov(torch.cat([seen, seen + 1]).double().T), rtol=1e-9, atol=1e-12)
    assert [int(ours["own_count"]) for ours in found] == [37, 13]
    for name in ("together", "alone", "later"):  # bit for bit, so that all ranks decide alike
        assert torch.equal(found[0][name], found[1][name])
