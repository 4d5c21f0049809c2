"""The Region of Interest Autoencoder beside any detector: by the loss written out, resumed, cut, on ranks, and then gone."""

import copy
from itertools import pairwise

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.models import detection

from lit_compress.callbacks import MagnitudePruning, PFAPruning, RoIAutoencoder
from lit_compress.detection import Autoencoders, box_masks
from lit_compress.detection.encoder import follow
from lit_compress.detection.pictures import plot_reconstructions
from lit_compress.detection.roi_autoencoder import END_TO_END, EncoderTaps
from lit_compress.detection.targets import Annotated, Resizing, annotated, boxes_on_input, resizing
from tests.detectors import LAYERS, Squares, TinyDetector, Wrapped, listed, squares, stacked
from tests.modules import every_epoch, new_trainer, same
from tests.test_ddp import ddp_trainer

QUIET = {"draw_every_n_epochs": None}
FIXED = {"intermediate": (2e-4, 3e-4), "end_to_end": 1e-4, "dropout": 0.0, **QUIET}


def fit(folder, *callbacks, module=None, loader=None, ckpt_path=None, seed=5, **options):
    seed_everything(seed, verbose=False)
    module = TinyDetector() if module is None else module
    trainer = new_trainer(folder, *callbacks, **{"max_epochs": 2, **options})
    trainer.fit(module, squares() if loader is None else loader, ckpt_path=ckpt_path)
    return module, trainer


class Keeps(Callback):
    """Each batch, and module and decoders right before the first."""

    def __init__(self, roiae):
        self.roiae, self.batches = roiae, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.batches:
            self.module, self.decoders = copy.deepcopy((pl_module, self.roiae.autoencoders))
            vars(self.module).pop("training_step")
        self.batches.append(batch)


