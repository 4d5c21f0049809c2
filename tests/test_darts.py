"""The published DARTS network: its wiring against one written out, its auxiliary head, and drop-path."""

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_compress import count_parameters
from lit_compress.callbacks import DropPathSchedule
from lit_compress.models import DARTS, DARTSOutput, DropPath, LeNet300100
from lit_compress.modules import LitClassifier

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_normal_cell_is_figure_4_written_out():
    cell = DARTS(channels=4, layers=3, num_classes=3).eval().cells[0]
    before, previous = torch.randn(2, 12, 8, 8), torch.randn(2, 12, 8, 8)
    s0, s1 = cell.preprocess0(before), cell.preprocess1(previous)
    op = cell.operations
    n0 = op[0](s0) + op[1](s1)  # two separable convolutions
    n1 = op[2](s0) + op[3](s1)  # two more
    n2 = op[4](s1) + s0
    n3 = s0 + op[7](n0)  # a dilated one
    torch.testing.assert_close(cell(before, previous), torch.cat((n0, n1, n2, n3), 1))
    kernels = [[m.kernel_size[0] for m in o.modules() if isinstance(m, nn.Conv2d)] for o in op]
    assert kernels == [[3, 1, 3, 1]] * 5 + [[], [], [3, 1]]
    assert [m.dilation for m in op[7].modules() if isinstance(m, nn.Conv2d)] == [(2, 2), (1, 1)]


def test_a_reduction_cell_is_figure_5_written_out():
    cell = DARTS(channels=4, layers=3, num_classes=3).eval().cells[1]
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    s0, s1 = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8)
    cell.preprocess0, cell.preprocess1 = nn.Identity(), nn.Identity()
    n0 = pool(s0) + pool(s1)
    n1 = n0 + pool(s1)
    n2 = pool(s0) + n0
    n3 = n0 + pool(s1)
    torch.testing.assert_close(cell(s0, s1), torch.cat((n0, n1, n2, n3), 1))


@pytest.mark.parametrize("layers", [3, 5, 8])
def test_two_cells_halve_the_map_and_double_the_channels(layers):
    network = DARTS(channels=4, layers=layers).eval()
    shapes = []
    for cell in network.cells:
        cell.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:3])))
    network(IMAGES)
    halved = [place for place, (_, side) in enumerate(shapes) if side < (shapes[place - 1][1] if place else 32)]
    assert halved == [layers // 3, 2 * layers // 3]
    assert shapes[-1] == (4 * 4 * 4, 8)


def test_the_auxiliary_head_speaks_in_training_only():
    network = DARTS(channels=4, layers=5, auxiliary=True)
    out = network(IMAGES)
    assert isinstance(out, DARTSOutput)
    assert out.logits.shape == out.auxiliary.shape == (2, 10)
    assert network.eval()(IMAGES).shape == (2, 10)
    assert count_parameters(network) > count_parameters(DARTS(channels=4, layers=5))


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    drop = DropPath(0.3)
    out = drop(torch.ones(4000, 2, 3, 3))
    samples = out.flatten(1)
    assert ((samples == 0).all(1) | (samples == 1 / 0.7).all(1)).all()
    assert out.mean().item() == pytest.approx(1, abs=0.04)  # three standard deviations of 4000 draws are .031
    assert torch.equal(drop.eval()(IMAGES), IMAGES)


def test_drop_path_is_set_for_all_branches_but_the_identities():
    network = DARTS(channels=4, layers=3, drop_path=0.1)
    network.set_drop_path(0.2)
    drops = [m for m in network.modules() if isinstance(m, DropPath)]
    assert {m.probability for m in drops} == {0.2}
    assert len(drops) == 6 + 5 + 5  # two identities in a normal cell, three in a reduction cell, of eight
    with pytest.raises(ValueError, match=r"in \[0, 1\) but got 1"):
        network.set_drop_path(1)
    with pytest.raises(ValueError, match="at least 3"):
        DARTS(layers=2)


# --- in a Trainer ----------------------------------------------------------------------------------------------------------

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
LOADER = DataLoader(TensorDataset(IMAGES, torch.tensor([1, 2])), batch_size=2)


class StopAfter(Callback):
    """Ends the training after an epoch."""

    def __init__(self, last):
        self.last = last

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch >= self.last


class Probabilities(Callback):
    """What the branches' probability is in each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, *args):
        (probability,) = {m.probability for m in pl_module.modules() if isinstance(m, DropPath)}
        self.seen.append(probability)


def test_drop_path_grows_linearly_over_the_epochs_and_goes_on_after_a_resume(tmp_path):
    def fit(last, **options):
        module, seen = LitClassifier(DARTS(channels=2, layers=3, auxiliary=True), num_classes=10), Probabilities()
        callbacks = [DropPathSchedule(0.2), seen, StopAfter(last)]
        trainer = Trainer(max_epochs=4, default_root_dir=tmp_path, callbacks=callbacks, **QUIET)
        trainer.fit(module, LOADER, **options)
        return trainer, seen.seen

    trainer, seen = fit(last=1)
    assert seen == pytest.approx([0, 0.05])
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    trainer, seen = fit(last=3, ckpt_path=tmp_path / "stopped.ckpt")
    assert seen == pytest.approx([0.1, 0.15])
    assert trainer.callback_metrics["train/drop_path"] == pytest.approx(0.15)


def test_a_drop_path_schedule_without_branches_or_epochs_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"\[0, 1\) but got 1"):
        DropPathSchedule(1)
    plain = LitClassifier(LeNet300100(in_features=3 * 32 * 32), num_classes=10)
    with pytest.raises(MisconfigurationException, match="has no DropPath"):
        Trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[DropPathSchedule()], **QUIET).fit(plain, LOADER)
    module = LitClassifier(DARTS(channels=2, layers=3), num_classes=10)
    with pytest.raises(MisconfigurationException, match="give the Trainer `max_epochs`"):
        Trainer(max_epochs=-1, max_steps=1, default_root_dir=tmp_path, callbacks=[DropPathSchedule()], **QUIET).fit(
            module, LOADER
        )


def test_the_classifier_adds_the_auxiliary_heads_loss_in_training_alone():
    module = LitClassifier(DARTS(channels=2, layers=3, auxiliary=True), num_classes=10, auxiliary_weight=0.4)
    labels = torch.tensor([1, 2])
    logged = {}
    module.log = lambda name, value, **options: logged.update({name: value})
    loss = module.training_step((IMAGES, labels), 0)
    out = module.net(IMAGES)  # batch norm in training goes by the batch alone
    ours, theirs = F.cross_entropy(out.logits, labels), F.cross_entropy(out.auxiliary, labels)
    torch.testing.assert_close(loss, ours + 0.4 * theirs)
    torch.testing.assert_close(logged["train/loss"], ours)
    torch.testing.assert_close(logged["train/auxiliary_loss"], theirs)
    module.eval()
    torch.testing.assert_close(module.validation_step((IMAGES, labels), 0), F.cross_entropy(module.net(IMAGES), labels))
    assert "val/auxiliary_loss" not in logged
    with pytest.raises(ValueError, match="`auxiliary_weight` must be 0 or more but got -1"):
        LitClassifier(module.net, num_classes=10, auxiliary_weight=-1)
