"""P1's networks of patches: their sizes, what they compute, what they learn from, and the boxes that they score."""

import json
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.nn import functional as F

from lit_compress import analyze, count_parameters, cut
from lit_compress.datamodules import PedestrianPatchDataModule, SyntheticPedestrianDataModule
from lit_compress.detection import ACFChannels, pedestrian_resnet
from lit_compress.losses import CrossEntropy, TeacherConfidence
from lit_compress.models import PreActResNet
from lit_compress.modules import LitDistiller
from lit_compress.pedestrians import Detections, Subset, evaluate, rescore, scenes_of, warp

COUNTS = json.loads((Path(__file__).parent / "reference" / "independent_vectors.json").read_text())["p1_param_counts"]


@pytest.mark.parametrize(("size", "key"), [("18", "resnet18"), ("thin", "thin"), ("small", "small")])
def test_the_students_have_the_published_sizes(size, key):
    """P1, table 2: 11 M, 2.8 M and, without batch norms, 157 K."""
    with torch.device("meta"):
        student = pedestrian_resnet(size)
    expected = COUNTS[key]
    norms = sum(count_parameters(module) for module in student.modules() if isinstance(module, nn.BatchNorm2d))
    shortcuts = sum(parameter.numel() for name, parameter in student.named_parameters() if "shortcut" in name)
    assert count_parameters(student) == expected["total"]
    assert norms == expected["bn_affine"]
    assert count_parameters(student) - norms == expected["total_no_bn"]
    assert shortcuts == expected["shortcut_conv1x1"]
    assert count_parameters(student.fc) == expected["fc"]


def test_the_teacher_has_the_published_size():
    """63 M. By hand: the stem, bottlenecks of 1×1, 3×3, 1×1, four 1×1 shortcuts, and two fully connected layers."""
    with torch.device("meta"):
        teacher = pedestrian_resnet("200", dropout=0.5)
    weights, channels = 3 * 49 * 64, 64
    for planes, blocks in ((64, 3), (128, 24), (256, 36), (512, 3)):
        weights += channels * 4 * planes
        for _ in range(blocks):
            weights += channels * planes + 9 * planes**2 + 4 * planes**2
            channels = 4 * planes
    weights += 2048 * 64 + 64 + 64 * 2 + 2
    norms = sum(count_parameters(module) for module in teacher.modules() if isinstance(module, nn.BatchNorm2d))
    assert count_parameters(teacher) == weights + norms == 62_748_546
    assert teacher.fc.dropout.p == 0.5


def norm(layer, x):
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_network_computes_what_is_written_out(depth):
    torch.manual_seed(0)
    network = PreActResNet(depth, num_classes=3, widths=(4, 6, 6, 8)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    x = torch.rand(2, 3, 64, 48)
    y = F.conv2d(x, network.conv1.weight, stride=2, padding=3)
    y = F.max_pool2d(norm(network.bn1, y).relu(), 3, 2, 1)
    for number in range(1, 5):
        for place, block in enumerate(network.get_submodule(f"stage{number}")):
            stride = 2 if number > 1 and place == 0 else 1
            first = norm(block.norm, y).relu()
            skip = y if block.shortcut is None else F.conv2d(first, block.shortcut.weight, stride=stride)
            assert (block.shortcut is None) == (place > 0 or (depth == 18 and number == 1))
            if depth == 18:
                z = F.conv2d(first, block.branch[0].weight, stride=stride, padding=1)
                y = skip + F.conv2d(norm(block.branch[1], z).relu(), block.branch[3].weight, padding=1)
            else:
                branch = block.branch[0]
                z = norm(branch.norm, F.conv2d(first, branch.reduce.weight)).relu()
                z = F.conv2d(z, branch.narrow.grouped.weight, stride=stride, padding=1)
                y = skip + F.conv2d(norm(branch.narrow.norm, z).relu(), branch.narrow.pointwise.weight)
    logits = network.fc(norm(network.norm, y).relu().mean((2, 3)))
    torch.testing.assert_close(network(x), logits, rtol=1e-4, atol=1e-4)  # sums of another order


def test_both_inputs_take_the_same_patches():
    patches = torch.rand(2, 3, 64, 64)
    colours, channels = pedestrian_resnet("small").eval(), pedestrian_resnet("small", inputs="acf", side=64).eval()
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(colours.inputs(patches), (patches - mean) / std)
    torch.testing.assert_close(channels.inputs(patches), ACFChannels(size=(64, 64))(patches))
    assert channels.conv1.weight.shape == (32, 10, 7, 7)
    assert colours(patches).shape == channels(patches).shape == (2, 2)


def test_boxes_are_scored_one_by_one():
    torch.manual_seed(0)
    student, image = pedestrian_resnet("small").train(), torch.randint(256, (3, 60, 80), dtype=torch.uint8)
    found = Detections.of([[5.0 * i, 3.0 * i, 10 + i, 24 + i, 1.0] for i in range(5)])
    scored = rescore(student, image, found, side=64, batch_size=2)
    assert student.training
    student.eval()
    for box, score in zip(found.boxes.tolist(), scored.scores, strict=True):
        (logits,) = student(warp(image, tuple(box), 64)[None])
        assert score == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)  # batches of another size
    assert np.array_equal(scored.boxes, found.boxes)
    assert rescore(student, image, Detections.of([]), side=64).scores.shape == (0,)
    with pytest.raises(ValueError, match=r"Expected logits \(5, 2\) of 5 patches but got \(5, 3\)"):
        rescore(PreActResNet(18, num_classes=3, widths=(2, 2, 2, 2)), image, found, side=64)


