"""What `CompressionMonitor` sees of a run, and that every logger is told the same."""

import csv
import json
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.nn import functional as F

from lit_compress import Recipe, analyze, count_mult_adds, count_parameters, cut
from lit_compress.callbacks import CompressionMonitor, PFAPruning, VIBPruning
from lit_compress.cli import main
from lit_compress.graph import trace
from lit_compress.history import Gauge, Moment, SizeHistory, Sizes
from lit_compress.models import ResNetCIFAR
from lit_compress.pictures import plot_history, plot_spectra
from lit_compress.plan import plan_of
from tests.modules import (
    At,
    Small,
    Theirs,
    every_epoch,
    everything,
    fit_theirs,
    new_trainer,
    same,
    small_loaders,
    train_loader,
    val_loader,
)  # fmt: skip

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "monitor_digits.yaml"
LAYERS = ("body.0", "body.3", "head")
CURVES = {
    "compress/parameters", "compress/mult_adds", "compress/share_of_parameters", "compress/share_of_mult_adds", "compress/cuts",
    *(f"compress/width/{layer}" for layer in LAYERS),
}  # fmt: skip


class Counted(Callback):
    """Counts anew, at the end of every batch."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.current_epoch not in self.seen:
            mult_adds = count_mult_adds(pl_module, torch.zeros(1, 1, 8, 8))
            widths = {layer: len(pl_module.get_submodule(layer).weight) for layer in LAYERS}
            self.seen[trainer.current_epoch] = Sizes(count_parameters(pl_module), mult_adds, widths)


def in_each_epoch(history, epochs):
    """Sizes by epoch, as a history tells them."""
    return {epoch: [m.sizes for m in history.moments if m.epoch <= epoch][-1] for epoch in range(epochs)}


def twice(**options):
    return PFAPruning(energy=0.9, every_n_epochs=1, max_cuts=2, evaluate=False, **options)


# ---------------------------------------------------------------- loggers


def numbers_in_csv(logger):
    with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(key, int(row["step"]), float(value)) for row in rows for key, value in row.items() if value and key != "step"]


def by_key(numbers):
    """Key to steps and to values, in the order of logging."""
    keys = sorted({key for key, *_ in numbers})
    return {key: [(step, value) for name, step, value in numbers if name == key] for key in keys}


def cells_of_markdown(text):
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return header, rows


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


def test_three_loggers_are_told_the_same_and_lose_only_the_panels_they_lack(tmp_path, offline_wandb):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = [
        CSVLogger(tmp_path, name="csv", flush_logs_every_n_steps=1),
        TensorBoardLogger(tmp_path, name="tensorboard"),
        WandbLogger(save_dir=tmp_path, offline=True, project="tests"),
    ]
    watch, counted = CompressionMonitor(), Counted()
    pruning = PFAPruning(energy=0.9, every_n_epochs=1, max_cuts=2)
    fit_theirs(tmp_path, watch, pruning, counted, logger=loggers, max_epochs=4, enable_checkpointing=False)
    run = offline_wandb()
    loggers[1].finalize("success")
    everything_in = dict.fromkeys(("images", "scalars", "tensors"), 0)
    events = accumulator.EventAccumulator(loggers[1].log_dir, size_guidance=everything_in).Reload()

    # Numbers: the same keys, steps and values everywhere, in the same order. TensorBoard holds float32.
    told = by_key(run.scalars())
    assert told.keys() >= CURVES | {"val/loss", "compress/before_cut/val/loss", "compress/fine_tuned/val/loss"}
    assert by_key(numbers_in_csv(loggers[0])) == told
    in_tensorboard = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert in_tensorboard.pop("hp_metric", None) is None or "hp_metric" not in told
    assert in_tensorboard.keys() == told.keys()
    for key, points in told.items():
        np.testing.assert_allclose(in_tensorboard[key], points, rtol=1e-6, err_msg=key)

    # Curves: at the start, at the cuts before epochs 1 and 2 (by the callback that cuts, and by the monitor), after each epoch.
    sizes = [counted.seen[epoch] for epoch in (0, 0, 1, 1, 1, 2, 2, 2, 3)]
    steps = [0, 5, 5, 5, 10, 10, 10, 15, 20]
    assert told["compress/parameters"] == [(step, size.parameters) for step, size in zip(steps, sizes, strict=True)]
    assert told["compress/mult_adds"] == [(step, size.mult_adds) for step, size in zip(steps, sizes, strict=True)]
    for layer in LAYERS:
        expected = [(step, size.widths[layer]) for step, size in zip(steps, sizes, strict=True)]
        assert told[f"compress/width/{layer}"] == expected
    assert told["compress/cuts"] == [(0, 0), (5, 0), (5, 1), (10, 1), (10, 2), (15, 2), (20, 2)]
    shares = [value for _, value in told["compress/share_of_parameters"]]
    assert shares[0] == 1
    assert shares[-1] == pytest.approx(counted.seen[3].parameters / counted.seen[0].parameters)

    # Pictures: of the two cuts, and of the history after each and at the end.
    steps = {"compress/spectra": [5, 10], "compress/widths": [5, 10], "compress/history": [5, 10, 20]}
    assert set(events.Tags()["images"]) == set(steps)
    for key, expected in steps.items():
        assert [image.step for image in events.Images(key)] == expected
        assert [row["trainer/global_step"] for row in run.rows if key in row] == expected
        for value in run.logged(key):
            (file,) = value["filenames"]
            with Image.open(run.media / file) as picture:
                assert len(picture.convert("RGB").getcolors(10**6)) > 10, "a picture of something"

    # Tables: in W&B as numbers, in TensorBoard as text, on disk as CSV.
    folder = Path(loggers[0].log_dir) / "compress"
    for name, count in (("sizes", 3), ("width_history", 3), ("layers", 2)):
        tables = [run.table(value) for value in run.logged(f"compress/{name}")]
        assert len(tables) == count
        columns, rows = tables[-1]
        (text,) = events.Tensors(f"compress/{name}/text_summary")[-1].tensor_proto.string_val
        as_text = columns, [[str(cell) for cell in row] for row in rows]
        assert [len(row) for row in rows] == [len(columns)] * len(rows)
        assert cells_of_markdown(text.decode()) == as_text
        if name != "layers":
            assert read_csv(folder / f"{name}.csv") == as_text
    columns, rows = run.table(run.logged("compress/width_history")[-1])
    assert columns == ["epoch", "step", "cut", "layer", "channels"]
    assert rows == [
        [epoch, step, method, layer, counted.seen[epoch].widths[layer]]
        for epoch, step, method in ((0, 0, ""), (1, 5, "pfa(energy=0.9)"), (2, 10, "pfa(energy=0.9)"))
        for layer in LAYERS
    ]

    # Recipes: a version of the artifact for each cut.
    assert [artifact.type for artifact in run.artifacts] == ["recipe", "recipe"]
    assert len({artifact.name for artifact in run.artifacts}) == 1
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("compress/recipe/text_summary")]
    for report, artifact, text in zip(pruning.reports, run.artifacts, texts, strict=True):
        assert Recipe.from_dict(json.loads(artifact.files["recipe.json"])) == report.recipe
        assert Recipe.from_dict(json.loads(text)) == report.recipe
        assert artifact.metadata["compress/parameters"] == report.after.parameters
    assert Recipe.load(folder / "recipe.json") == pruning.reports[-1].recipe
    assert {path.name for path in folder.iterdir()} >= {"history.png", "sizes.csv", "width_history.csv", "recipe.json"}


def test_without_a_logger_everything_is_on_disk(tmp_path):
    fit_theirs(tmp_path, twice(), CompressionMonitor(), max_epochs=4, enable_checkpointing=False)
    folder = tmp_path / "compress"
    _, rows = read_csv(folder / "sizes.csv")
    assert [row[:3] for row in rows] == [["0", "0", ""], ["1", "5", "pfa(energy=0.9)"], ["2", "10", "pfa(energy=0.9)"]]
    _, rows = read_csv(folder / "width_history.csv")
    assert [row[3] for row in rows] == 3 * list(LAYERS)
    with Image.open(folder / "history.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 10


def test_a_static_network_is_shown_without_any_pruning(tmp_path):
    watch, counted, logger = CompressionMonitor(), Counted(), CSVLogger(tmp_path)
    fit_theirs(tmp_path, watch, counted, logger=logger, max_epochs=3, enable_checkpointing=False)
    assert watch.history.moments == [Moment(0, 0, "", counted.seen[0])]
    told = by_key(numbers_in_csv(logger))
    assert told["compress/parameters"] == [(step, count_parameters(Theirs())) for step in (0, 5, 10, 15)]
    assert told["compress/share_of_mult_adds"] == [(step, 1) for step in (0, 5, 10, 15)]
    assert {path.name for path in (Path(logger.log_dir) / "compress").iterdir()} == {
        "history.png", "sizes.csv", "width_history.csv",
    }  # fmt: skip


def test_a_fast_dev_run_looks_and_writes_nothing(tmp_path):
    for loggers in (False, CSVLogger(tmp_path)):
        watch = CompressionMonitor(spectra_every_n_epochs=1)
        new_trainer(tmp_path, watch, PFAPruning(), fast_dev_run=True, logger=loggers).fit(Small(), *small_loaders())
        assert [bool(moment.cut) for moment in watch.history.moments] == [False, True]
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what it sees


@pytest.mark.parametrize("first", [True, False], ids=["first in the list", "last in the list"])
def test_sizes_are_those_that_counting_anew_gives_in_every_epoch(first, tmp_path):
    watch, counted = CompressionMonitor(), Counted()
    callbacks = [watch, twice(), counted] if first else [twice(), counted, watch]
    fit_theirs(tmp_path, *callbacks, max_epochs=4, enable_checkpointing=False)
    assert in_each_epoch(watch.history, 4) == counted.seen
    assert [(m.epoch, m.step, m.cut) for m in watch.history.moments] == [
        (0, 0, ""), (1, 5, "pfa(energy=0.9)"), (2, 10, "pfa(energy=0.9)"),
    ]  # fmt: skip


def test_several_pruning_callbacks_and_cuts_by_hand_are_all_events(tmp_path):
    def by_hand(trainer, module):
        cut(module, Recipe(keep={"body.0": tuple(range(2))}, method="by hand"), torch.zeros(1, 1, 8, 8))
        trainer.optimizers[0].state.clear()

    watch, counted = CompressionMonitor(), Counted()
    one = PFAPruning(energy=0.9, at_epoch=1, include=["body.0"], evaluate=False)
    other = PFAPruning(at_epoch=1, include=["body.3"], evaluate=False)
    fit_theirs(tmp_path, watch, one, other, At(3, by_hand), counted, max_epochs=5, enable_checkpointing=False)
    assert [(m.epoch, m.cut) for m in watch.history.moments] == [
        (0, ""), (1, "pfa(energy=0.9) then pfa(kl)"), (3, "by hand"),
    ]  # fmt: skip
    assert in_each_epoch(watch.history, 5) == counted.seen
    assert Recipe.load(tmp_path / "compress" / "recipe.json").widths["body.0"] == 2


def test_the_gates_of_vib_are_no_part_of_the_size(tmp_path):
    watch, vib = CompressionMonitor(), VIBPruning(at_epoch=1, keep_params=0.6)
    module = Theirs()
    whole = count_parameters(module)
    fit_theirs(tmp_path, vib, watch, module=module, max_epochs=2, enable_checkpointing=False)
    assert [moment.sizes.parameters for moment in watch.history.moments] == [whole, count_parameters(module)]
    assert count_parameters(module) <= 0.6 * whole


def test_a_cut_that_removes_nothing_is_no_event(tmp_path):
    watch = CompressionMonitor()
    callbacks = PFAPruning(energy=0.8, min_width=16, at_epoch=1), PFAPruning(energy=0.8, at_epoch=2)
    new_trainer(tmp_path, watch, *callbacks, max_epochs=3).fit(Small(), *small_loaders())
    assert [(moment.epoch, moment.cut) for moment in watch.history.moments] == [(0, ""), (2, "pfa(energy=0.8)")]


def test_a_network_that_is_cut_before_its_first_batch_is_shown_as_it_was_built(tmp_path):
    watch = CompressionMonitor()
    module, _ = fit_theirs(tmp_path, watch, PFAPruning(energy=0.9, at_epoch=0), max_epochs=1, enable_checkpointing=False)
    start, after = watch.history.moments
    assert (start.epoch, start.cut, after.epoch, after.cut) == (0, "", 0, "pfa(energy=0.9)")
    assert start.sizes.parameters == count_parameters(Theirs())
    assert start.sizes.mult_adds == count_mult_adds(Theirs(), torch.zeros(1, 1, 8, 8))
    assert after.sizes.parameters == count_parameters(module) < start.sizes.parameters


def test_layers_that_are_replaced_in_the_middle_of_a_run_are_found_again(tmp_path):
    def replace(trainer, module):
        module.head = nn.Sequential(nn.Linear(48, 3), nn.Linear(3, 10))
        trainer.optimizers[0].add_param_group({"params": module.head.parameters()})

    watch = CompressionMonitor()
    trainer = new_trainer(tmp_path, watch, At(1, replace), max_epochs=2)

    class Plain(Theirs):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Plain()
    trainer.fit(module, train_loader(), val_loader())
    assert [dict(m.sizes.widths) for m in watch.history.moments] == [
        {"body.0": 12, "body.3": 12, "head": 10}, {"body.0": 12, "body.3": 12, "head.0": 3, "head.1": 10},
    ]  # fmt: skip
    assert watch.history.moments[1].sizes.parameters == count_parameters(module)
    plot_history(watch.history, 2)


@pytest.mark.parametrize("skips", ["share", "pad"])
def test_a_gauge_reads_off_the_shapes_what_counting_gives(skips):
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, num_classes=4)
    images = torch.randn(80, 3, 16, 16)
    one = images[:1]
    before = Sizes(count_parameters(net), count_mult_adds(net, one), {})
    gauge = Gauge(trace(net, lambda: net(images[:2])), samples=2)
    assert gauge.read(net) == gauge.read_original(net)
    for energy in (0.9, 0.8):
        analysis = analyze(net, [images], skips=skips)
        cut(net, analysis.recipe(energy=energy), one)
        now, original = gauge.read(net), gauge.read_original(net)
        assert (now.parameters, now.mult_adds) == (count_parameters(net), count_mult_adds(net, one))
        assert (original.parameters, original.mult_adds) == (before.parameters, before.mult_adds)
        assert now.parameters < original.parameters
        for layer, width in now.widths.items():
            assert width == net.get_submodule(layer).weight.shape[0]
    assert plan_of(net).recipe.widths.items() <= now.widths.items()


def test_a_grouped_transposed_convolution_has_the_channels_of_all_its_groups():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 12, 3, groups=2))
    x = torch.rand(1, 3, 8, 8)
    assert Gauge(trace(net, lambda: net(x)), samples=1).read(net).widths == {"0": 8, "1": 12}


# ---------------------------------------------------------------- what it leaves alone


class Left(Callback):
    """Keeps all there is after each epoch."""

    def __init__(self):
        self.after = []

    def on_train_epoch_end(self, trainer, pl_module):
        left = everything(trainer, pl_module)
        self.after.append({name: value for name, value in left.items() if name != "loggers"})


@pytest.mark.parametrize("options", [{}, {"spectra_every_n_epochs": 1}], ids=["sizes", "spectra"])
def test_the_run_is_the_same_as_without_it_bit_for_bit(options, tmp_path):
    runs = []
    for name, callbacks in (("without", ()), ("with", (CompressionMonitor(**options),))):
        left = Left()
        fit_theirs(tmp_path / name, *callbacks, twice(), left, max_epochs=3, enable_checkpointing=False)
        runs.append(left.after)
    for without, watched in zip(*runs, strict=True):
        for key in without:
            assert same(without[key], watched[key]), key


def test_the_first_batch_is_trained_on_as_it_came(tmp_path):
    class InPlace(Small):
        def validation_step(self, batch, batch_idx):
            batch[0].zero_()
            super().validation_step(batch, batch_idx)

    seen = []

    class Batches(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(batch[0].abs().sum(1).min()))

    new_trainer(tmp_path, CompressionMonitor(), Batches(), max_epochs=1).fit(InPlace(), *small_loaders())
    assert len(seen) == 3
    assert min(seen) > 0


def test_a_compiled_network_is_watched_as_any_other(tmp_path):
    class Compiled(Small):
        def __init__(self):
            super().__init__()
            self.run = torch.compile(self.net, backend="eager")

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.run(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.training_step(batch, batch_idx))

    watches = []
    for module in (Small(), Compiled()):
        watches.append(CompressionMonitor())
        new_trainer(tmp_path, watches[-1], max_epochs=2).fit(module, *small_loaders())
    plain, compiled = watches
    assert compiled.history.moments == plain.history.moments
    assert len(compiled.history.moments[0].sizes.widths) == 3


def test_it_runs_one_forward_and_looks_once_an_epoch(tmp_path, monkeypatch):
    calls = Counter()

    class Watched(Small):
        def __init__(self):
            super().__init__()
            self.net.register_forward_hook(lambda *args: calls.update(forwards=1))

    read = Gauge.read
    monkeypatch.setattr(Gauge, "read", lambda *args: (calls.update(looks=1), read(*args))[1])
    new_trainer(tmp_path, max_epochs=4).fit(Watched(), *small_loaders())
    without = calls["forwards"]
    assert without == 4 * (3 + 2)
    new_trainer(tmp_path, CompressionMonitor(), max_epochs=4).fit(Watched(), *small_loaders())
    assert calls["forwards"] == without + without + 1
    assert calls["looks"] == 4


# ---------------------------------------------------------------- alerts


class Forgetful(Small):
    """Logs the accuracies that it is given, one an epoch."""

    def __init__(self, accuracies):
        super().__init__()
        self.accuracies = accuracies

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def on_validation_epoch_end(self):
        self.log("val/accuracy", self.accuracies[self.trainer.current_epoch])


def cut_before(epoch, energy=0.9):
    return PFAPruning(energy=energy, at_epoch=epoch, evaluate=False)


def alerts_of(tmp_path, accuracies, *cuts, **options):
    """Warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = new_trainer(tmp_path, *cuts, CompressionMonitor(alert_drop=2, **options.pop("watch", {})), **options)
        trainer.fit(Forgetful(accuracies), *small_loaders())
    return [str(one.message) for one in caught if "alert" in str(one.message)]


