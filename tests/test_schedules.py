"""Learning-rate schedules of the documents."""

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR, SequentialLR, StepLR

from lit_compress.schedules import WarmupStepLR


def rates(schedule_of, steps=14):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.6)
    schedule, seen = schedule_of(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(("warmup", "step_size"), [(5, 2), (2, 4)])
def test_a_warm_up_and_steps_are_those_of_torch_one_after_the_other(warmup, step_size):
    def in_turn(optimizer):
        parts = [LinearLR(optimizer, 1 / 16, total_iters=warmup), StepLR(optimizer, step_size, gamma=0.9)]
        return SequentialLR(optimizer, parts, milestones=[warmup])

    ours = rates(lambda optimizer: WarmupStepLR(optimizer, warmup=warmup, start=1 / 16, step_size=step_size, gamma=0.9))
    assert ours == pytest.approx(rates(in_turn))
    assert ours[0] == pytest.approx(0.1)
    assert max(ours) == ours[warmup] == 1.6


def test_without_a_warm_up_it_begins_at_the_top():
    assert rates(lambda optimizer: WarmupStepLR(optimizer, 0, 0.5, step_size=2, gamma=0.5), 5) == [1.6, 1.6, 0.8, 0.8, 0.4]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((-1, 0.1, 2, 0.9), "`warmup` must be at least 0"),
        ((5, 0.1, 0, 0.9), "`step_size` at least 1 but got 5 and 0"),
        ((5, 0.0, 2, 0.9), r"`start` must lie in \(0, 1\] but got 0"),
        ((5, 0.1, 2, 0.0), "`gamma` must be positive but got 0"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        rates(lambda optimizer: WarmupStepLR(optimizer, *arguments))
