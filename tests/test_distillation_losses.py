"""The losses of distillation against the authors' code, sums written out, and scipy; terms that name what they read."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from scipy.special import log_softmax, softmax
from torch import nn
from torch.autograd import gradcheck
from torch.distributions import Bernoulli, kl_divergence
from torch.nn import functional as F

from lit_compress.losses import (
    AttentionTransfer,
    CrossEntropy,
    Hint,
    KnowledgeDistillation,
    TeacherConfidence,
    Term,
    attention_transfer,
    hint,
    knowledge_distillation,
    score_divergence,
    teacher_confidence,
)
from lit_compress.losses.confidence import mahalanobis
from lit_compress.losses.terms import loss_parts, student_taps, teacher_for

REFERENCE = Path(__file__).parent / "reference"


def arrays(name):
    with np.load(REFERENCE / f"{name}.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored}


def figures(name):
    return json.loads((REFERENCE / f"{name}.json").read_text())


# ---------------------------------------------------------------- knowledge distillation


@pytest.mark.parametrize("case", figures("distillation_losses")["kd"], ids=lambda case: f"T={case['T']:g}")
@pytest.mark.parametrize(
    ("form", "key"), [("thesis", "thesis_eq41"), ("zagoruyko", "szagoruyko"), ("released", "moonshine")], ids=str
)
def test_knowledge_distillation_is_what_the_authors_code_computes(case, form, key):
    given = arrays("distillation_losses")
    loss = knowledge_distillation(
        given["kd_student"], given["kd_teacher"], given["kd_labels"], temperature=case["T"], alpha=case["alpha"], form=form
    )
    assert loss.item() == pytest.approx(case[key], rel=1e-6)  # float32 there as here


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.5, 8),
    alpha=st.floats(0, 1),
    positions=st.sampled_from([(), (3,), (2, 2)]),
)
def test_every_form_is_its_written_out_sum(seed, temperature, alpha, positions):
    draw = np.random.default_rng(seed)
    student, teacher = draw.normal(size=(2, 4, 5, *positions)) * 3
    labels = draw.integers(0, 5, size=(4, *positions))
    hard = -np.take_along_axis(log_softmax(student, 1), labels[:, None], 1).mean()
    soft_teacher, soft_student = softmax(teacher / temperature, 1), log_softmax(student / temperature, 1)
    cross = -(soft_teacher * soft_student).sum(1).mean()
    divergence = cross + (soft_teacher * np.log(soft_teacher)).sum(1).mean()
    expected = {
        "thesis": (1 - alpha) * hard + 2 * alpha * temperature**2 * cross,
        "zagoruyko": (1 - alpha) * hard + alpha * temperature**2 * divergence,
        "released": (1 - alpha) * hard + 2 * alpha * temperature**2 * divergence / 5,
        "paper": cross + alpha * hard,
    }
    for form, value in expected.items():
        arguments = map(torch.from_numpy, (student, teacher, labels))
        loss = knowledge_distillation(*arguments, temperature=temperature, alpha=alpha, form=form)
        assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-9)


def test_defaults_are_those_of_the_documents():
    student, teacher, labels = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])
    for form, temperature, alpha in [("thesis", 4, 0.9), ("zagoruyko", 4, 0.9), ("released", 4, 0.9), ("paper", 2, 0.5)]:
        chosen = knowledge_distillation(student, teacher, labels, temperature=temperature, alpha=alpha, form=form)
        assert torch.equal(knowledge_distillation(student, teacher, labels, form=form), chosen)


@pytest.mark.parametrize("form", ["thesis", "zagoruyko", "released", "paper"])
def test_knowledge_distillation_has_the_right_gradient_and_tells_student_from_teacher(form):
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1])
    assert gradcheck(
        lambda logits: knowledge_distillation(logits, teacher, labels, temperature=3, alpha=0.7, form=form),
        student.requires_grad_(),
    )
    swapped = knowledge_distillation(teacher, student, labels, form=form)
    assert not torch.isclose(knowledge_distillation(student, teacher, labels, form=form), swapped)


def test_unlabelled_positions_count_in_the_soft_part_alone():
    student, teacher = torch.randn(2, 1, 3, 4)
    labels = torch.tensor([[0, -100, 2, -100]])
    hard = knowledge_distillation(student, teacher, labels, alpha=0.0)
    torch.testing.assert_close(hard, F.cross_entropy(student[:, :, [0, 2]], labels[:, [0, 2]]))


# ---------------------------------------------------------------- attention transfer


def test_attention_transfer_is_what_the_authors_code_computes():
    given = arrays("distillation_losses")
    loss = attention_transfer(given["at_student_0"], given["at_teacher_0"])
    assert loss.item() == pytest.approx(figures("distillation_losses")["at_loss_0"]["moonshine"], rel=1e-5)


def test_attention_of_maps_of_different_sizes_is_compared_at_the_smaller_one():
    student, teacher = torch.rand(2, 3, 6, 4), torch.rand(2, 5, 3, 8)
    ours = np.zeros((2, 3, 4))
    theirs = np.zeros((2, 3, 4))
    for row in range(3):
        for column in range(4):
            ours[:, row, column] = student.square().mean(1)[:, 2 * row : 2 * row + 2, column].mean(1)
            theirs[:, row, column] = teacher.square().mean(1)[:, row, 2 * column : 2 * column + 2].mean(1)
    ours, theirs = (maps / np.sqrt((maps**2).sum((1, 2), keepdims=True)) for maps in (ours, theirs))
    assert attention_transfer(student, teacher).item() == pytest.approx(((ours - theirs) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("size", [(5,), (4, 3), (2, 3, 2)], ids=str)
def test_attention_transfer_has_the_right_gradient_and_sees_no_scale(size):
    student = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, *size, dtype=torch.float64)
    assert gradcheck(lambda maps: attention_transfer(maps, teacher), student)
    torch.testing.assert_close(attention_transfer(5 * student, teacher), attention_transfer(student, teacher))


def test_attention_of_a_silent_map_is_finite():
    silent = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_transfer(silent, torch.rand(2, 3, 4, 4))
    loss.backward()
    assert loss.item() == pytest.approx(1 / 16)  # of a map of unit norm over 16 positions, nothing is met
    assert silent.grad.isfinite().all()


# ---------------------------------------------------------------- yes-or-no scores


def test_the_divergence_of_scores_is_that_of_bernoulli_variables_with_a_bounded_gradient():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 6 * torch.randn(2, 2, 3, 4, 5, dtype=torch.float64, generator=generator)
    found = score_divergence(student.requires_grad_(), teacher)
    expected = kl_divergence(Bernoulli(logits=teacher), Bernoulli(logits=student)).mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    torch.testing.assert_close(student.grad, (student.detach().sigmoid() - teacher.sigmoid()) / 120)
    assert score_divergence(teacher, teacher) == 0
    assert score_divergence(student, teacher) != score_divergence(teacher, student)


# ---------------------------------------------------------------- hint and confidence


def test_hint_is_the_mean_square_and_has_the_right_gradient():
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    assert hint(student, teacher).item() == pytest.approx(((student - teacher) ** 2).sum().item() / 12)
    assert gradcheck(lambda values: hint(values, teacher), student.requires_grad_())


def test_confidence_meets_the_independent_vectors():
    given, expected = arrays("teacher_confidence"), figures("teacher_confidence")
    student = given["student"].requires_grad_()
    for one, distance in zip(student, expected["loss_per_sample_ddof1"], strict=True):
        # The default ridge adds 1e-8 of the mean variance to a smallest variance that is 4e-4 of it: 2.4e-5 of the distance.
        assert teacher_confidence(one[None], given["samples"]).item() == pytest.approx(distance, rel=3e-5)
        assert teacher_confidence(one[None], given["samples"], ridge=1e-13).item() == pytest.approx(distance, rel=1e-7)
    (gradient,) = torch.autograd.grad(teacher_confidence(student, given["samples"]), student)
    torch.testing.assert_close(5 * gradient[0].double(), torch.tensor(expected["grad_sample0_ddof1"]).double(), rtol=3e-5, atol=0)


def test_each_input_has_a_distribution_of_its_own():
    draw = np.random.default_rng(0)
    samples, student = draw.normal(size=(30, 4, 3)) @ draw.normal(size=(3, 3)), draw.normal(size=(4, 3))
    distances = [
        scipy_mahalanobis(one, theirs.mean(0), np.linalg.inv(np.cov(theirs.T))) ** 2
        for one, theirs in zip(student, samples.transpose(1, 0, 2), strict=True)
    ]
    loss = teacher_confidence(torch.from_numpy(student), torch.from_numpy(samples), ridge=1e-13)
    assert loss.item() == pytest.approx(np.mean(distances), rel=1e-9)


def test_confidence_has_the_right_gradient():
    samples = torch.randn(9, 2, 3, dtype=torch.float64)
    assert gradcheck(
        lambda values: teacher_confidence(values, samples), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(torch.zeros(10, 2, 4), id="never varies"),
        pytest.param(torch.full((10, 2, 4), 1e6), id="never varies far from zero"),
        pytest.param(torch.randn(10, 2, 1, generator=torch.Generator().manual_seed(0)).expand(10, 2, 4), id="rank one"),
        pytest.param(torch.randn(10, 2, 4, generator=torch.Generator().manual_seed(0)) * 1e-15, id="hardly varies"),
    ],
)
def test_a_singular_covariance_gives_numbers(samples, dtype):
    student = torch.randn(2, 4, dtype=dtype, requires_grad=True)
    loss = teacher_confidence(student, samples.to(dtype))
    loss.backward()
    assert loss.dtype == dtype
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("passes", [1, 3, 4])
def test_as_many_passes_as_dimensions_are_refused(passes):
    with pytest.raises(ValueError, match=rf"{passes} passes .* of 4 dimensions .* at least 5"):
        teacher_confidence(torch.zeros(2, 4), torch.randn(passes, 2, 4))
    assert teacher_confidence(torch.zeros(2, 4), torch.randn(5, 2, 4)).isfinite()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: knowledge_distillation(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long()), r"\(2, 3\) and \(2, 4\)"),
        (lambda: knowledge_distillation(*torch.zeros(2, 2, 3), torch.zeros(2).long(), temperature=0), "positive but got 0"),
        (lambda: knowledge_distillation(*torch.zeros(2, 2, 3), torch.zeros(2).long(), alpha=1.5), r"\[0, 1\] but got 1.5"),
        (lambda: knowledge_distillation(*torch.zeros(2, 2, 3), torch.zeros(2).long(), form="hinton"), "'paper' but got 'hinton'"),
        (lambda: attention_transfer(torch.zeros(2, 3), torch.zeros(2, 3)), r"Tap layers that give maps"),
        (lambda: attention_transfer(torch.zeros(2, 3, 4), torch.zeros(3, 3, 4)), r"of one batch but got shapes \(2, 3, 4\)"),
        (lambda: hint(torch.zeros(2, 3), torch.zeros(2, 4)), r"\(2, 3\) and \(2, 4\)"),
        (lambda: score_divergence(torch.zeros(2, 3), torch.zeros(2, 4)), r"logits of one shape but got \(2, 3\) and \(2, 4\)"),
        (lambda: mahalanobis(torch.zeros(2, 3), torch.zeros(3, 3), torch.eye(3).expand(3, 3, 3)), r"\(2, 3\), \(3, 3\)"),
        (lambda: teacher_confidence(torch.zeros(2, 3), torch.randn(9, 2, 3), ridge=0), "`ridge` must be positive but got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_says_what_is_wrong(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# ---------------------------------------------------------------- terms


class Tiny(nn.Module):
    """Maps, a hint layer with an in-place ReLU behind it, dropout in the middle."""

    def __init__(self, width=3):
        super().__init__()
        self.maps = nn.Conv2d(1, width, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.hint = nn.Linear(width * 16, 4)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        return self.fc(self.relu(self.hint(self.drop(self.maps(images).flatten(1)))))


def test_terms_add_up_to_what_their_functions_give():
    terms = [
        KnowledgeDistillation(temperature=2, alpha=0.3, form="zagoruyko", weight=2.0),
        CrossEntropy(weight=0.5, label_smoothing=0.1),
        AttentionTransfer(["maps"], beta=10),
        Hint("hint", weight=3.0),
        TeacherConfidence("hint", passes=20, ridge=0.1, name="sure"),
    ]
    teacher = teacher_for(Tiny(6), terms)
    images, labels = torch.randn(2, 1, 4, 4), torch.tensor([1, 4])
    theirs = teacher.read(images)
    assert set(theirs) == {"", "maps", "hint", "mean(hint)", "covariance(hint)"}
    assert student_taps(terms) == ("", "maps", "hint")
    ours = {"": torch.randn(2, 5), "maps": torch.randn(2, 3, 4, 4), "hint": torch.randn(2, 4)}
    expected = {
        "knowledge_distillation": 2
        * knowledge_distillation(ours[""], theirs[""], labels, temperature=2, alpha=0.3, form="zagoruyko"),
        "cross_entropy": 0.5 * F.cross_entropy(ours[""], labels, label_smoothing=0.1),
        "attention_transfer/maps": 30 * attention_transfer(ours["maps"], theirs["maps"]),
        "hint": 3 * hint(ours["hint"], theirs["hint"]),
        "sure": mahalanobis(ours["hint"], theirs["mean(hint)"], theirs["covariance(hint)"], ridge=0.1),
    }
    parts = loss_parts(terms, ours, theirs, labels)
    assert list(parts) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value)


@pytest.mark.parametrize(("count", "weight"), [(3, 1000), (4, 750), (5, 600)])
def test_attention_is_weighed_by_the_number_of_its_taps(count, weight):
    """The document's figures for ImageNet and for ERFNet's decoder."""
    assert AttentionTransfer([f"stage{index}" for index in range(count)]).weight == weight


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CrossEntropy(weight=-1), "`weight` must be 0 or more but got -1"),
        (lambda: CrossEntropy(label_smoothing=2), r"\[0, 1\] but got 2"),
        (lambda: AttentionTransfer([]), "must name at least one layer"),
        (lambda: AttentionTransfer("layer1"), r"must list layers, .* but got 'layer1'"),
        (lambda: TeacherConfidence("hint", passes=0), "`passes` must be positive but got 0"),
        (
            lambda: teacher_for(Tiny(), [TeacherConfidence("hint", passes=9), TeacherConfidence("fc", passes=10, name="b")]),
            re.escape("share their passes, but they ask for [9, 10]"),
        ),
        (
            lambda: loss_parts([CrossEntropy(), CrossEntropy()], {"": torch.zeros(1, 2)}, {}, torch.tensor([0])),
            "Two terms of the loss are called 'cross_entropy'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_terms_say_what_is_wrong(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_term_of_ones_own_may_hold_parameters():
    class Regressed(Term):
        def __init__(self):
            super().__init__(["hint"], ["hint"])
            self.bridge = nn.Linear(2, 4)

        def forward(self, student, teacher, labels):
            return hint(self.bridge(student["hint"]), teacher["hint"])

    term = Regressed()
    ours, theirs = {"hint": torch.randn(3, 2)}, {"hint": torch.randn(3, 4)}
    parts = term.parts(ours, theirs, None)
    parts["regressed"].backward()
    assert term.bridge.weight.grad.abs().sum() > 0


def test_channels_that_come_last_are_refused_or_moved():
    student, teacher = torch.rand(2, 4, 7, 7), torch.rand(2, 96, 7, 7)
    last = teacher.movedim(1, -1)
    with pytest.raises(ValueError, match=r"got \(7, 7\) and \(7, 96\) positions.*`teacher_channels=\"last\"`"):
        attention_transfer(student, last)
    term = AttentionTransfer(["stage"], teacher_channels="last")
    assert term({"stage": student}, {"stage": last}, None)["stage"] == attention_transfer(student, teacher)
    with pytest.raises(ValueError, match="`student_channels` must be 'first' or 'last' but got 'C'"):
        AttentionTransfer(["stage"], student_channels="C")


def test_a_part_that_has_no_weight_needs_no_labels():
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    labels = torch.tensor([0, 1, 2])
    for form, alpha in [("thesis", 1.0), ("zagoruyko", 1.0), ("released", 1.0), ("paper", 0.0)]:
        alone = knowledge_distillation(student, teacher, None, alpha=alpha, form=form)
        assert alone == knowledge_distillation(student, teacher, labels, alpha=alpha, form=form)
        assert not KnowledgeDistillation(alpha=alpha, form=form).reads_labels
        assert KnowledgeDistillation(form=form).reads_labels
        with pytest.raises(ValueError, match="needs labels but got None"):
            knowledge_distillation(student, teacher, None, form=form)