def test_a_cut_that_is_not_recovered_from_gives_an_alert_and_one_that_is_gives_none(tmp_path, offline_wandb):
    assert alerts_of(tmp_path / "none", [0.9, 0.2, 0.88], cut_before(1)) == [], "the bound itself is within"
    assert alerts_of(tmp_path / "uncut", [0.9, 0.2, 0.2]) == [], "not a cut's doing"
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="tests")
    (told,) = alerts_of(tmp_path, [0.9, 0.2, 0.85], cut_before(1), logger=logger)
    assert told == (
        "val/accuracy was 0.9000 before the first cut and is 0.8500 now: worse by 5.00 points, of which `alert_drop` allows 2."
    )
    assert offline_wandb().alerts == [told]


def test_an_alert_comes_before_the_next_cut_and_is_relative_to_the_first(tmp_path):
    first, second = alerts_of(tmp_path, [0.9, 0.8, 0.87], cut_before(1), cut_before(2, energy=0.6))
    assert "is 0.8000 now: worse by 10.00 points" in first
    assert "is 0.8700 now: worse by 3.00 points" in second


def test_alerts_go_by_errors_that_rise_as_well(tmp_path):
    (told,) = alerts_of(tmp_path, [0.1, 0.2], cut_before(1), watch={"mode": "min"}, max_epochs=2)
    assert "worse by 10.00 points" in told