def test_a_student_learns_from_the_teacher_s_confidence_and_is_scored_by_the_protocol():
    streets = SyntheticPedestrianDataModule(size=(64, 96), heights=(16, 44), train_size=6, val_size=6, test_size=6)
    data = PedestrianPatchDataModule(streets, min_height=16.0, side=48, batch_size=8, batches=3)
    teacher, student = pedestrian_resnet("small", dropout=0.5, side=48), pedestrian_resnet("small", inputs="acf", side=48)
    losses = [TeacherConfidence("fc.hint", passes=80), CrossEntropy(weight=0.5)]
    distiller = LitDistiller(teacher, student, losses, copy_from_teacher=["fc.fc"])
    assert torch.equal(student.fc.fc.weight, teacher.fc.fc.weight)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, **quiet)
    run.fit(distiller, data)
    assert run.callback_metrics["train/teacher_confidence"] > 0
    images = streets.images("test")
    anywhere = np.random.default_rng(0).uniform(0, 40, (6, 2))
    given = [
        Detections.of([[*box, 1] for box in one.annotations.boxes] + [[*at, 16, 40, 1] for at in anywhere]) for one in images
    ]
    scored = [rescore(student, one.read(), found, side=48) for one, found in zip(images, given, strict=True)]
    curve = evaluate(scenes_of([one.annotations for one in images], scored), Subset(heights=(16.0, inf), bounds=None))
    assert curve.persons > 3
    assert 0 <= curve.log_average <= 1
    assert len(set(np.concatenate([one.scores for one in scored]).tolist())) > 20


def test_a_student_is_pruned():
    """A cut proves itself on the inputs, or raises."""
    torch.manual_seed(0)
    student = pedestrian_resnet("small", inputs="acf", side=64)
    batches = [torch.rand(16, 3, 64, 64) for _ in range(5)]
    recipe = analyze(student, batches).recipe(keep_params=0.6)
    assert any(layer.startswith("stage3") for layer in recipe.keep)
    cut(student, recipe, batches[0])
    assert count_parameters(student) <= 0.6 * 169_602
    assert student(batches[0]).shape == (16, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pedestrian_resnet("large"), r"one of \['200', '18', 'thin', 'small'\] but got 'large'"),
        (lambda: pedestrian_resnet("18", inputs="hog"), '"rgb" or "acf" but got \'hog\''),
        (lambda: PreActResNet(20), r"one of \[18, 34, 50, 101, 152, 200\] but got 20"),
        (lambda: PreActResNet(widths=(1, 2, 3)), "four numbers of channels"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
