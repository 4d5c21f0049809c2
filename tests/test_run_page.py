"""The page about a run: complete, self-contained, well-formed, for every logger and every way in which a run may go."""

import csv
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, seed_everything
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.nn import functional as F

from lit_compress import Recipe, reporting
from lit_compress.callbacks import ApplyRecipe, CompressionMonitor, PFAPruning, PIBPruning, VIBPruning
from lit_compress.cli import main
from lit_compress.reporting.charts import line_chart
from lit_compress.reporting.folder import Run
from lit_compress.reporting.logs import read_logged
from lit_compress.reporting.page import page
from tests.modules import Small, every_epoch, fit_theirs, new_trainer, small_loaders

VOID = {"meta", "img", "br", "input", "link", "hr"}


class Parsed(HTMLParser):
    """A page's elements and text. It refuses what is not well-formed: every element is closed, in the right order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.words, self.tables, self.figures, self._open = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "figcaption":
            self.figures.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> in the wrong place, line {self.getpos()}"

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
        elif "figcaption" in self._open:
            self.figures[-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, first):
        """Heading of each row to its other cells, in the table whose first row has this word."""
        found = next(table for table in self.tables if first in table[0])
        return {row[0]: row[1:] for row in found[1:]}


def parsed(folder):
    return Parsed(page(Run.load(folder)))


def fit_small(folder, *callbacks, module=None, ckpt_path=None, **options):
    seed_everything(2, verbose=False)
    trainer = new_trainer(folder, *callbacks, **options)
    trainer.fit(module or Small(), *small_loaders(), ckpt_path=ckpt_path)
    return trainer


def two_cuts():
    return PFAPruning(energy=0.9, every_n_epochs=1, max_cuts=2)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The folder of a short run on digits that is cut twice, with everything that may lie in it."""
    folder = tmp_path_factory.mktemp("digits")
    logger = CSVLogger(folder, name="run")
    fit_theirs(folder, two_cuts(), CompressionMonitor(), max_epochs=3, logger=logger)
    return folder / "run" / "version_0"


# ---------------------------------------------------------------- what is on the page


def test_every_figure_of_the_summary_is_on_the_page(digits):
    summary = json.loads((digits / "compress" / "summary.json").read_text())
    shown = parsed(digits)
    rows = shown.table("after the cut")
    moments = [summary["before"], summary["after_cut"]]
    for name, tuned in summary["fine_tuned"].items():
        before, after = (moment["metrics"][name] for moment in moments)
        assert rows[name] == [f"{before:.4f}", f"{after:.4f}", f"{tuned:.4f}", f"{tuned - before:+.4f}"]
    for label, key in (("parameters", "parameters"), ("mult-adds", "mult_adds")):
        before, after = (moment[key] for moment in moments)
        assert rows[label] == [f"{before:,}", f"{after:,}", f"{after:,}", f"{100 * after / before:.1f} % kept"]
    sizes = [f"{moment['memory'] / 1024:.1f} KiB" for moment in moments]
    assert rows["memory"][:2] == sizes
    step = rows[f"step, batch of {summary['batch_size']}"]
    for cell, moment in zip(step, moments, strict=False):
        shown_times = [float(number) for number in re.findall(r"\d+\.\d+", cell)]
        assert shown_times == pytest.approx([moment["latency"][name] for name in ("median", "lower", "upper")], abs=0.005)
    assert step[-1] == f"{100 * np.prod([cut['time_share'] for cut in summary['cuts']]):.1f} % of the time"
    for name, ratio in summary["ratios"].items():
        assert next(cells[-1] for row, cells in rows.items() if f"({name})" in row) == f"{100 * ratio:.1f} % kept"
    cuts = shown.table("before epoch")
    assert list(cuts) == ["1", "2"]
    for number, cut in enumerate(summary["cuts"], 1):
        row = cuts[str(number)]
        assert row[:3] == [str(cut["epoch"]), f"{cut['after']['parameters']:,}", f"{cut['after']['mult_adds']:,}"]
        assert row[-1] == cut["recipe"] == "pfa(energy=0.9)"
    for value in summary["environment"].values():
        assert value in "".join(shown.words)
    assert "Theirs (body: Sequential, head: Linear)" in shown.text