def test_alerts_refuse_what_they_cannot_go_by(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"at least 0, but got -1"):
        CompressionMonitor(alert_drop=-1)
    with pytest.raises(MisconfigurationException, match="'min' or 'max' but got 'up'"):
        CompressionMonitor(alert_drop=1, mode="up")
    unlogged = r"does not log on its validation data; there are \['val/loss'\]"
    for module, said in ((Small(), unlogged), (Forgetful([90.0]), "is 90. Give a `monitor`")):
        with pytest.raises(MisconfigurationException, match=said):
            new_trainer(tmp_path, CompressionMonitor(alert_drop=1), max_epochs=1).fit(module, *small_loaders())


def test_a_cut_before_any_validation_says_that_there_is_nothing_to_go_by(tmp_path):
    told = alerts_of(tmp_path, [0.9, 0.2], cut_before(0), max_epochs=2, num_sanity_val_steps=2)
    assert told == ["No alert can be given: val/accuracy was not validated before the first cut."]


def test_a_resumed_run_gives_the_alert_of_one_that_never_stopped(tmp_path):
    callbacks = (cut_before(1), CompressionMonitor(alert_drop=2), every_epoch(tmp_path))
    trainer = new_trainer(tmp_path, *callbacks, max_epochs=2, enable_checkpointing=True)
    trainer.fit(Forgetful([0.9, 0.2]), *small_loaders())
    again = new_trainer(tmp_path, cut_before(1), CompressionMonitor(alert_drop=2))
    with pytest.warns(UserWarning, match=r"was 0\.9000 before the first cut and is 0\.3000 now"):
        again.fit(Forgetful([0.9, 0.2, 0.3]), *small_loaders(), ckpt_path=tmp_path / "epoch=1.ckpt")