def by_hand(module, decoders, batches, mask=True, detach=True):
    """Plain PyTorch: one SGD over detector and decoders, equation 3.3.4 for the loss. Returns what was added in each step."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*trained, *decoders.parameters()], 0.05, momentum=0.9, weight_decay=1e-3)
    first, second = decoders.decoders
    added = []
    for images, targets in batches:
        own = module.training_step((images, targets), 0)
        maps = [images]
        for layer in module.body:
            maps.append(layer(maps[-1]))
        # The norms have moved their running statistics once more than they should, which training does not read.
        f1, before_pool, f2, f3 = maps[3], maps[6], maps[7], maps[10]
        switches = {"body.6": F.max_pool2d(before_pool, 2, return_indices=True)[1]}
        g3 = second(f3, f2.shape[2:], switches)
        pairs = [(f1, first(f2, f1.shape[2:], switches), 1), (f2, g3, 2), (f1, first(g3, f1.shape[2:], switches), 1)]
        total = own
        for weight, (target, made, stride) in zip((2e-4, 3e-4, 1e-4), pairs, strict=True):
            inside = box_masks([t["boxes"] for t in targets], target.shape[2:], (stride, stride)).expand_as(target)
            inside = inside if mask else torch.ones_like(inside)
            target = target.detach() if detach else target
            total = total + weight * F.smooth_l1_loss(made[inside], target[inside], reduction="sum") / len(images)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        added.append((total - own).item())
    return added


@pytest.mark.parametrize("options", [{}, {"mask": False}, {"detach_targets": False}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_an_epoch_is_the_one_written_out_by_hand(options, frozen, tmp_path):
    roiae = RoIAutoencoder(LAYERS, **FIXED, **options)
    keeps = Keeps(roiae)
    seed_everything(5, verbose=False)
    module, trainer = fit(tmp_path, roiae, keeps, module=TinyDetector(frozen), max_epochs=1)
    added = by_hand(keeps.module, keeps.decoders, keeps.batches, options.get("mask", True), options.get("detach_targets", True))
    expected = dict(keeps.module.named_parameters())
    torch.testing.assert_close(dict(module.named_parameters()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(roiae.autoencoders.state_dict(), keeps.decoders.state_dict(), rtol=1e-5, atol=1e-6)
    logged = sum(float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/roiae/"))
    assert logged == pytest.approx(sum(added) / len(added), rel=1e-4)
    assert all(value > 0 for value in added)
    assert {f"train/roiae/{name}" for name in ("body.6", "body.9", END_TO_END)} <= trainer.callback_metrics.keys()


def test_what_is_frozen_gets_no_gradient_and_the_shared_layers_do(tmp_path):
    gradients = {}

    class Looks(Callback):
        def on_after_backward(self, trainer, pl_module):
            gradients.update({name: parameter.grad for name, parameter in pl_module.named_parameters()})

    class SilentHead(TinyDetector):
        """Its own loss has no gradient, so that all there is comes from the autoencoder."""

        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

    fit(tmp_path, RoIAutoencoder(LAYERS, **FIXED), Looks(), module=SilentHead(frozen=True), max_epochs=1, limit_train_batches=1)
    assert all(gradients[f"body.{layer}.weight"] is None for layer in (0, 1))
    assert all(gradients[f"body.{layer}.weight"].abs().max() > 0 for layer in (3, 4, 7, 9))
    assert gradients["head.weight"].abs().max() == 0


@pytest.mark.parametrize("balance", [None, 0.2])
def test_images_without_boxes_give_zero(balance, tmp_path):
    loader = squares(collate_fn=lambda samples: stacked([(image, {"boxes": torch.zeros(0, 4)}) for image, _ in samples]))
    # Dropout would draw random numbers, and images would come in another order in the second epoch.
    with_it, trainer = fit(tmp_path, RoIAutoencoder(LAYERS, balance=balance, dropout=0.0, **QUIET), loader=loader)
    without, _ = fit(tmp_path, loader=loader)
    assert same(dict(with_it.state_dict()), dict(without.state_dict()))
    assert all(value == 0 for name, value in trainer.callback_metrics.items() if name.startswith("train/roiae/"))


def test_nothing_is_left_behind(tmp_path):
    roiae = RoIAutoencoder(LAYERS, balance=0.1, **QUIET)
    module, _ = fit(tmp_path, roiae, every_epoch(tmp_path), enable_checkpointing=True)
    baseline, _ = fit(tmp_path / "plain", every_epoch(tmp_path / "plain"), enable_checkpointing=True)
    assert list(module.state_dict()) == list(baseline.state_dict())
    assert "training_step" not in vars(module)
    assert [name for name, _ in module.named_modules()] == [name for name, _ in baseline.named_modules()]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    ours, theirs = (torch.load(folder / "epoch=0.ckpt", weights_only=True) for folder in (tmp_path, tmp_path / "plain"))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    assert ours["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]
    again = TinyDetector.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    fit(tmp_path / "on", ckpt_path=tmp_path / "epoch=0.ckpt")  # the run goes on without it


def test_an_epoch_that_fails_leaves_nothing_either(tmp_path):
    class Fails(TinyDetector):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ValueError("of its own")
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(ValueError, match=r"^of its own$"):
        fit(tmp_path, RoIAutoencoder(LAYERS, **QUIET), module=module)
    assert "training_step" not in vars(module)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(precision, tmp_path):
    """With dropout in detector and decoders, shuffling, clipping, and weights that are still being measured when it stops."""
    options = {"max_epochs": 3, "precision": precision, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    make = lambda: RoIAutoencoder(LAYERS, balance=0.3, balance_batches=4, balance_every=3, **QUIET)  # noqa: E731
    whole, stays = TinyDetector(dropout=0.2), make()
    whole, _ = fit(tmp_path, stays, every_epoch(tmp_path), module=whole, enable_checkpointing=True, **options)
    resumed, goes_on = TinyDetector(dropout=0.2), make()
    fit(tmp_path / "2", goes_on, module=resumed, ckpt_path=tmp_path / "epoch=0.ckpt", seed=99, **options)
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert same(dict(stays.autoencoders.state_dict()), dict(goes_on.autoencoders.state_dict()))
    assert stays.weights == goes_on.weights
    assert len(stays.balances) == 4


def test_the_middle_of_an_epoch_is_resumed_as_well(tmp_path):
    """Lightning begins with the epoch's first batch once more, so all are alike; dropout, in detector and decoders, is not."""
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"loader": DataLoader([Squares()[number % 3] for number in range(12)], 3, collate_fn=stacked)}
    whole, stays = TinyDetector(dropout=0.2), RoIAutoencoder(LAYERS, **QUIET)
    fit(tmp_path, stays, saves, module=whole, enable_checkpointing=True, **options)
    resumed, goes_on = TinyDetector(dropout=0.2), RoIAutoencoder(LAYERS, **QUIET)
    fit(tmp_path / "2", goes_on, module=resumed, ckpt_path=tmp_path / "step=6.ckpt", seed=99, **options)
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert same(dict(stays.autoencoders.state_dict()), dict(goes_on.autoencoders.state_dict()))


