"""The classifier: what it logs, what its checkpoints hold, and the ways in which optimizer and schedule reach it."""

import pytest
import pytorch_lightning
import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningCLI
from sklearn.metrics import accuracy_score
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from lit_compress.datamodules import DigitsDataModule
from lit_compress.models import LeNet300100
from lit_compress.modules import LitClassifier

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def new_trainer(tmp_path, **options):
    return Trainer(default_root_dir=tmp_path, **QUIET, **options)


def digits_and_net(**options):
    torch.manual_seed(7)
    return DigitsDataModule(**options), LeNet300100(in_features=64)


def test_trains_the_digits_without_any_setting(tmp_path):
    digits, net = digits_and_net()
    classifier = LitClassifier(net, num_classes=10)
    trainer = new_trainer(tmp_path, max_epochs=6)
    trainer.fit(classifier, datamodule=digits)
    logged = {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    assert set(trainer.callback_metrics) == logged
    assert trainer.callback_metrics["train/accuracy"] > 0.9

    (results,) = trainer.test(classifier, datamodule=digits, verbose=False)
    assert results["test/accuracy"] > 0.9
    # 359 images in batches of 64: the last has 39, so a mean over batches would differ.
    batches = list(digits.test_dataloader())
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    with torch.no_grad():
        logits = net.eval()(images)
    assert set(results) == {"test/loss", "test/accuracy"}
    assert results["test/accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    assert results["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)

    probabilities = torch.cat(trainer.predict(classifier, datamodule=digits))
    torch.testing.assert_close(probabilities, logits.softmax(1))

    checkpoint = trainer.checkpoint_callback.best_model_path
    content = torch.load(checkpoint, weights_only=True)
    assert content["hyper_parameters"] == {
        "num_classes": 10,
        "label_smoothing": 0.0,
        "scheduler_interval": "epoch",
        "companions": None,
        "auxiliary_weight": 0.4,
        "input_dropout": 0.0,
    }
    loaded = LitClassifier.load_from_checkpoint(checkpoint, net=LeNet300100(in_features=64)).eval()
    torch.testing.assert_close(loaded(images), logits)


def test_training_accuracy_counts_every_batch_as_it_was_seen(tmp_path):
    """With a rate of 0 nothing changes during the epoch, so the logged figures are those of the network on the whole split."""
    digits, net = digits_and_net(train_size=150)
    classifier = LitClassifier(net, num_classes=10, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer = new_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(classifier, datamodule=digits)
    images, labels = (torch.cat(column) for column in zip(*digits.analysis_dataloader(), strict=True))
    logits = net(images)
    assert trainer.callback_metrics["train/accuracy"].item() == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_the_default_is_adam():
    (optimizer,) = [LitClassifier(LeNet300100(), num_classes=10).configure_optimizers()]
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert len(optimizer.param_groups[0]["params"]) == 6


def test_one_cycle_steps_with_every_batch(tmp_path):
    digits, net = digits_and_net(train_size=256)  # 4 batches
    classifier = LitClassifier(
        net,
        num_classes=10,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        scheduler=lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=8),
        scheduler_interval="step",
    )
    trainer = new_trainer(tmp_path, max_epochs=2, max_steps=7, enable_checkpointing=False)
    trainer.fit(classifier, datamodule=digits)

    alone = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    schedule = OneCycleLR(alone, max_lr=0.1, total_steps=8)
    for _ in range(7):
        alone.step()
        schedule.step()
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(alone.param_groups[0]["lr"])
    assert trainer.optimizers[0].param_groups[0]["momentum"] == pytest.approx(alone.param_groups[0]["momentum"])


def test_a_schedule_steps_with_every_epoch_by_default(tmp_path):
    digits, net = digits_and_net(train_size=128)
    classifier = LitClassifier(
        net,
        num_classes=10,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1),
    )
    trainer = new_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(classifier, datamodule=digits)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("plateau", "monitored"),
    [
        (lambda optimizer: ReduceLROnPlateau(optimizer), "val/loss"),
        (lambda optimizer: pytorch_lightning.cli.ReduceLROnPlateau(optimizer, monitor="train/loss"), "train/loss"),
    ],
)
def test_a_plateau_has_something_to_watch(plateau, monitored, tmp_path):
    digits, net = digits_and_net(train_size=128)
    classifier = LitClassifier(net, num_classes=10, scheduler=plateau)
    trainer = new_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(classifier, datamodule=digits)
    (schedule,) = trainer.lr_scheduler_configs
    assert schedule.monitor == monitored
    assert schedule.scheduler.best == pytest.approx(trainer.callback_metrics[monitored].item())