# ---------------------------------------------------------------- going on


def test_a_resumed_run_has_the_history_of_one_that_never_stopped(tmp_path):
    """From a file written in the middle of the epoch after the first cut, after its validation, and at the end of an epoch."""
    whole = CompressionMonitor()
    files = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", every_n_train_steps=2)
    after = ModelCheckpoint(tmp_path, save_top_k=-1, filename="validated-{epoch}", save_on_train_epoch_end=False)
    ends = ModelCheckpoint(tmp_path, save_top_k=-1, filename="ended-{epoch}", save_on_train_epoch_end=True, every_n_epochs=2)
    fit_theirs(tmp_path, whole, twice(), files, after, ends, max_epochs=4)
    for name, first in (("step=8", (8, 1)), ("validated-epoch=0", (5, 0)), ("ended-epoch=1", (10, 2))):
        file = tmp_path / f"{name}.ckpt"
        assert "CompressionMonitor" in torch.load(file, weights_only=True)["callbacks"]
        again, logger = CompressionMonitor(), CSVLogger(tmp_path / name)
        options = {"logger": logger, "enable_checkpointing": False}
        fit_theirs(tmp_path / name, again, twice(), max_epochs=4, ckpt_path=file, **options)
        assert again.history.moments == whole.history.moments, name
        assert by_key(numbers_in_csv(logger))["compress/cuts"][0] == first, "a curve begins where the run goes on"
        assert again.history.state_dict() == whole.history.state_dict()