def test_a_second_fit_of_the_same_trainer_goes_on_with_the_decoders(tmp_path):
    roiae = RoIAutoencoder(LAYERS, **QUIET)
    module, trainer = fit(tmp_path, roiae, max_epochs=1)
    held = roiae.autoencoders
    trainer.fit_loop.max_epochs = 2
    before = copy.deepcopy(dict(held.state_dict()))
    trainer.fit(module, squares())
    assert roiae.autoencoders is held
    assert not same(dict(held.state_dict()), before)
    fit(tmp_path, roiae, max_epochs=1)  # and another run begins anew
    assert roiae.autoencoders is not held


# ---------------------------------------------------------------- optimizers


class AtEachStep(Callback):
    """Runs a function right before each step of the optimizer."""

    def __init__(self, function):
        self.function = function

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.function(trainer, optimizer)


def test_the_decoders_optimizer_is_like_the_modules_own_at_every_step(tmp_path):
    roiae, seen = RoIAutoencoder(LAYERS, **QUIET), []

    def look(trainer, theirs):
        ours = roiae.own_optimizer
        assert type(ours) is type(theirs)
        assert ours.param_groups[0]["momentum"], ours.param_groups[0]["weight_decay"] == (0.9, 1e-3)
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        seen.append(ours.param_groups[0]["lr"])

    fit(tmp_path, roiae, AtEachStep(look))
    assert seen == [0.05] * 4 + [0.025] * 4


def test_an_optimizer_of_ones_own_trains_the_decoders(tmp_path):
    roiae = RoIAutoencoder(LAYERS, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.0), **QUIET)
    keeps = Keeps(roiae)
    fit(tmp_path, roiae, keeps)
    assert isinstance(roiae.own_optimizer, torch.optim.Adam)
    assert same(dict(roiae.autoencoders.state_dict()), dict(keeps.decoders.state_dict()))


@pytest.mark.parametrize("kind", ["LBFGS", "Odd"])
def test_an_optimizer_that_cannot_be_made_again_is_refused(kind, tmp_path):
    class Odd(torch.optim.SGD):
        def __init__(self, params, *, needed):
            super().__init__(params, lr=0.1)

    class Module(TinyDetector):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters()) if kind == "LBFGS" else Odd(self.parameters(), needed=1)

    with pytest.raises(MisconfigurationException, match=f"{kind} can.*Give RoIAutoencoder an"):
        fit(tmp_path, RoIAutoencoder(LAYERS, **QUIET), module=Module())


# ---------------------------------------------------------------- balance


def test_the_balance_gives_every_term_the_share_that_is_asked_for(tmp_path):
    """Measured once more on the very batch, with the decoders as they were: one batch, hence the exact share."""
    roiae = RoIAutoencoder(LAYERS, balance=0.3, balance_batches=1, dropout=0.0, **QUIET)
    keeps = Keeps(roiae)
    fit(tmp_path, roiae, keeps, max_epochs=1, limit_train_batches=1, loader=squares(4))
    module, autoencoders, (images, targets) = keeps.module, keeps.decoders, keeps.batches[0]
    shared = [module.body[layer].weight for layer in (0, 3, 7, 9)]
    with EncoderTaps(module, autoencoders).reading() as reading:
        own = module.training_step((images, targets), 0)

    def length(loss):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) if g is not None]
        ).norm()

    for name, made in autoencoders(reading, autoencoders.terms).items():
        mask = box_masks([one["boxes"] for one in targets], made.target.shape[2:], made.stride).expand_as(made.target)
        loss = F.smooth_l1_loss(made.made[mask], made.target.detach()[mask], reduction="sum") / len(images)
        assert (roiae.weights[name] * length(loss) / length(own)).item() == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize("every", [None, 2])
