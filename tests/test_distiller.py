"""The distiller: which weights move, what is logged and stored, how it resumes, in one process and in two."""

import copy

import pytest
import pytorch_lightning
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics.classification import MulticlassF1Score

from lit_compress import load_pruned, ranks
from lit_compress.callbacks import PFAPruning
from lit_compress.cli import main
from lit_compress.losses import (
    AttentionTransfer,
    CrossEntropy,
    Hint,
    KnowledgeDistillation,
    TeacherConfidence,
    attention_transfer,
    knowledge_distillation,
)
from lit_compress.models import ResNetCIFAR, SimpleCNN, with_hint
from lit_compress.modules import LitClassifier, LitDistiller
from lit_compress.modules.distiller import Accuracy
from lit_compress.taps import Taps
from tests.modules import digits, every_epoch, needs_averaging, new_trainer, same

TAPS = {"0": "stage1.0", "2": "stage3"}


def teacher_network(seed=3):
    torch.manual_seed(seed)
    return ResNetCIFAR(depth=8, width=4, in_channels=1)


def plain_student(seed=5):
    """No batch norm and no dropout, so that two halves of a batch are trained on as the whole is."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def terms():
    return [KnowledgeDistillation(alpha=0.5), AttentionTransfer(TAPS, beta=50)]


def distiller(losses=None, **options):
    options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9), **options}
    return LitDistiller(teacher_network(), plain_student(), losses=terms() if losses is None else losses, **options)


def loader(count=192, batch_size=32, **options):
    return DataLoader(digits(0, count), batch_size, **options)


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# ---------------------------------------------------------------- what a step does


def test_an_epoch_is_the_one_written_out_by_hand(tmp_path):
    module = distiller()
    trainer = new_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader(), loader(100))

    teacher, student = teacher_network().eval(), plain_student()
    student[1].inplace = False
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    totals = torch.zeros(4)
    for images, labels in loader():
        with torch.no_grad():
            theirs = [teacher.relu1(teacher.bn1(teacher.conv1(images)))]
            for stage in (teacher.stage1, teacher.stage2, teacher.stage3):
                theirs.append(stage(theirs[-1]))
            logits = teacher.fc(theirs[-1].mean((2, 3)))
        first = student[0](images)
        second = student[2](first.relu())
        parts = torch.stack(
            [
                knowledge_distillation(student[5](second.relu().flatten(1)), logits, labels, alpha=0.5),
                75 * attention_transfer(first, theirs[1]),
                75 * attention_transfer(second, theirs[3]),
            ]
        )
        optimizer.zero_grad()
        parts.sum().backward()
        optimizer.step()
        totals += torch.cat([parts.sum()[None], parts]).detach() / 6
    for name, value in student.state_dict().items():
        torch.testing.assert_close(module.student.state_dict()[name], value)
    logged = ["train/loss", "train/knowledge_distillation", "train/attention_transfer/0", "train/attention_transfer/2"]
    for name, value in zip(logged, totals, strict=True):
        assert trainer.callback_metrics[name].item() == pytest.approx(value.item(), rel=1e-4), name

    images, labels = (torch.stack([one[0] for one in digits(0, 100)]), torch.tensor([int(one[1]) for one in digits(0, 100)]))
    outputs = student(images)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(F.cross_entropy(outputs, labels).item(), rel=1e-4)
    assert trainer.callback_metrics["val/accuracy"].item() == pytest.approx((outputs.argmax(1) == labels).float().mean().item())
    assert set(trainer.callback_metrics) == {*logged, "val/loss", "val/accuracy"}


def test_the_teacher_is_left_out_of_everything(tmp_path):
    module = distiller()
    before = weights(module.teacher.network)
    keeper = ModelCheckpoint(tmp_path)
    trainer = new_trainer(tmp_path, keeper, enable_checkpointing=True, max_epochs=2)
    trainer.fit(module, loader(), loader(100))
    assert same(weights(module.teacher.network), before)
    assert not any(layer.training for layer in module.teacher.network.modules())
    assert module.student.training
    own = {id(parameter) for parameter in module.student.parameters()}
    assert {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]} == own
    assert {id(parameter) for parameter in module.parameters()} == own

    content = torch.load(keeper.best_model_path, weights_only=True)
    assert set(content["state_dict"]) == {f"student.{name}" for name in module.student.state_dict()}
    assert content["lit_compress"]["teacher"] == {
        "class": "lit_compress.models.resnet.ResNetCIFAR",
        "weights": None,
        "fingerprint": module.teacher.fingerprint,
    }


def test_the_student_loads_alone_and_as_part_of_another_module(tmp_path):
    module = distiller()
    trainer = new_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "distilled.ckpt")
    alone = load_pruned(plain_student(seed=9), tmp_path / "distilled.ckpt")
    assert same(weights(alone), weights(module.student))
    inside = LitDistiller(teacher_network(), plain_student(seed=9), student_weights=tmp_path / "distilled.ckpt")
    assert same(weights(inside.student), weights(module.student))


def test_weights_load_from_a_state_dict_and_from_a_classifiers_checkpoint(tmp_path):
    teacher = teacher_network(seed=8)
    torch.save(teacher.state_dict(), tmp_path / "plain.pt")
    classifier = LitClassifier(teacher, num_classes=10)
    trainer = new_trainer(tmp_path, max_epochs=0)
    trainer.fit(classifier, loader())
    trainer.save_checkpoint(tmp_path / "classifier.ckpt")
    for file in ("plain.pt", "classifier.ckpt"):
        module = LitDistiller(teacher_network(), plain_student(), teacher_weights=str(tmp_path / file))
        assert same(weights(module.teacher.network), weights(teacher)), file
        assert module.teacher_origin["weights"].endswith(file)
    with pytest.raises(ValueError, match="The weights do not fit ResNetCIFAR"):
        LitDistiller(ResNetCIFAR(depth=8, width=6, in_channels=1), plain_student(), teacher_weights=tmp_path / "plain.pt")


def test_a_hint_layer_is_matched_before_its_relu_and_the_classifier_is_the_teachers(tmp_path):
    teacher = with_hint(teacher_network(), width=6, dropout=0.5)
    student = with_hint(nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)), "3", width=6)
    module = LitDistiller(
        teacher,
        student,
        losses=[Hint("3.hint", "fc.hint"), TeacherConfidence("3.hint", "fc.hint", passes=30), CrossEntropy(weight=0.5)],
        copy_from_teacher={"3.fc": "fc.fc"},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),  # so that an epoch is of one network
    )
    assert same(weights(student[3].fc), weights(teacher.fc.fc))
    trainer = new_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader())
    images, labels = next(iter(loader(batch_size=192)))
    taps = Taps(teacher, ["fc.hint"])
    with taps.reading() as found:
        teacher(images)
    ours = student[:3](images) @ student[3].hint.weight.T + student[3].hint.bias
    assert (ours < 0).any()
    assert (found["fc.hint"] < 0).any()
    expected = {
        "train/hint": F.mse_loss(ours, found["fc.hint"]),
        "train/cross_entropy": 0.5 * F.cross_entropy(teacher.fc.fc(ours.relu()), labels),
    }
    for name, value in expected.items():
        assert trainer.callback_metrics[name].item() == pytest.approx(value.item(), rel=1e-4)
    assert trainer.callback_metrics["train/teacher_confidence"] > 0


def test_prediction_takes_samples_with_and_without_labels():
    module = distiller()
    images = torch.randn(3, 1, 8, 8)
    probabilities = module.predict_step(images, 0)
    torch.testing.assert_close(probabilities, module.student(images).softmax(1))
    assert torch.equal(module.predict_step((images, torch.zeros(3)), 0), probabilities)


def test_metrics_of_ones_own_are_logged_in_place_of_the_accuracy(tmp_path):
    module = distiller(metrics={"f1": MulticlassF1Score(10, average="macro")})
    trainer = new_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader(), loader(100))
    (results,) = trainer.test(module, loader(100), verbose=False)
    outputs = torch.cat(trainer.predict(module, loader(100)))
    labels = torch.cat([labels for _, labels in loader(100)])
    assert results["test/f1"] == pytest.approx(MulticlassF1Score(10, average="macro")(outputs, labels).item())
    assert set(results) == {"test/loss", "test/f1"}


def test_accuracy_leaves_out_what_is_not_labelled():
    accuracy = Accuracy()
    outputs = torch.randn(2, 3, 4, 5)
    labels = torch.randint(3, (2, 4, 5))
    labels[0, 0] = -100
    accuracy.update(outputs, labels)
    mask = labels != -100
    assert accuracy.compute().item() == pytest.approx((outputs.argmax(1)[mask] == labels[mask]).float().mean().item())


# ---------------------------------------------------------------- resume, averages, pruning


def fit(folder, module, epochs, ckpt_path=None):
    # A sampler that shuffles by the number of the epoch, as DDP's does: the order is no matter of the random state.
    data = digits(0, 192)
    order = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=4)
    trainer = new_trainer(folder, every_epoch(folder), enable_checkpointing=True, max_epochs=epochs)
    trainer.fit(module, DataLoader(data, 32, sampler=order), loader(100), ckpt_path=ckpt_path)
    return trainer


def test_a_resumed_run_is_the_one_that_never_stopped(tmp_path):
    def build():
        optimizer = {"optimizer": torch.optim.Adam, "scheduler": lambda one: torch.optim.lr_scheduler.StepLR(one, 1, 0.5)}
        return distiller([KnowledgeDistillation(), AttentionTransfer(TAPS), CrossEntropy()], **optimizer)

    whole = build()
    trainer = fit(tmp_path / "whole", whole, 4)
    fit(tmp_path / "part", build(), 2)
    resumed = build()
    again = fit(tmp_path / "part", resumed, 4, ckpt_path=tmp_path / "part" / "epoch=1.ckpt")
    assert same(weights(resumed), weights(whole))
    assert same(again.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())
    assert same(dict(again.callback_metrics), dict(trainer.callback_metrics))


def test_a_run_goes_on_with_the_same_teacher_alone(tmp_path):
    fit(tmp_path, distiller(), 1)
    other = LitDistiller(teacher_network(seed=4), plain_student(), losses=terms())
    with pytest.raises(ValueError, match=r"distilled from another teacher: lit_compress\.models\.resnet\.ResNetCIFAR"):
        fit(tmp_path, other, 2, ckpt_path=tmp_path / "epoch=0.ckpt")
    loaded = LitDistiller.load_from_checkpoint(
        tmp_path / "epoch=0.ckpt", teacher=teacher_network(), student=plain_student(seed=1), losses=terms()
    )
    assert same(weights(loaded.student), weights(load_pruned(plain_student(seed=2), tmp_path / "epoch=0.ckpt")))


@needs_averaging
def test_an_average_of_weights_holds_no_second_teacher(tmp_path):
    averaging = pytorch_lightning.callbacks.WeightAveraging()
    module = distiller()
    trainer = new_trainer(tmp_path, averaging, max_epochs=1)
    trainer.fit(module, loader())
    average = averaging._average_model
    assert average.module.teacher is module.teacher
    assert len(list(average.parameters())) == len(list(module.student.parameters()))


def test_a_student_is_pruned_while_it_learns(tmp_path):
    module = LitDistiller(
        teacher_network(),
        SimpleCNN(in_channels=1, width=8),
        losses=[KnowledgeDistillation(), AttentionTransfer({"features.relu5": "stage2"})],
    )
    pruning = PFAPruning(keep_params=0.5, at_epoch=1)
    trainer = new_trainer(tmp_path, pruning, max_epochs=2)
    trainer.fit(module, loader(), loader(100))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    full = sum(parameter.numel() for parameter in SimpleCNN(in_channels=1, width=8).parameters())
    assert sum(parameter.numel() for parameter in module.student.parameters()) <= 0.5 * full
    assert torch.load(tmp_path / "small.ckpt", weights_only=True)["lit_compress"].keys() == {"format", "plan", "teacher"}
    alone = load_pruned(SimpleCNN(in_channels=1, width=8), tmp_path / "small.ckpt").eval()
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(alone(images), module.student.eval()(images))


# ---------------------------------------------------------------- two processes


def train_on_ranks(folder, batch_size, same_teacher=True):
    size = ranks.world_size()
    several = {"strategy": "ddp", "devices": size} if size > 1 else {}
    torch.manual_seed(0)
    module = distiller(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.002, momentum=0.9))
    if not same_teacher:
        with torch.no_grad():
            module.teacher.network.fc.bias += ranks.rank()
    trainer = new_trainer(folder, max_epochs=3, **several)
    wrapped = []
    module.on_train_start = lambda: wrapped.append(len(list(trainer.strategy.model.parameters())))
    # Lightning's own sampler shuffles the training data of several processes, whatever the loader says.
    data = digits(0, 192)
    order = DistributedSampler(data, size, ranks.rank(), shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size, sampler=order), loader(100, 50))
    trainer.save_checkpoint(folder / "last.ckpt")
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return weights(module.student), logged, wrapped, [name for name in module.state_dict() if "student" not in name]


def test_two_processes_train_the_student_that_one_does(processes, tmp_path):
    alone, logged, wrapped, _ = train_on_ranks(tmp_path / "one", 32)
    for theirs, their_logged, their_wrapped, strangers in processes(2)(train_on_ranks, tmp_path / "two", 16):
        for name, value in alone.items():
            # Sums of another order, over 18 steps: a few units in the last place of float32.
            torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6)
        assert their_logged == pytest.approx(logged, rel=1e-4)
        assert their_wrapped == wrapped == [len(list(plain_student().parameters()))]
        assert not strangers
    content = torch.load(tmp_path / "two" / "last.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {f"student.{name}" for name in alone}


def fails_on_ranks(folder):
    with pytest.raises(ValueError, match="The ranks hold teachers of different weights"):
        train_on_ranks(folder, 16, same_teacher=False)


def test_ranks_with_different_teachers_are_refused(processes, tmp_path):
    processes(2)(fails_on_ranks, tmp_path)


# ---------------------------------------------------------------- any network, by names in a config


PAIRS = [
    ("resnet18", "layer2", "mobilenet_v3_small", "features.3"),
    ("vgg11", "features.10", "shufflenet_v2_x0_5", "stage2"),
    ("densenet121", "features.transition1", "efficientnet_b0", "features.3"),
    ("convnext_tiny", "features.1", "regnet_y_400mf", "trunk_output.block1"),
]
CONFIG = """
trainer: {{accelerator: cpu, fast_dev_run: true, enable_progress_bar: false, enable_model_summary: false, logger: false}}
model:
  class_path: lit_compress.modules.LitDistiller
  init_args:
    teacher: {{class_path: torchvision.models.get_model, init_args: {{name: {0}}}, dict_kwargs: {{num_classes: 10}}}}
    student: {{class_path: torchvision.models.get_model, init_args: {{name: {2}}}, dict_kwargs: {{num_classes: 10}}}}
    losses:
      - class_path: lit_compress.losses.KnowledgeDistillation
      - {{class_path: lit_compress.losses.AttentionTransfer, init_args: {{taps: {{{3}: {1}}}}}}}
    metrics: {{f1: {{class_path: torchmetrics.classification.MulticlassF1Score, init_args: {{num_classes: 10}}}}}}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