def test_memory_and_step_of_a_cut_are_those_of_the_network(digits):
    summary = json.loads((digits / "compress" / "summary.json").read_text())
    state = torch.load(next(digits.rglob("*.ckpt")), weights_only=True)["state_dict"]
    assert summary["after_cut"]["memory"] == sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert [cut["step"] for cut in summary["cuts"]] == [5, 10], "two batches a step, nine batches an epoch"


def test_each_layer_has_its_widths_over_all_cuts(digits):
    recipe = Recipe.load(digits / "compress" / "recipe.json")
    rows = parsed(digits).table("built with")
    assert list(rows) == ["body.0", "body.3", "head"], "in the order of the forward"
    for layer, before in recipe.original.items():
        assert rows[layer][:2] == [str(before), str(recipe.widths.get(layer, before))]
    weights = torch.load(next(digits.rglob("*.ckpt")), weights_only=True)["state_dict"]
    assert rows["body.3"][3] == f"{12 * 12 * 9:,} → {weights['body.3.weight'].numel():,}"
    assert "output of the network" in rows["head"][-1]


def test_the_page_loads_nothing_and_runs_nothing(digits):
    html = page(Run.load(digits))
    shown = Parsed(html)
    assert not shown.all("script")
    assert not shown.all("link")
    links = [value for _, attributes in shown.elements for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not [name for _, attributes in shown.elements for name in attributes if name.startswith("on")]
    style = re.search(r"<style>(.*?)</style>", html, flags=re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(meta["content"] for meta in shown.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_page_can_be_found_ones_way_in_without_seeing_it(digits):
    shown = parsed(digits)
    assert shown.all("html")[0]["lang"] == "en"
    assert shown.all("title")
    headings = [int(tag[1]) for tag, _ in shown.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings)), "a level is left out"
    ids = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [link["href"] for link in shown.all("a")] == [f"#{name}" for name in ids]
    assert len(shown.all("caption")) == len(shown.all("table")) > 3
    assert all(cell.get("scope") in ("row", "col") for cell in shown.all("th"))
    assert all(len(image["alt"]) > 20 for image in shown.all("img"))
    charts = [svg for svg in shown.all("svg") if svg["class"] == "plot"]
    assert charts
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in charts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_their_ground(scheme):
    """By WCAG 2: 4.5 for text, 3 for what is drawn."""
    style = Path(reporting.__file__).with_name("page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    colours = dict(re.findall(r"--(\w+): #(\w{6})", dark if scheme == "dark" else light))

    def luminance(name):
        channels = [int(colours[name][start : start + 2], 16) / 255 for start in (0, 2, 4)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(*pair):
        low, high = sorted(map(luminance, pair))
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "card"):
        assert all(contrast(name, ground) >= 4.5 for name in ("text", "quiet", "accent"))
        assert all(contrast(f"s{index}", ground) >= 3 for index in range(6))


class Awkward(nn.Module):
    """Layers and metrics with names that mean something in HTML."""

    NAME = "<b>&\"'"

    def __init__(self):
        super().__init__()
        self.add_module(self.NAME, nn.Linear(6, 16))
        self.add_module("last", nn.Linear(16, 3))

    def forward(self, x):
        return self.last(getattr(self, self.NAME)(x).relu())


class AwkwardModule(Small):
    def __init__(self):
        super().__init__()
        self.net = Awkward()

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/<i>loss", loss, on_epoch=True, on_step=False)
        return loss


def test_names_are_shown_and_not_obeyed(tmp_path):
    folder = tmp_path / "<u>run&"
    fit_small(folder, PFAPruning(energy=0.8, at_epoch=1), module=AwkwardModule(), logger=CSVLogger(folder, "", ""))
    (folder / "config.yaml").write_text("</code></pre><script>alert(1)</script>\n")
    shown = parsed(folder)
    assert f"net.{Awkward.NAME}" in shown.table("built with")
    assert "<i>loss" in shown.figures
    assert "<u>run&" in shown.text
    assert "</code></pre><script>alert(1)</script>" in shown.text
    assert not {"script", "b", "i", "u"} & {tag for tag, attributes in shown.elements if attributes.get("style") is None}


# ---------------------------------------------------------------- curves


def test_a_chart_draws_the_values_where_its_ticks_say(digits):
    steps = np.array([0, 10, 25, 40, 60])
    values = np.array([2.31, 1.2, 1.45, 0.9, 0.31])
    html = line_chart("loss", {"val/loss": list(zip(steps, values, strict=True))}, span=(0, 60), cuts=[25])
    number = r"([-\d.,]+)"
    left = np.array(re.findall(rf'<text x="50" y="{number}" text-anchor="end">{number}</text>', html), dtype=float)
    below = np.array(re.findall(rf'<text x="{number}" y="226" text-anchor="middle">{number}</text>', html), dtype=float)
    to_value, to_step = np.polyfit(left[:, 0] - 4, left[:, 1], 1), np.polyfit(below[:, 0], below[:, 1], 1)
    path = re.search(r'class="line s0" d="([^"]+)"', html)[1]
    points = np.array(re.findall(rf"[ML]{number} {number}", path), dtype=float)
    np.testing.assert_allclose(np.polyval(to_step, points[:, 0]), steps, atol=0.02)  # a tenth of a pixel of 352
    np.testing.assert_allclose(np.polyval(to_value, points[:, 1]), values, atol=0.002)
    cut = float(re.search(rf'class="cut" x1="{number}"', html)[1])
    assert np.polyval(to_step, cut) == pytest.approx(25, abs=0.02)
    assert "2.31 to 0.31" in html


@pytest.mark.parametrize(
    "values", [[0.0], [3.0, 3.0], [float("nan"), 1e-9, float("inf")], [-5.0, 1e12], list(range(10**4))], ids=str
)
def test_a_chart_can_be_drawn_of_whatever_was_logged(values):
    html = line_chart("odd", {"odd": [(float(step), value) for step, value in enumerate(values)]}, span=(0, len(values) - 1))
    shown = Parsed(html)
    paths = [path["d"] for path in shown.all("path") if path["d"] != "M1 4H25"]
    places = np.array(re.findall(r"[ML]([-\d.]+) ([-\d.]+)", paths[0]), dtype=float)
    assert 1 <= len(places) <= 402
    assert (places >= 0).all()
    assert (places <= [420, 250]).all()
    assert "nan" not in paths[0]


def test_a_chart_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no finite value to draw of loss"):
        line_chart("loss", {"loss": [(0.0, float("nan"))]}, span=(0, 1))


class Seen(Callback):
    """Notes what is logged after each epoch."""

    def __init__(self):
        self.losses = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(trainer.callback_metrics["val/loss"].item())


def logged_by(kind, folder, offline_wandb):
    """The losses of a run with a logger, whose files are complete."""
    loggers = {
        "csv": lambda: CSVLogger(folder, "", ""),
        "tensorboard": lambda: TensorBoardLogger(folder, "", ""),
        "wandb": lambda: WandbLogger(save_dir=folder, offline=True, project="tests"),
    }
    logger, seen = loggers[kind](), Seen()
    fit_small(folder, PFAPruning(energy=0.8, at_epoch=1), seen, module=AwkwardModule(), logger=logger)
    logger.finalize("success")
    if kind == "wandb":
        offline_wandb(folder)
    return seen.losses


@pytest.mark.parametrize("kind", ["csv", "tensorboard", "wandb"])
def test_every_logger_gives_the_same_curves(kind, tmp_path, offline_wandb):
    if kind == "tensorboard":
        pytest.importorskip("tensorboard")
    losses = logged_by(kind, tmp_path, offline_wandb)
    curve = read_logged(tmp_path).curves["val/loss"]
    assert [step for step, _ in curve] == [2, 5, 8], "three batches an epoch, and steps are counted from 0"
    np.testing.assert_allclose([value for _, value in curve], losses, rtol=1e-6)  # float32 in TensorBoard
    shown = parsed(tmp_path)
    assert {"loss", "<i>loss"} <= set(shown.figures)
    assert "train/<i>loss" in shown.text


def test_a_file_of_weights_and_biases_is_read_as_far_as_it_was_written(tmp_path, offline_wandb):
    logged_by("wandb", tmp_path, offline_wandb)
    whole = read_logged(tmp_path).curves["train/<i>loss"]
    (log,) = tmp_path.glob("wandb/*run-*/run-*.wandb")
    content = log.read_bytes()
    lengths = []
    for size in range(0, len(content), max(len(content) // 20, 1)):
        log.write_bytes(content[: max(size, 7)])
        part = read_logged(tmp_path).curves.get("train/<i>loss", [])
        assert part == whole[: len(part)]
        lengths.append(len(part))
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2
    log.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"run-.*\.wandb: Not the file of a run of Weights & Biases"):
        read_logged(tmp_path)


def test_without_a_logger_the_page_says_that_there_are_no_curves(tmp_path):
    fit_small(tmp_path, two_cuts())
    shown = parsed(tmp_path)
    assert "There are no training curves: no logger wrote a file" in shown.text
    assert shown.figures == ["What is left, %", "Spectra, cut 1", "Spectra, cut 2"]
    assert len(shown.table("before epoch")) == 2


# ---------------------------------------------------------------- ways in which a run may go


class Sigmoids(Small):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 12), nn.Sigmoid(), nn.Linear(12, 3))


@pytest.mark.filterwarnings("ignore:.*lie .*between 0.1 and 0.9", "ignore:.*of the input's values")
def test_rounds_of_pib_show_what_the_layers_carry(tmp_path):
    callback = PIBPruning(every_n_epochs=1, max_cuts=4, stop=False)
    fit_small(tmp_path, callback, module=Sigmoids(), logger=CSVLogger(tmp_path, "", ""), max_epochs=6)
    removing = [report for report in callback.reports if report.after.parameters < report.before.parameters]
    assert 0 < len(removing) < len(callback.reports), "some rounds cut, some find nothing"
    shown = parsed(tmp_path)
    assert "Information of each layer's units, bits" in shown.figures
    assert "half a bit" in shown.text
    numbers = [row[0] for row in next(table for table in shown.tables if "before epoch" in table[0])[1:]]
    assert [number for number in numbers if number.isdigit()] == [str(index + 1) for index in range(len(removing))]
    assert numbers.count("nothing to remove") == len(callback.reports) - len(removing)


def test_a_cut_by_vib_is_told(tmp_path):
    fit_small(tmp_path, VIBPruning(at_epoch=2, keep_params=0.6), max_epochs=3, logger=CSVLogger(tmp_path, "", ""))
    shown = parsed(tmp_path)
    assert "Cut once, before epoch 2, by vib(" in shown.text
    assert "a gate of noise for each channel" in shown.text
    assert "Scores" in shown.figures


def test_a_cut_that_found_nothing_is_no_cut(tmp_path):
    fit_small(tmp_path, PFAPruning(energy=1.0, at_epoch=1, min_width=16), logger=CSVLogger(tmp_path, "", ""))
    assert "pfa(energy=1) found nothing to remove: the network is whole." in parsed(tmp_path).text


def test_a_run_without_a_cut_says_so(tmp_path):
    with pytest.warns(UserWarning, match="no compression was possible"):
        fit_small(tmp_path, Worse(), logger=CSVLogger(tmp_path, "", ""), max_epochs=3, module=Accurate())
    assert json.loads((tmp_path / "compress" / "summary.json").read_text())["cuts"] == []
    shown = parsed(tmp_path)
    assert "Nothing was cut in this run." in shown.text
    assert "Spectra" not in shown.text
    assert "lit-compress" in shown.table("value")


class Accurate(Small):
    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        self.log("val/accuracy", 1.0 if len(self.net[0].weight) == 16 else 0.0)


class Worse(PFAPruning):
    """Whatever is cut, the network does not recover."""

    def __init__(self):
        super().__init__(energy=0.5, at_epoch=1, max_drop=1.0, monitor="val/accuracy", mode="max", patience=1)


def test_a_run_that_only_logs_has_a_page(tmp_path):
    fit_small(tmp_path, logger=CSVLogger(tmp_path, "", ""))
    shown = parsed(tmp_path)
    assert "Nothing was cut in this run." in shown.text
    assert "loss" in shown.figures
    assert "Nothing says where this run took place" in shown.text


def test_the_folder_of_a_second_logger_points_to_the_first(tmp_path):
    loggers = [CSVLogger(tmp_path / "one", "", ""), CSVLogger(tmp_path / "two", "", "")]
    fit_small(tmp_path, PFAPruning(energy=0.8, at_epoch=1), logger=loggers)
    assert "Cut once, before epoch 1" in parsed(tmp_path / "one").text
    assert "is in the folder of the first of the run's loggers" in parsed(tmp_path / "two").text


class Killed(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise RuntimeError("out of memory")


def test_an_interrupted_run_says_that_it_has_not_ended(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_small(tmp_path, PFAPruning(energy=0.8, at_epoch=1), Killed(), logger=CSVLogger(tmp_path, "", ""))
    shown = parsed(tmp_path)
    assert "This run has not come to its end" in shown.text
    assert next(table for table in shown.tables if "after the cut" in table[0])[0][1:] == ["before", "after the cut", "change"]
    assert "Cut once, before epoch 1" in shown.text


def test_a_resumed_run_tells_the_cuts_of_the_run_before_it(tmp_path):
    fit_small(tmp_path / "first", two_cuts(), every_epoch(tmp_path), max_epochs=2, enable_checkpointing=True)
    then = tmp_path / "then"
    resumed = {"logger": CSVLogger(then, "", ""), "ckpt_path": tmp_path / "epoch=1.ckpt", "enable_checkpointing": True}
    fit_small(then, two_cuts(), every_epoch(then / "checkpoints"), max_epochs=4, **resumed)
    shown = parsed(then)
    assert [cells[0] for cells in shown.table("before epoch").values()] == ["1", "2"]
    assert list(shown.table("built with")) == ["net.0", "net.2", "net.4"]
    assert "load_pruned(Small, " in shown.text
    assert 'export(model, inputs, "model.onnx")' in shown.text


def test_a_network_that_was_cut_before_the_run_is_told_from_its_checkpoint(tmp_path):
    recipe = Recipe(keep={"net.0": (1, 2, 5, 9)}, method="by hand")
    fit_small(tmp_path, ApplyRecipe(recipe), every_epoch(tmp_path / "checkpoints"), enable_checkpointing=True)
    shown = parsed(tmp_path)
    assert "The network was cut to the recipe by hand." in shown.text
    before, after = 6 * 16 + 16 + 16 * 16 + 16 + 16 * 3 + 3, 6 * 4 + 4 + 4 * 16 + 16 + 16 * 3 + 3
    assert shown.table("kept")["numbers in the weights"][:2] == [str(before), str(after)]
    assert shown.table("built with")["net.0"][:2] == ["16", "4"]


# ---------------------------------------------------------------- the verb


def test_the_verb_writes_the_page(digits, tmp_path, capsys):
    main(["report", "--run", str(digits), "--out", str(tmp_path / "deep" / "page.html")])
    assert "Written to" in capsys.readouterr().out
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8") == page(Run.load(digits))
    main(["report", "--run", str(digits)])
    assert (digits / "report.html").exists()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "given", "said"),
    [
        ({}, "nowhere", "nowhere is not there; give the folder of a run."),
        ({"a.txt": ""}, "a.txt", "a.txt is a file; give the folder of a run."),
        ({"a/b.txt": ""}, "a", "a is not the folder of a run: it holds no logs, no checkpoints"),
        ({"runs/version_3/metrics.csv": "step,loss\n0,1\n"}, "runs", "Did you mean .*version_3?"),
        ({"run/compress/summary.json": "{}", "run/metrics.csv": ""}, "run/compress", "Did you mean .*run?"),
        ({"run/compress/summary.json": "{"}, "run", r"summary.json is damaged: Expecting"),
        ({"run/compress/summary.json": "{}"}, "run", "was not written by this version of lit-compress"),
        ({"run/compress/recipe.json": "[]"}, "run", "Expected a recipe"),
        ({"run/metrics.csv": "step,loss\n0,low\n"}, "run", "metrics.csv is not a file that a CSVLogger wrote: .*'low'"),
    ],
)  # fmt: skip
def test_what_is_not_a_run_is_refused_in_one_line(files, given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(SystemExit) as stopped:
        main(["report", "--run", given])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lit-compress: error: ")
    assert re.search(said, line), line
    assert not list(tmp_path.rglob("*.html"))


def test_the_table_of_a_cut_is_on_disk_as_rows(digits):
    with open(digits / "compress" / "cut_0_layers.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["body.0", "body.3", "head"]
    assert [int(row["channels"]) for row in rows] == [12, 12, 10]