def test_weights_go_by_the_first_batches_and_then_by_one_in_so_many(every, tmp_path):
    """Four batches an epoch, each with boxes: three are measured, then every second one if that is asked for."""
    roiae = RoIAutoencoder(LAYERS, balance=0.3, balance_batches=3, balance_every=every, end_to_end=0.0, **QUIET)
    seen = []

    class Notes(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append((dict(roiae.weights), list(roiae.balances)))

    fit(tmp_path, roiae, Notes())
    assert list(seen[0][0]) == ["body.6", "body.9"]
    changed = [number for number, (before, after) in enumerate(pairwise(seen), start=1) if before[0] != after[0]]
    assert changed == [1, 2] + ([] if every is None else [4, 6])
    assert [len(balances) for _, balances in seen[:4]] == [1, 2, 3, 3]
    first, last = seen[2][1], seen[-1][1]
    assert last == first if every is None else last[0] == first[2]


def test_the_shares_are_told(tmp_path):
    logged = {}
    outlets = "lit_compress.callbacks.loggers.Outlets.values"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outlets, lambda self, values: logged.update(values))
        roiae = RoIAutoencoder(LAYERS, **QUIET)
        fit(tmp_path, roiae, max_epochs=1)
    shares = roiae.balances[0].shares(roiae.weights)
    assert logged == {f"roiae/weight/{name}": weight for name, weight in roiae.weights.items()} | {
        f"roiae/gradient_share/{name}": share for name, share in shares.items()
    }
    assert all(0 < share < 0.01 for share in shares.values())  # the document's weights do next to nothing on small images


# ---------------------------------------------------------------- cuts