def test_labels_are_smoothed_in_training_alone():
    classifier = LitClassifier(LeNet300100(in_features=4), num_classes=10, label_smoothing=0.2)
    classifier.log = lambda *args, **kwargs: None
    batch = torch.randn(6, 4), torch.arange(6)
    log_probabilities = classifier(batch[0]).log_softmax(1)
    hard = -log_probabilities[torch.arange(6), batch[1]].mean()
    even = -log_probabilities.mean()
    torch.testing.assert_close(classifier.training_step(batch, 0), 0.8 * hard + 0.2 * even)
    torch.testing.assert_close(classifier.validation_step(batch, 0), hard)
    torch.testing.assert_close(classifier.test_step(batch, 0), hard)


def test_prediction_takes_samples_with_and_without_labels():
    classifier = LitClassifier(LeNet300100(in_features=4), num_classes=10)
    samples = torch.randn(6, 4)
    probabilities = classifier.predict_step(samples, 0)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(6))
    assert torch.equal(classifier.predict_step((samples, torch.zeros(6)), 0), probabilities)


CONFIG = """
seed_everything: 1
trainer: {accelerator: cpu, max_epochs: 2, logger: false, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: lit_compress.modules.LitClassifier
  init_args:
    net: {class_path: lit_compress.models.SimpleCNN, init_args: {num_classes: 2, in_channels: 1, width: 4}}
    num_classes: 2
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, nesterov: true, momentum: 0.9}}
    scheduler: {class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 0.1, total_steps: 8}}
    scheduler_interval: step
    label_smoothing: 0.1
data: {class_path: lit_compress.datamodules.DigitsDataModule, init_args: {classes: [3, 8]}}
"""


def test_a_config_builds_all_of_it_and_its_checkpoint_is_plain(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lit-compress"])
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    cli = LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path)],
    )
    assert type(cli.model) is LitClassifier
    optimizer = cli.trainer.optimizers[0]
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["nesterov"]
    assert optimizer.param_groups[0]["lr"] < 0.1  # after 8 of 8 steps the cycle has come down
    assert cli.trainer.global_step == 8
    content = torch.load(cli.trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert content["hyper_parameters"]["label_smoothing"] == 0.1
    assert not {"net", "optimizer", "scheduler"} & set(content["hyper_parameters"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_classes": 1}, r"`num_classes` must be at least 2 but got 1"),
        ({"num_classes": 10, "label_smoothing": 1.5}, r"`label_smoothing` must lie in \[0, 1\] but got 1.5"),
        ({"num_classes": 10, "scheduler_interval": "batch"}, r"`scheduler_interval` must be 'epoch' or 'step' but got 'batch'"),
    ],
)
def test_says_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=text):
        LitClassifier(LeNet300100(), **arguments)


def test_a_network_of_another_width_is_refused():
    classifier = LitClassifier(LeNet300100(in_features=4, num_classes=7), num_classes=10)
    with pytest.raises(ValueError, match=r"shape \(6, 10\), as `num_classes=10` says, but the network gave \(6, 7\)"):
        classifier.training_step((torch.zeros(6, 4), torch.zeros(6).long()), 0)
