"""What a cut tells: to any Lightning logger, to disk, on the progress bar and at the end; and the figures and tables it tells."""

import csv
import json
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import nn

from lit_compress import Recipe, analyze, count_mult_adds, count_parameters
from lit_compress.callbacks import CompressionMonitor, PFAPruning
from lit_compress.metrics import CompressionRatios
from lit_compress.pictures import plot_information, plot_information_plane, plot_ratios, plot_spectra, plot_widths
from lit_compress.report import Latency, LayerRow, LayerTable, measure_latency
from lit_compress.selection import pfa
from tests.modules import Small, fit_theirs, new_trainer, small_loaders
from tests.networks import Net

METRICS = ("right", "area", "mean", "loss", "total")
WIDTHS = ("body.0", "body.3", "head")
SIZES = ["compress/parameters", "compress/mult_adds", "compress/latency_ms", "compress/R_n", "compress/R_w"]
AT_THE_CUT = {
    *SIZES,
    *(f"compress/width/{layer}" for layer in WIDTHS),
    *(f"compress/{when}_cut/val/{name}" for when in ("before", "after") for name in METRICS),
}
AT_THE_END = {f"compress/fine_tuned/val/{name}" for name in METRICS}


def pruned(tmp_path, **options):
    """Module, trainer and callback of a run that is cut twice, before epochs 1 and 2."""
    pruning = PFAPruning(energy=0.9, every_n_epochs=1, max_cuts=2)
    module, trainer = fit_theirs(tmp_path, pruning, max_epochs=3, enable_checkpointing=False, **options)
    return module, trainer, pruning


def check_values(logged, module, trainer, pruning):
    """`logged` has, for each name, the value after the last cut or at the end of the run."""
    final = trainer.callback_metrics
    assert logged["compress/parameters"] == count_parameters(module)
    assert logged["compress/mult_adds"] == count_mult_adds(module, torch.zeros(1, 1, 8, 8))
    ratios = CompressionRatios()
    ratios.update(module, torch.zeros(1, 1, 8, 8))
    for name, ratio in ratios.compute().items():
        assert logged[f"compress/{name}"] == pytest.approx(float(ratio), rel=1e-5)
    for layer in WIDTHS:
        assert logged[f"compress/width/{layer}"] == len(module.get_submodule(layer).weight)
    report = pruning.reports[-1]
    assert logged["compress/latency_ms"] == pytest.approx(report.after.latency.median)
    for name in METRICS:
        assert logged[f"compress/before_cut/val/{name}"] == pytest.approx(report.before.metrics[f"val/{name}"], rel=1e-5)
        assert logged[f"compress/after_cut/val/{name}"] == pytest.approx(report.after.metrics[f"val/{name}"], rel=1e-5)
        assert logged[f"compress/fine_tuned/val/{name}"] == pytest.approx(final[f"val/{name}"].item(), rel=1e-5)


def check_folder(folder, pruning):
    written = ("layers.txt", "layers.csv", "spectra.png", "widths.png")
    names = {f"cut_{index}_{name}" for index in (0, 1) for name in written}
    assert {path.name for path in folder.iterdir()} == names | {"recipe.json", "summary.json"}
    assert Recipe.load(folder / "recipe.json") == pruning.reports[-1].recipe
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["before"]["parameters"] == pruning.reports[0].before.parameters
    assert summary["after_cut"]["parameters"] == pruning.reports[1].after.parameters
    assert set(summary["fine_tuned"]) == {f"val/{name}" for name in METRICS}
    assert "body.0" in (folder / "cut_0_layers.txt").read_text(encoding="utf-8")
    for picture in folder.glob("*.png"):
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(10**6)) > 10, "a picture of something"


# ---------------------------------------------------------------- loggers