@pytest.mark.parametrize("at_once", [True, False])
def test_decoders_and_their_momentum_follow_a_cut(at_once, tmp_path):
    """Channels that are gone are gone from both sides of each mirrored convolution; the rest is as it was."""
    roiae = RoIAutoencoder(LAYERS, **QUIET)
    prunes = MagnitudePruning(keep_channels=0.6, at_epoch=1, evaluate=False, loader="train")

    class Looks(Callback):
        """Decoders and their momentum before and after the cut."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.before = held()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 0):
                self.after = held()

    def held():
        state = roiae.own_optimizer.state
        found = roiae.autoencoders.named_parameters()
        return {name: (p.detach().clone(), state[p]["momentum_buffer"].clone()) for name, p in found}

    looks = Looks()
    module, trainer = fit(tmp_path, *((roiae, prunes) if at_once else (prunes, roiae)), looks, max_epochs=2)
    keep = {layer: list(channels) for layer, channels in prunes.reports[-1].recipe.keep.items()}
    assert {"body.0", "body.3", "body.7"} <= keep.keys()
    # Decoder 0 undoes conv 3, ReLU, pool; decoder 1 undoes conv 7, ReLU, conv 9.
    c0, c3, c7 = keep["body.0"], keep["body.3"], keep["body.7"]
    c9 = keep.get("body.9", list(range(10)))
    expected = {
        "decoders.0.layers.0.weight": lambda t: t[c3][:, c0], "decoders.0.layers.0.bias": lambda t: t[c0],
        "decoders.0.layers.1.weight": lambda t: t[c3],
        "decoders.1.layers.0.weight": lambda t: t[c7][:, c3], "decoders.1.layers.0.bias": lambda t: t[c3],
        "decoders.1.layers.1.weight": lambda t: t[c7],
        "decoders.1.layers.2.weight": lambda t: t[c9][:, c7], "decoders.1.layers.2.bias": lambda t: t[c7],
    }  # fmt: skip
    assert expected.keys() == looks.after.keys()
    for name, take in expected.items():
        for before, after in zip(looks.before[name], looks.after[name], strict=True):
            assert torch.equal(after, take(before)), name
    assert float(trainer.callback_metrics["train/roiae/end_to_end"]) > 0
    assert module.body[3].out_channels == len(c3) < 8


class Mobile(TinyDetector):
    def __init__(self, **options):
        super().__init__(**options)
        self.body[7] = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.body[9] = nn.Conv2d(8, 10, 1)


def test_depthwise_layers_are_followed(tmp_path):
    roiae = RoIAutoencoder(LAYERS, **QUIET)
    module, trainer = fit(tmp_path, MagnitudePruning(keep_channels=0.6, at_epoch=1, evaluate=False), roiae, module=Mobile())
    layer = roiae.autoencoders.decoders[1].layers["0"]
    assert layer.groups == layer.in_channels == layer.out_channels == module.body[7].groups < 8
    assert float(trainer.callback_metrics["train/roiae/body.9"]) > 0


@pytest.mark.parametrize("kind", [TinyDetector, Mobile])
def test_a_run_that_was_cut_is_resumed_bit_for_bit(kind, tmp_path):
    make = lambda: (PFAPruning(energy=0.8, at_epoch=1, evaluate=False), RoIAutoencoder(LAYERS, balance=0.2, **QUIET))  # noqa: E731
    options = {"max_epochs": 4}
    callbacks = make()
    seed_everything(5, verbose=False)
    whole, _ = fit(tmp_path, *callbacks, every_epoch(tmp_path), module=kind(), enable_checkpointing=True, **options)
    assert whole.body[3].out_channels < 8
    for epoch in (0, 1, 2):
        resumed, again = kind(), make()
        fit(tmp_path / "2", *again, module=resumed, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", seed=99, **options)
        assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
        assert same(dict(callbacks[1].autoencoders.state_dict()), dict(again[1].autoencoders.state_dict()))


@pytest.mark.parametrize(
    ("options", "text"),
    [({"max_drop": 1.0, "monitor": "val/loss", "mode": "min"}, "max_drop"), ({"skips": "pad"}, "skips='pad'")],
)
def test_cuts_that_decoders_cannot_follow_are_refused(options, text, tmp_path):
    with pytest.raises(MisconfigurationException, match=f"`{text}` of PFAPruning"):
        fit(tmp_path, RoIAutoencoder(LAYERS, **QUIET), PFAPruning(energy=0.9, at_epoch=1, **options))


# ---------------------------------------------------------------- several processes


def train_on_rank(folder, kind):
    """Train one epoch; rank 1 sees no box at all in one batch."""
    roiae = RoIAutoencoder(LAYERS, **{**FIXED, **({"balance": 0.2, "balance_batches": 2} if kind == "balance" else {})})
    seed_everything(7, verbose=False)  # Lightning seeds the processes of DDP by it once more
    module = TinyDetector()
    trainer = ddp_trainer(folder, roiae, max_epochs=2)
    data = Squares(12)
    loader = DataLoader(data, 3, sampler=DistributedSampler(data, shuffle=False), collate_fn=stacked)
    trainer.fit(module, loader)
    weights = {name: value.detach().clone() for name, value in module.named_parameters()}
    decoders = {name: value.detach().clone() for name, value in roiae.autoencoders.state_dict().items()}
    return weights, decoders, roiae.weights


@pytest.mark.parametrize("kind", ["fixed", "balance"])
def test_ranks_train_the_same_decoders(kind, processes, tmp_path):
    (ours, our_decoders, our_weights), (theirs, their_decoders, their_weights) = processes(2)(train_on_rank, tmp_path, kind)
    assert same(ours, theirs)
    assert same(our_decoders, their_decoders)
    assert our_weights == their_weights
    assert all(weight > 0 for weight in our_weights.values())


class NoNorms(TinyDetector):
    def __init__(self):
        super().__init__()
        self.body[1] = self.body[4] = nn.Identity()


def train_without_norms(folder, size):
    roiae = RoIAutoencoder(LAYERS, **FIXED)
    seed_everything(7, verbose=False)  # Lightning seeds the processes of DDP by it once more
    module, options = NoNorms(), {"max_epochs": 2, "precision": "64-true"}
    data = Squares(12)
    if size == 1:
        # Two ranks of 3 take every other sample: the same 6 samples a step.
        loader, trainer = DataLoader(data, 6, collate_fn=stacked), new_trainer(folder, roiae, **options)
    else:
        loader = DataLoader(data, 3, sampler=DistributedSampler(data, shuffle=False), collate_fn=stacked)
        trainer = ddp_trainer(folder, roiae, **options)
    trainer.fit(module, loader)
    return dict(copy.deepcopy(module.state_dict())), dict(copy.deepcopy(roiae.autoencoders.state_dict()))


def test_two_ranks_are_one(processes, tmp_path):
    found = processes(2)(train_without_norms, tmp_path, 2)[0]
    expected = train_without_norms(tmp_path, 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)  # sums in another order


# ---------------------------------------------------------------- boxes


def test_boxes_go_where_torchvisions_detectors_put_them():
    """Images of several sizes, resized and padded: as the detector's own targets are."""
    network = detection.transform.GeneralizedRCNNTransform(64, 96, [0.5] * 3, [0.2] * 3)
    images = [torch.rand(3, 40, 50), torch.rand(3, 70, 33), torch.rand(3, 20, 90)]
    targets = [{"boxes": torch.tensor([[1.0, 2, 30, 19]])}, {"boxes": torch.zeros(0, 4)}, {"boxes": torch.rand(3, 4) * 20}]
    with resizing(network) as seen:
        inputs, theirs = network(images, targets)
    found = boxes_on_input(annotated((images, targets)), seen, None)
    for ours, one in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, one["boxes"])
    assert inputs.tensors.shape[2:] == (96, 96)  # padded to a multiple of 32