data: {{class_path: tests.test_distiller.Pictures}}
"""


class Pictures(LightningDataModule):
    """Four images of noise, large enough for networks made for ImageNet."""

    def train_dataloader(self):
        return DataLoader([(torch.randn(3, 64, 64), label) for label in range(4)], 4)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[2]}")
def test_torchvision_pairs_distil_by_names_in_yaml(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.format(*pair))
    main(["fit", "--config", "config.yaml"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"losses": []}, "`losses` must hold at least one term"),
        ({"losses": [AttentionTransfer({"0": "stagé1"})]}, "ResNetCIFAR has no layer 'stagé1' to read; perhaps 'stage1'"),
        ({"losses": [AttentionTransfer({"9": "stage1"})]}, "Sequential has no layer '9' to read"),
        ({"copy_from_teacher": {"5": "fc"}}, r"The teacher's layer 'fc' does not fit the student's '5'"),
        ({"copy_from_teacher": "fc"}, r"`copy_from_teacher` must list layers"),
        ({"scheduler_interval": "batch"}, "must be 'epoch' or 'step' but got 'batch'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_says_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=text):
        LitDistiller(teacher_network(), plain_student(), **arguments)


def test_networks_that_share_parameters_are_refused():
    network = plain_student()
    with pytest.raises(ValueError, match="Teacher and student share parameters"):
        LitDistiller(nn.Sequential(network), network)
    LitDistiller(copy.deepcopy(network), network)


def test_a_batch_with_too_few_readings_is_refused():
    batch = torch.zeros(2, 1, 8, 8), torch.zeros(2).long(), {"": torch.zeros(2, 10)}
    with pytest.raises(ValueError, match=r"\['stage1.0', 'stage3'\] are missing; it holds \[''\]"):
        distiller().training_step(batch, 0)


@pytest.mark.parametrize(
    ("classifier", "text"),
    [("fcc", "'fcc' is none of its layers"), ("stage1", "'stage1' is a Sequential"), ("", "'' is a ResNetCIFAR")],
)
def test_a_hint_layer_goes_before_a_fully_connected_one(classifier, text):
    with pytest.raises(ValueError, match=text):
        with_hint(teacher_network(), classifier)