def test_a_csv_file_gets_every_figure(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    module, trainer, pruning = pruned(tmp_path, logger=logger)
    with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {name for name in rows[0] if name.startswith("compress/")} == AT_THE_CUT | AT_THE_END
    cuts = [row for row in rows if row["compress/parameters"]]
    assert [int(row["step"]) for row in cuts] == [5, 10], "two batches a step, nine batches an epoch"
    assert [float(row["compress/parameters"]) for row in cuts] == [report.after.parameters for report in pruning.reports]
    last = {name: float(row[name]) for row in rows for name in AT_THE_CUT | AT_THE_END if row[name]}
    check_values(last, module, trainer, pruning)
    check_folder(tmp_path / "lightning_logs" / "version_0" / "compress", pruning)


def test_tensorboard_gets_every_figure_and_the_pictures(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    logger = TensorBoardLogger(tmp_path)
    module, trainer, pruning = pruned(tmp_path, logger=logger)
    logger.finalize("success")
    events = events.EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    scalars = {tag for tag in events.Tags()["scalars"] if tag.startswith("compress/")}
    assert scalars == AT_THE_CUT | AT_THE_END
    check_values({tag: events.Scalars(tag)[-1].value for tag in scalars}, module, trainer, pruning)
    assert set(events.Tags()["images"]) == {"compress/spectra", "compress/widths"}
    for tag in ("compress/spectra", "compress/widths"):
        images = events.Images(tag)
        assert [image.step for image in images] == [5, 10]
        assert all(image.width > 200 for image in images)
    check_folder(tmp_path / "lightning_logs" / "version_0" / "compress", pruning)


def test_weights_and_biases_gets_every_figure_the_pictures_and_the_table(tmp_path, offline_wandb):
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="tests")
    module, trainer, pruning = pruned(tmp_path, logger=logger)
    run = offline_wandb()
    told = {name for name in run.summary if name.startswith("compress/")}
    assert told == AT_THE_CUT | AT_THE_END | {"compress/spectra", "compress/widths", "compress/layers"}
    check_values(run.summary, module, trainer, pruning)
    for name in ("compress/spectra", "compress/widths"):
        pictures = [run.media / file for value in run.logged(name) for file in value["filenames"]]
        assert len(pictures) == 2
        assert all(Image.open(picture).size[0] > 200 for picture in pictures)
    for report, value in zip(pruning.reports, run.logged("compress/layers"), strict=True):
        columns, rows = run.table(value)
        assert columns == ["layer", "channels", "channels kept", "weights", "weights kept", "note"]
        assert [row[0] for row in rows] == list(WIDTHS)
        assert {row[0]: row[2] for row in rows} == {"head": 10} | report.recipe.widths
    check_folder(tmp_path / "compress", pruning)


def test_without_a_logger_everything_is_on_disk(tmp_path):
    *_, pruning = pruned(tmp_path, logger=False)
    check_folder(tmp_path / "compress", pruning)


class Numbers(Logger):
    """A logger that knows nothing but numbers."""

    name, version = "numbers", 0

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_metrics(self, metrics, step=None):
        self.seen |= metrics

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_every_logger_of_several_is_told(tmp_path):
    loggers = [Numbers(), Numbers()]
    module, trainer, pruning = pruned(tmp_path, logger=loggers)
    for logger in loggers:
        assert {name for name in logger.seen if name.startswith("compress/")} == AT_THE_CUT | AT_THE_END
        check_values(logger.seen, module, trainer, pruning)
    check_folder(tmp_path / "compress", pruning)


class Broken(Numbers):
    """Its server cannot be reached at a cut."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("compress/") for name in metrics):
            raise ConnectionError("no route to host")


def test_where_a_logger_fails_the_others_are_told_and_training_goes_on(tmp_path):
    loggers = [Broken(), Numbers()]
    with pytest.warns(UserWarning, match="cannot be told to Broken, and training goes on: ConnectionError: no route to host"):
        module, trainer, pruning = pruned(tmp_path, logger=loggers)
    check_values(loggers[1].seen, module, trainer, pruning)
    check_folder(tmp_path / "compress", pruning)


@pytest.mark.parametrize("others", [(), (CompressionMonitor(),)], ids=["alone", "beside a monitor"])
def test_where_the_disk_fails_training_goes_on(others, tmp_path):
    (tmp_path / "compress").write_text("a file where the folder should be")
    logger, pruning, module = Numbers(), PFAPruning(energy=0.8, at_epoch=1), Small()
    with pytest.warns(UserWarning, match=r"cannot be told to the folder .*compress, and training goes on: FileExistsError"):
        new_trainer(tmp_path, pruning, *others, logger=logger).fit(module, *small_loaders())
    assert len(pruning.reports) == 1
    assert logger.seen["compress/parameters"] == count_parameters(module) < count_parameters(Small())


def test_nothing_is_evaluated_if_that_is_not_wanted(tmp_path):
    logger = Numbers()
    pruning = PFAPruning(energy=0.9, at_epoch=1, evaluate=False)
    new_trainer(tmp_path, pruning, logger=logger, max_epochs=2).fit(Small(), *small_loaders())
    told = {name for name in logger.seen if name.startswith("compress/")}
    assert told == {*SIZES, *(f"compress/width/net.{i}" for i in (0, 2, 4))}


def test_the_end_of_a_run_shows_what_was_gained(tmp_path, capsys):
    _, trainer, pruning = pruned(tmp_path)
    shown = capsys.readouterr().out
    first, last = pruning.reports
    for number in (first.before.parameters, last.after.parameters, first.before.mult_adds, last.after.mult_adds):
        assert f"{number:,}" in shown
    assert f"{last.after.parameters / first.before.parameters:.1%}" in shown
    for value in (first.before.metrics["val/loss"], last.after.metrics["val/loss"], trainer.callback_metrics["val/loss"]):
        assert f"{float(value):.4f}" in shown
    assert "batch 32" in shown
    assert str(tmp_path / "compress") in shown


def test_a_module_without_trainable_parameters_has_a_table_too(tmp_path, capsys):
    class Frozen(Small):
        def __init__(self):
            super().__init__()
            self.net.requires_grad_(False)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            return None

    new_trainer(tmp_path, PFAPruning(energy=0.9, at_epoch=1), max_epochs=2).fit(Frozen(), *small_loaders())
    assert "parameters" in capsys.readouterr().out


# ---------------------------------------------------------------- progress


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_analysis_shows_its_progress_in_the_style_of_the_trainer(bar, tmp_path, capsys):
    shows = bar()
    pruned = new_trainer(tmp_path, shows, PFAPruning(energy=0.9, every_n_epochs=1, max_cuts=2), enable_progress_bar=True)
    tasks = []
    if bar is RichProgressBar:
        add = shows._add_task
        shows._add_task = lambda total, description, *args, **kwargs: (
            tasks.append((description, total)),
            add(total, description, *args, **kwargs),
        )[1]
    pruned.fit(Small(), *small_loaders())
    if bar is RichProgressBar:
        assert tasks.count(("Analysis", 3)) == 2
        assert not any(task.visible for task in shows.progress.tasks if "Analysis" in task.description)
    else:
        assert "Analysis:" in capsys.readouterr().err


def test_a_bar_of_unknown_length_for_a_stream(tmp_path):
    from torch.utils.data import DataLoader, IterableDataset

    from tests.modules import vectors

    class Stream(IterableDataset):
        def __iter__(self):
            return zip(*vectors(48).tensors, strict=True)

    for bar in (TQDMProgressBar(), RichProgressBar()):
        pruning = PFAPruning(energy=0.9, at_epoch=1)
        trainer = new_trainer(tmp_path, bar, pruning, max_epochs=2, enable_progress_bar=True)
        trainer.fit(Small(), DataLoader(Stream(), 16), small_loaders()[1])
        assert len(pruning.reports) == 1


def test_a_bar_that_is_switched_off_stays_off(tmp_path, capsys):
    for bar in (TQDMProgressBar(refresh_rate=0), RichProgressBar(refresh_rate=0)):
        trainer = new_trainer(tmp_path, bar, PFAPruning(energy=0.9, at_epoch=1), max_epochs=2, enable_progress_bar=True)
        trainer.fit(Small(), *small_loaders())
    captured = capsys.readouterr()
    assert "Analysis" not in captured.err + captured.out


# ---------------------------------------------------------------- figures, tables, times


def test_spectra_are_drawn_as_energy_over_the_share_of_directions():
    spectra = {"a": torch.tensor([0.5, 0.3, 0.2]), "b": torch.tensor([0.9, 0.1])}
    figure = plot_spectra(spectra, {"a": 2, "b": 9})
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    curve_a, dot_a, curve_b, dot_b = axes.lines
    for line, points in (
        (curve_a, [[0, 0], [1 / 3, 0.5], [2 / 3, 0.8], [1, 1]]),
        (dot_a, [[2 / 3, 0.8]]),
        (curve_b, [[0, 0], [0.5, 0.9], [1, 1]]),
        (dot_b, [[1, 1]]),
    ):
        np.testing.assert_allclose(line.get_xydata(), points, atol=1e-6)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    plot_spectra({})
    assert len(plot_spectra({str(i): spectra["a"] for i in range(40)}).axes[0].lines) == 40


def test_the_dots_of_a_cut_stand_at_the_channels_kept(tmp_path, monkeypatch):
    """Of a layer that is tied in halves to others, each half has a curve and a dot of its own."""
    drawn = []

    def plot(spectra, kept):
        drawn.append((spectra, kept))
        return Figure()

    monkeypatch.setattr("lit_compress.spectra.plot_spectra", plot)

    class Halves(Small):
        def __init__(self):
            super().__init__()
            parts = {"left": nn.Linear(6, 8), "right": nn.Linear(6, 8), "wide": nn.Linear(6, 16), "head": nn.Linear(16, 3)}
            self.net = Net(lambda m, x: m.head((m.wide(x) + torch.cat([m.left(x), m.right(x)], 1)).relu()), **parts)

    module = Halves()
    new_trainer(tmp_path, PFAPruning(energy=0.7, at_epoch=1), max_epochs=2).fit(module, *small_loaders())
    ((spectra, kept),) = drawn
    assert {name: len(spectrum) for name, spectrum in spectra.items()} == {"net.wide": 8, "net.wide#2": 8}
    assert kept == {"net.wide": module.net.left.out_features, "net.wide#2": module.net.right.out_features}
    assert sum(kept.values()) == module.net.wide.out_features < 16


def test_widths_are_drawn_side_by_side():
    (axes,) = plot_widths({"a": 8, "b": 4}, {"a": 3}).axes
    assert [bar.get_height() for bar in axes.patches] == [8, 4, 3, 4]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


def test_information_is_drawn_over_time_with_its_fall_at_a_cut():
    (axes,) = plot_information([(0, {"a": 1.0}), (1, {"a": 5.0, "b": 2.0}), (1, {"a": 3.0, "b": 1.0})], cuts=[1]).axes
    first, second, mark = axes.lines
    assert first.get_xydata().tolist() == [[0, 1], [1, 5], [1, 3]]
    assert second.get_xydata().tolist() == [[1, 2], [1, 1]]
    assert list(mark.get_xdata()) == [1, 1]
    plot_information([])


def test_the_information_plane_has_a_path_and_its_end_for_each_layer():
    (axes,) = plot_information_plane({"a": [(1, 2), (3, 4)], "b": [(5, 6)]}).axes
    path, end, _, other_end = axes.lines
    assert path.get_xydata().tolist() == [[1, 2], [3, 4]]
    assert end.get_xydata().tolist() == [[3, 4]]
    assert other_end.get_xydata().tolist() == [[5, 6]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_error_is_drawn_over_both_ratios_beside_published_points():
    left, right = plot_ratios({"run": [(100, 100, 2.0), (30, 20, 2.5)]}, {"VIBNet": (27, 22, 1.6)}).axes
    for axes, sizes, published in ((left, [100, 30], 27), (right, [100, 20], 22)):
        path, point = axes.lines
        assert path.get_xydata().tolist() == [[sizes[0], 2.0], [sizes[1], 2.5]]
        assert point.get_xydata().tolist() == [[published, 1.6]]
        assert [text.get_text() for text in axes.texts] == ["VIBNet"]


def test_a_table_of_layers_reads_as_text():
    row = LayerRow("body[0]", 8, 3, 1234, 56, note="[odd] names")
    text = str(LayerTable("pfa(kl)", (row,), {"parameters": (2000, 500)}))
    assert "pfa(kl)" in text
    (line,) = [line for line in text.splitlines() if "body[0]" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["body[0]", "8", "3", "1,234", "56", "[odd] names"]
    (line,) = [line for line in text.splitlines() if "parameters" in line]
    assert "2,000" in line
    assert "25.0% kept" in line


def test_a_preview_and_a_recipe_tell_the_same():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    analysis = analyze(network, [torch.randn(50, 6)])
    recipe = analysis.recipe(energy=0.7)
    first, last = analysis.preview(recipe).rows
    assert (first.channels, first.kept) == (8, pfa.energy_width(analysis.spectra["0"].spectrum, 0.7))
    assert (first.parameters, first.parameters_kept) == (48, 6 * first.kept)
    assert (last.parameters, last.parameters_kept) == (24, 3 * first.kept)


def test_latency_is_the_median_of_runs_after_warm_up():
    calls = []

    def run():
        calls.append(torch.is_grad_enabled())
        time.sleep(0.02 if len(calls) <= 2 else 0.001 * (len(calls) % 3))

    latency = measure_latency(run, seconds=0.03, runs=40)
    assert not any(calls)
    assert latency.lower <= latency.median <= latency.upper
    assert 0.9 < latency.median < 10
    assert len(calls) >= 2 + 5
    assert str(Latency(1.0, 0.5, 2.25)) == "1.00 ms (0.50-2.25)"


def test_latency_stops_after_its_runs_or_its_time():
    calls = []
    measure_latency(lambda: calls.append(0), seconds=60, runs=7)
    assert len(calls) <= 5 + 7
    calls.clear()
    measure_latency(lambda: (calls.append(0), time.sleep(0.01)), seconds=0.0, runs=1000)
    assert len(calls) == 2 + 5