def test_boxes_of_images_that_enter_as_they_are_stay_where_they_are():
    boxes = [torch.rand(2, 4), torch.rand(0, 4)]
    found = boxes_on_input(Annotated([torch.zeros(3, 8, 9), torch.zeros(3, 12, 6)], boxes), [], (12, 9))
    assert all(torch.equal(*pair) for pair in zip(found, boxes, strict=True))


@pytest.mark.parametrize("resizings", [[], [Resizing([(1, 1)], [(2, 2)])], [Resizing([(8, 9)], [(8, 9)])] * 2], ids=len)
def test_images_that_were_resized_by_somebody_are_refused(resizings):
    with pytest.raises(ValueError, match=r"images of \[\(8, 9\)\] pixels and the backbone gets \(16, 18\).*by `boxes`"):
        boxes_on_input(Annotated([torch.zeros(3, 8, 9)], [torch.zeros(0, 4)]), resizings, (16, 18))


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(2, 3, 4, 4), ([torch.zeros(3, 4, 4)], [{"labels": 1}]), ([torch.zeros(3, 4, 4)] * 2, [{"boxes": 1}]), None, []],
    ids=lambda batch: type(batch).__name__,
)
def test_a_batch_without_images_and_targets_is_refused(batch):
    with pytest.raises(ValueError, match=r"Expected a batch of images and targets.*by `boxes`"):
        annotated(batch)


def test_a_dict_is_a_batch_as_well():
    found = annotated({"targets": [{"boxes": torch.ones(1, 4)}], "image": torch.zeros(1, 3, 5, 6), "more": "else"})
    assert found.sizes == [(5, 6)]
    assert found.boxes[0].shape == (1, 4)


