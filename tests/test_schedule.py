"""When to cut: the triggers, one by one, and what contradicts."""

import math

import pytest
from lightning_fabric.utilities.exceptions import MisconfigurationException

from lit_compress.callbacks.schedule import CutSchedule


def run(schedule, epochs, values=None, max_epochs=None):
    """Epochs before which a schedule cuts, with the values of the monitored metric after each epoch."""
    schedule.resolve(max_epochs or epochs)
    for epoch in range(epochs):
        if schedule.due(epoch):
            schedule.note_cut(epoch)
        if values is not None:
            schedule.watch({schedule.monitor: values[epoch], "other": 0.0})
    return schedule.cuts


@pytest.mark.parametrize(
    ("options", "epochs", "cuts"),
    [
        ({}, 9, [4]),
        ({}, 1, [0]),
        ({"at_epoch": 0}, 3, [0]),
        ({"at_epoch": 2}, 3, [2]),
        ({"at_epoch": 2, "max_cuts": 1}, 9, [2]),
        ({"every_n_epochs": 3, "max_cuts": 2}, 12, [3, 6]),
        ({"every_n_epochs": 1, "max_cuts": 3}, 12, [1, 2, 3]),
        ({"every_n_epochs": 3, "max_cuts": 9}, 8, [3, 6]),
    ],
    ids=str,
)
def test_cuts_at_the_epochs_asked_for(options, epochs, cuts):
    assert run(CutSchedule(**options), epochs) == cuts


@pytest.mark.parametrize(
    ("options", "values", "cuts"),
    [
        # best after epoch 1; epochs 2 and 3 bring nothing; so before epoch 4
        ({"patience": 2}, [3, 2, 2, 2.5, 1, 1, 1], [4]),
        ({"patience": 2, "max_cuts": 2}, [3, 2, 2, 2.5, 9, 9, 9, 9], [4, 7]),
        ({"patience": 1, "mode": "max"}, [1, 2, 3, 3, 3, 3], [4]),
        ({"patience": 3, "mode": "max"}, [1, 2, 3, 4, 5, 6], []),
        ({"patience": 2}, [math.nan, math.nan, 1, 1, 1], [2]),
        ({"patience": 2}, [2, math.nan, 1, 0.5, 0.25], []),
        ({"patience": 2}, [math.nan, 5, 4, 3, 2], []),
    ],
    ids=str,
)
def test_cuts_when_nothing_improves_and_then_waits_anew(options, values, cuts):
    assert run(CutSchedule(when="converged", monitor="loss", **options), len(values), values) == cuts


def test_a_resumed_schedule_goes_on_from_any_epoch():
    values = [3, 2, 2, 2, 1, 4, 4, 4, 4, 4, 4, math.nan]
    options = {"when": "converged", "monitor": "loss", "patience": 2, "max_cuts": 3}
    whole = run(CutSchedule(**options), len(values), values)
    assert len(whole) == 3
    for stop in range(len(values)):
        first, second = CutSchedule(**options), CutSchedule(**options)
        run(first, stop, values, max_epochs=12)
        second.load_state_dict(first.state_dict())
        for epoch in range(stop, len(values)):
            if second.due(epoch):
                second.note_cut(epoch)
            second.watch({"loss": values[epoch]})
        assert second.cuts == whole, stop


def test_the_middle_of_training_stays_where_it_was_when_training_is_made_longer():
    first, second = CutSchedule(), CutSchedule()
    first.resolve(10)
    second.resolve(40)
    second.load_state_dict(first.state_dict())
    assert [epoch for epoch in range(9) if second.due(epoch)] == [5, 6, 7, 8]  # it was not told that it was made


def test_a_schedule_starts_anew():
    schedule = CutSchedule()
    assert run(schedule, 8) == [4]
    schedule.reset()
    assert run(schedule, 4) == [2]
    schedule = CutSchedule(when="converged", monitor="loss", patience=2)
    schedule.watch({"loss": 1.0})
    schedule.watch({"loss": 1.0})
    schedule.reset()
    assert run(schedule, 3, [5, 4, 3]) == []