def test_a_monitor_that_joins_a_resumed_run_knows_the_network_as_it_was_built(tmp_path):
    files = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    module, _ = fit_theirs(tmp_path, twice(), files, max_epochs=3)
    watch = CompressionMonitor()
    fit_theirs(tmp_path / "on", twice(), watch, max_epochs=4, ckpt_path=tmp_path / "epoch=2.ckpt", enable_checkpointing=False)
    start, now = watch.history.moments
    assert (start.epoch, now.epoch, now.cut) == (3, 3, "pfa(energy=0.9), 2 times")
    assert (start.sizes.parameters, now.sizes.parameters) == (count_parameters(Theirs()), count_parameters(module))


def test_a_second_run_begins_a_new_history(tmp_path):
    watch = CompressionMonitor()
    for _ in range(2):
        pruning = PFAPruning(energy=0.9, at_epoch=1)
        new_trainer(tmp_path, watch, pruning, max_epochs=2).fit(Small(), *small_loaders())
        assert [moment.epoch for moment in watch.history.moments] == [0, 1]


# ---------------------------------------------------------------- spectra


def test_spectra_are_drawn_every_so_many_epochs_with_the_widths_that_pfa_kl_would_keep(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("lit_compress.spectra.plot_spectra", lambda *args: (drawn.append(args), plot_spectra(*args))[1])
    module = Small()
    watch = CompressionMonitor(spectra_every_n_epochs=2, max_samples=50)
    new_trainer(tmp_path, watch, max_epochs=4).fit(module, *small_loaders())
    assert {path.name for path in (tmp_path / "compress").glob("*spectra.png")} == {
        "epoch_1_spectra.png", "epoch_3_spectra.png",
    }  # fmt: skip
    _, (spectra, kept) = drawn
    analysis = analyze(module.net, [batch[0] for batch in small_loaders()[0]])
    assert kept.keys() == spectra.keys() == {f"net.{name}" for name in analysis.spectra}
    assert all(0 < kept[name] <= len(spectrum) == 16 for name, spectrum in spectra.items())


# ---------------------------------------------------------------- refusals


class Pairs(Small):
    """Trains on two views of each sample, and validates on one."""

    def training_step(self, batch, batch_idx):
        (one, other), labels = batch
        return F.cross_entropy(self.net(one) + self.net(other), labels)


def pair_loaders():
    train, validation = small_loaders()
    train.collate_fn = lambda samples: ((torch.stack([x for x, _ in samples]),) * 2, torch.stack([y for _, y in samples]))
    return train, validation


def test_a_step_that_takes_other_batches_is_told_how(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"does not run on the example inputs.* give it one .* `example_batch`"):
        new_trainer(tmp_path, CompressionMonitor(), max_epochs=1).fit(Pairs(), *pair_loaders())
    watch = CompressionMonitor(example_batch=next(iter(small_loaders()[1])))
    new_trainer(tmp_path, watch, max_epochs=1).fit(Pairs(), *pair_loaders())
    assert watch.history.moments[0].sizes.mult_adds == 6 * 16 + 16 * 16 + 16 * 3


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_refuses_strategies_that_shard(name):
    trainer = SimpleNamespace(strategy=type(name, (), {})(), global_step=0)
    with pytest.raises(MisconfigurationException, match=f"{name} shards the parameters.* Leave CompressionMonitor out"):
        CompressionMonitor().setup(trainer, Small(), "fit")


def test_refuses_what_cannot_be_run_without_training(tmp_path):
    class ByHand(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = nn.Linear(6, 3), False

        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"ByHand optimizes manually.* Give it a `validation_step`"):
        new_trainer(tmp_path, CompressionMonitor(), max_epochs=1).fit(ByHand(), small_loaders()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spectra_every_n_epochs": 0}, "`spectra_every_n_epochs` must be at least 1 or None but got 0"),
        ({"max_samples": 1}, "`max_samples` must be at least 2 or None but got 1"),
    ],
)
def test_refuses_numbers_out_of_range(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        CompressionMonitor(**options)


# ---------------------------------------------------------------- the picture, the config


def test_the_picture_shows_shares_widths_and_cuts():
    history = SizeHistory()
    whole = Sizes(100, 1000, {"a": 8, "b": 4})
    history.note(0, 0, "", whole, whole)
    history.note(2, 20, "first", Sizes(50, 300, {"a": 4, "b": 3}), whole)
    history.note(3, 30, "first then second", Sizes(20, 100, {"a": 2, "b": 3}), whole)
    above, below, _ = plot_history(history, 5).axes
    parameters, mult_adds, *marks = above.lines
    np.testing.assert_allclose(parameters.get_xydata(), [[0, 1], [2, 0.5], [3, 0.2], [5, 0.2]])
    np.testing.assert_allclose(mult_adds.get_xydata(), [[0, 1], [2, 0.3], [3, 0.1], [5, 0.1]])
    assert [line.get_xdata()[0] for line in marks] == [2, 3]
    assert [text.get_text() for text in above.texts] == ["first", "second"]
    (mesh,) = below.collections
    np.testing.assert_allclose(np.reshape(mesh.get_array(), (2, 3)), [[1, 0.5, 0.25], [1, 0.75, 0.75]])
    assert [label.get_text() for label in below.get_yticklabels()] == ["a  8 to 2", "b  4 to 3"]


def test_the_config_shows_a_run_in_weights_and_biases_and_on_disk(tmp_path, monkeypatch, offline_wandb):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    pruning, watch = config["trainer"]["callbacks"]
    config["trainer"] |= {"max_epochs": 3, "enable_progress_bar": False}
    pruning["init_args"]["every_n_epochs"] = 1
    watch["init_args"]["spectra_every_n_epochs"] = 3
    config["data"]["init_args"]["train_size"] = 256
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    main(["fit", "--config", "short.yaml"])
    run = offline_wandb("lit_compress_runs")
    assert [len(run.logged(f"compress/{name}")) for name in ("history", "spectra", "sizes")] == [3, 3, 3]
    assert run.summary["compress/share_of_parameters"] <= 0.25
    assert len(run.artifacts) == 2
    (folder,) = (tmp_path / "lit_compress_runs" / "monitor_digits").glob("*/compress")
    assert {path.name for path in folder.iterdir()} >= {"history.png", "epoch_2_spectra.png", "cut_1_layers.txt", "recipe.json"}