def test_boxes_may_be_said(tmp_path):
    """All at one place: as if each image had that box."""
    everywhere = [[0.0, 0.0, 8.0, 8.0]]
    odd = lambda samples: {"x": torch.stack([image for image, _ in samples])}  # noqa: E731

    class Odd(TinyDetector):
        def training_step(self, batch, batch_idx):
            boxes = [{"boxes": torch.tensor(everywhere)}] * len(batch["x"])
            return super().training_step((batch["x"], boxes), batch_idx)

    boxes = lambda module, batch: [torch.tensor(everywhere)] * len(batch["x"])  # noqa: E731
    seed_everything(5, verbose=False)
    said, _ = fit(tmp_path, RoIAutoencoder(LAYERS, boxes=boxes, **FIXED), module=Odd(), loader=squares(collate_fn=odd))
    written = lambda samples: (torch.stack([image for image, _ in samples]), [{"boxes": torch.tensor(everywhere)}] * len(samples))  # noqa: E731
    seed_everything(5, verbose=False)
    module = TinyDetector()
    fit(tmp_path, RoIAutoencoder(LAYERS, **FIXED), module=module, loader=squares(collate_fn=written))
    assert same(dict(said.state_dict()), dict(module.state_dict()))

    class Offers(Odd):
        def roi_boxes(self, batch):
            return boxes(self, batch)

    seed_everything(5, verbose=False)
    offered, _ = fit(tmp_path, RoIAutoencoder(LAYERS, **FIXED), module=Offers(), loader=squares(collate_fn=odd))
    assert same(dict(offered.state_dict()), dict(module.state_dict()))
    with pytest.raises(MisconfigurationException, match="Expected a batch of images and targets"):
        fit(tmp_path, RoIAutoencoder(LAYERS, **FIXED), module=Odd(), loader=squares(collate_fn=odd))
    with pytest.raises(MisconfigurationException, match="The backbone gets 3 images but there are boxes of 1"):
        fit(tmp_path, RoIAutoencoder(LAYERS, boxes=lambda *_: [torch.zeros(0, 4)], **QUIET))


# ---------------------------------------------------------------- pictures


def test_reconstructions_are_drawn_to_disk(tmp_path):
    fit(tmp_path, RoIAutoencoder(LAYERS, draw_every_n_epochs=2), max_epochs=4)
    assert len(list(tmp_path.rglob("roiae_reconstructions_*.png"))) == 2


def test_a_picture_shows_each_map_beside_its_reconstructions():
    module, images = TinyDetector().eval(), torch.rand(4, 3, 16, 20)
    encoder = follow(module, LAYERS, lambda: module.body(images))
    autoencoders = Autoencoders(encoder)
    with EncoderTaps(module, autoencoders).reading() as reading:
        module.body(images)
    made = autoencoders(reading, autoencoders.terms)
    masks = {
        name: box_masks([torch.tensor([[0.0, 0, 9, 9]])] * 4, one.target.shape[2:], one.stride) for name, one in made.items()
    }
    figure = plot_reconstructions(made, masks, images, rows=2)
    # The image; body.6 and what body.9 makes of it; body.2 and what body.6 and all decoders make of it.
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:6] == ["image", "body.2", "from body.6", "end to end", "body.6", "from body.9"]
    assert len(figure.axes) == 12
    shown = figure.axes[1].images[0].get_array()
    assert torch.allclose(torch.from_numpy(shown.data), reading.maps["body.2"][0].mean(0))
    assert len(plot_reconstructions(made).axes) == 15


# ---------------------------------------------------------------- torchvision's detectors


DETECTORS = {
    "Faster R-CNN, MobileNet": (detection.fasterrcnn_mobilenet_v3_large_fpn, ["body.3", "body.6", "body.12"], 96),
    "Faster R-CNN, ResNet": (detection.fasterrcnn_resnet50_fpn, ["body.layer2", "body.layer3", "body.layer4"], 96),
    "RetinaNet": (detection.retinanet_resnet50_fpn, ["body", "body.layer1", "body.layer2", "body.layer3"], 96),
    "FCOS": (detection.fcos_resnet50_fpn, ["body.layer2", "body.layer3", "body.layer4"], 96),
    "SSD": (detection.ssd300_vgg16, ["features.9", "features.16", "features.22"], None),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if "Mobile" in name else pytest.mark.long) for name in DETECTORS])