def test_its_name_lasts_and_tells_schedules_apart():
    schedules = [CutSchedule(), CutSchedule(at_epoch=1), CutSchedule(at_epoch=2), CutSchedule(every_n_epochs=2, max_cuts=1)]
    schedules += [CutSchedule(when="converged"), CutSchedule(when="converged", monitor="loss")]
    names = [str(schedule) for schedule in schedules]
    assert len(set(names)) == len(names)
    for schedule in schedules:
        run(schedule, 8, [1] * 8)
    assert names == [str(schedule) for schedule in schedules]


def test_a_metric_that_is_not_logged_is_named_with_those_that_are():
    schedule = CutSchedule(when="converged", monitor="val/los")
    with pytest.raises(MisconfigurationException, match=r"`monitor='val/los'` is not logged; there are \['val/loss'\]"):
        schedule.watch({"val/loss": 1.0})
    CutSchedule(at_epoch=1).watch({})  # looks at nothing


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"at_epoch": 1, "every_n_epochs": 2}, r"exactly one of .* but got \['at_epoch', 'every_n_epochs'\]"),
        ({"at_epoch": 1, "when": "converged"}, r"but got \['at_epoch', 'when'\]"),
        ({"at_epoch": -1}, "`at_epoch` must be at least 0 but got -1"),
        ({"every_n_epochs": 0, "max_cuts": 1}, "`every_n_epochs` must be at least 1 but got 0"),
        ({"every_n_epochs": 2}, "`every_n_epochs` needs `max_cuts`"),
        ({"when": "done"}, "`when` must be 'converged' but got 'done'"),
        ({"max_cuts": 2}, "`max_cuts` must be at least 1, and 1 with `at_epoch`, but got 2"),
        ({"when": "converged", "max_cuts": 0}, "`max_cuts` must be at least 1"),
        ({"mode": "low"}, "`mode` must be 'min' or 'max' but got 'low'"),
        ({"patience": 0}, "`patience` must be at least 1 but got 0"),
    ],
    ids=str,
)
def test_refuses_contradictions(options, text):
    with pytest.raises(MisconfigurationException, match=text):
        CutSchedule(**options)


@pytest.mark.parametrize(
    ("options", "epochs", "text"),
    [
        ({"at_epoch": 5}, 5, r"due before epoch 5 \(counted from 0\), but training ends after 5 epochs"),
        ({"every_n_epochs": 7, "max_cuts": 1}, 5, "due before epoch 7"),
        ({}, -1, "no `max_epochs`"),
        ({}, None, "give `at_epoch`, `every_n_epochs` or `when`"),
    ],
    ids=str,
)
def test_refuses_a_training_that_ends_before_the_cut(options, epochs, text):
    with pytest.raises(MisconfigurationException, match=text):
        CutSchedule(**options).resolve(epochs)


@pytest.mark.parametrize("options", [{"at_epoch": 5}, {"every_n_epochs": 7, "max_cuts": 1}, {"when": "converged"}], ids=str)
def test_a_trigger_needs_no_end_of_training(options):
    CutSchedule(**options).resolve(-1)


def test_a_closed_schedule_makes_no_further_cut_also_once_resumed():
    schedule = CutSchedule(when="converged", max_cuts=9, patience=1)
    for value in (1.0, 1.0):
        schedule.watch({"val/loss": value})
    assert schedule.due(2)
    schedule.close()
    resumed = CutSchedule(when="converged", max_cuts=9, patience=1)
    resumed.load_state_dict(schedule.state_dict())
    for one in (schedule, resumed):
        assert not one.due(2)
        assert one.remaining == 0
    resumed.reset()
    assert resumed.remaining == 9