def test_torchvisions_detectors_take_it_by_names_alone(name, tmp_path):
    """Images of two sizes, one without a box, ignore regions in the targets."""
    build, layers, size = DETECTORS[name]
    sizes = {} if size is None else {"min_size": size, "max_size": 128}
    detector = build(weights=None, weights_backbone=None, num_classes=3, **sizes)
    module, keys = Wrapped(detector), list(Wrapped(detector).state_dict())
    images = [torch.rand(3, 60, 80), torch.rand(3, 80, 70), torch.rand(3, 60, 80)]
    boxes = [torch.tensor([[10.0, 10, 30, 50]]), torch.zeros(0, 4), torch.tensor([[5.0, 5, 15, 25], [40, 10, 70, 55]])]
    labels = [torch.tensor([1]), torch.zeros(0, dtype=torch.int64), torch.tensor([1, 2])]
    samples = [(i, {"boxes": b, "labels": la}) for i, b, la in zip(images, boxes, labels, strict=True)]
    loader = DataLoader(samples, 3, collate_fn=listed)
    roiae = RoIAutoencoder([f"net.backbone.{layer}" for layer in layers], balance=0.1, **QUIET)
    _, trainer = fit(tmp_path, roiae, module=module, loader=loader, max_epochs=1)
    terms = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("train/roiae/")}
    assert len(terms) == len(layers)
    assert all(0 < value < float("inf") for value in terms.values())
    assert list(module.state_dict()) == keys
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in module.parameters())


# ---------------------------------------------------------------- refused at the door


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"layers": "body"}, "two layers or more"),
        ({"layers": ["body.2"]}, "two layers or more"),
        ({"layers": ["a", "b", "a"]}, "each once"),
        ({"intermediate": [1.0]}, "Between 3 layers are 2 reconstructions but `intermediate` has 1 weights"),
        ({"intermediate": -1.0}, "Weights must not be negative"),
        ({"intermediate": 0.0, "end_to_end": 0.0}, "All weights are 0"),
        ({"balance": 0.0}, "`balance` must be positive"),
        ({"balance_batches": 0}, "`balance_batches` must be at least 1"),
        ({"balance_every": 0}, "`balance_every` must be at least 1"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\)"),
        ({"draw_every_n_epochs": 0}, "`draw_every_n_epochs` must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(arguments, text):
    with pytest.raises(MisconfigurationException, match=text):
        RoIAutoencoder(**{"layers": LAYERS, **arguments})


def test_what_cannot_work_is_refused_by_name(tmp_path):
    class Manual(TinyDetector):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="Manual optimizes manually"):
        fit(tmp_path, RoIAutoencoder(LAYERS), module=Manual())
    with pytest.raises(MisconfigurationException, match="There are two RoIAutoencoder"):
        fit(tmp_path, RoIAutoencoder(LAYERS), RoIAutoencoder(LAYERS[:2]))
    with pytest.raises(MisconfigurationException, match=r"TinyDetector has no layer 'body.22' to read; perhaps 'body.2'"):
        fit(tmp_path, RoIAutoencoder(["body.22", "body.9"]))
    with pytest.raises(MisconfigurationException, match=r"'body.2' takes nothing that comes from 'body.6'"):
        fit(tmp_path, RoIAutoencoder(["body.6", "body.2"]))

    class Concatenates(TinyDetector):
        def __init__(self):
            super().__init__()
            self.body[8] = nn.PixelShuffle(1)

    with pytest.raises(
        MisconfigurationException, match=r"Layer 'body.8', between 'body.6' and 'body.9', cannot be mirrored: it calls"
    ):
        fit(tmp_path, RoIAutoencoder(LAYERS), module=Concatenates())


def test_a_step_that_skips_its_batch_is_fine(tmp_path):
    class Skips(TinyDetector):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="returned `None`"):
        fit(tmp_path, RoIAutoencoder(LAYERS, **QUIET), module=Skips())


def test_a_step_without_the_backbone_is_refused(tmp_path):
    """As of compiled code, whose hooks are not called; a loss that is silently left out would be worse."""

    class Forgets(TinyDetector):
        def training_step(self, batch, batch_idx):
            return self.head.weight.sum() if batch_idx else super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match=r"does not run 'body.9', or runs it as compiled code"):
        fit(tmp_path, RoIAutoencoder(LAYERS, **QUIET), module=Forgets())


def test_a_frozen_backbone_cannot_be_balanced_but_read(tmp_path):
    class Frozen(TinyDetector):
        def __init__(self):
            super().__init__()
            self.body.requires_grad_(False)

    fit(tmp_path, RoIAutoencoder(LAYERS, **QUIET), module=Frozen())
    with pytest.raises(MisconfigurationException, match="share no layer that is trained"):
        fit(tmp_path, RoIAutoencoder(LAYERS, balance=0.1, **QUIET), module=Frozen())
