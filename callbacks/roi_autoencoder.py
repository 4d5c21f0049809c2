"""The Region of Interest Autoencoder: beside a detector's own loss, its backbone learns to keep what people look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lit_compress import rng
from lit_compress.callbacks.added_loss import add_loss, refuse_manual, remove_loss
from lit_compress.callbacks.companions import step_own
from lit_compress.callbacks.loggers import Outlets
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.callbacks.ranks import over_ranks
from lit_compress.callbacks.resume import RandomStates
from lit_compress.callbacks.steps import training_error
from lit_compress.detection.encoder import follow
from lit_compress.detection.following import fill, follow_cut
from lit_compress.detection.masks import box_masks
from lit_compress.detection.pictures import plot_reconstructions
from lit_compress.detection.roi_autoencoder import END_TO_END, Autoencoders, EncoderTaps, Reading, Reconstruction
from lit_compress.detection.targets import Resizing, annotated, boxes_on_input, resizing
from lit_compress.losses.balancing import Balance, balance, mean_balance
from lit_compress.losses.reconstruction import roi_reconstruction
from lit_compress.plan import Plan, plan_of
from lit_compress.ranks import as_one, share, world_size
from lit_compress.taps import Taps

NAME = "roiae"
Boxes: TypeAlias = Callable[[LightningModule, Any], Sequence[Tensor]]
Seen: TypeAlias = tuple[Reading, list[Resizing]] | None


class RoIAutoencoder(Callback):
    """While a detector trains, decoders reconstruct the maps of its backbone where the boxes are, and nothing stays behind.

    Works on any LightningModule around any detector: torchvision's Faster R-CNN, RetinaNet, SSD and FCOS as they are. ``layers``
    names places along the backbone, in the order of the forward. Each place is reconstructed from the next one by a decoder that
    mirrors what lies between, and the first from the last through all decoders in a row. The distance, summed over the positions
    inside of any box, is added to the loss of the module, as ``train/roiae/<layer>`` and ``train/roiae/end_to_end``.

    Decoders are made right before the first batch, from a run of ``training_step`` on it that leaves no trace. They belong to the
    callback: module, checkpoints' ``state_dict`` and the module's optimizer never hold them. They are trained by an optimizer
    like the module's own, with its options at every step (learning rate, momentum, weight decay), and their gradients are
    averaged over ranks. A resumed run goes on with them, bit for bit. They follow the cuts of a pruning callback.

    Args:
        layers: Names of two layers or more, as ``["net.backbone.body.layer2", "net.backbone.body.layer3"]``. What they give is
            meant; of the first, what it takes, if it is a module that holds the others. Layers before the first may be frozen.
        intermediate: Weights of the reconstructions of each place from the next: one for all, or one each; 0 leaves one out. As
            those of the document they suit VGG-16 at 960×720 pixels; for anything else use ``balance``.
        end_to_end: Weight of the reconstruction of the first place from the last; 0 leaves it out.
        balance: Find the weights instead, so that each term's gradient on the shared layers is this many times as long as that of
            the module's own loss; 0.1 is a place to begin. Terms of weight 0 stay out.
        balance_batches: How many batches that show boxes the weights go by: the mean over the first so many, and then over the
            last so many that were measured.
        balance_every: Measure one batch in so many once those are over, since gradients change by orders of magnitude while
            decoders learn. None: the weights are fixed from then on.
        mask: Whether only what lies in boxes counts. False gives the Stacked What-Where Autoencoder.
        dropout: Probability with which each number that enters a decoder is set to zero.
        detach_targets: Whether the layers learn only to be reconstructed from, and not to give maps that are easily
            reconstructed, such as zeros. With False, the gradient is that of the formula as printed.
        boxes: From module and batch to the boxes ``(m, 4)`` of each image (left, top, right, bottom) in pixels of what the
            backbone gets. None: what a method ``roi_boxes(batch)`` of the module gives, if there is one; otherwise ``boxes`` of
            the targets, ignore regions included, which are scaled as torchvision's detectors resize their images.
        optimizer: From the decoders' parameters to their optimizer. None: of the kind of the module's own, as in the document.
            Where that is a plain gradient descent, small weights slow the decoders down; ``torch.optim.Adam`` does not care.
        draw_every_n_epochs: Draw reconstructions of a batch of every n-th epoch, ``roiae/reconstructions``; None for none.

    Attributes:
        autoencoders: The decoders, once the first batch has begun.

    Raises:
        MisconfigurationException: If a value is out of range. From the start of ``fit``: if the module optimizes manually, lacks
            a layer, is sharded, has another of these callbacks, or a pruning callback has ``max_drop`` or ``skips="pad"``, which
            decoders cannot follow. From the first batch: if something between the layers cannot be mirrored (it is named), a step
            does not run them, or the boxes are not found.

    Source: *Region of Interest Autoencoders with an Application to Pedestrian Detection* (T1, chapter 3).

    Example::

        layers = ["net.backbone.body.layer2", "net.backbone.body.layer3", "net.backbone.body.layer4"]
        trainer = Trainer(callbacks=[RoIAutoencoder(layers, balance=0.1)])
    """

    def __init__(
        self,
        layers: Sequence[str],
        *,
        intermediate: float | Sequence[float] = 1e-7,
        end_to_end: float = 5e-7,
        balance: float | None = None,
        balance_batches: int = 20,
        balance_every: int | None = 20,
        mask: bool = True,
        dropout: float = 0.5,
        detach_targets: bool = True,
        boxes: Boxes | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        draw_every_n_epochs: int | None = 1,
    ) -> None:
        if isinstance(layers, str) or len(layers) < 2 or len(set(layers)) < len(layers):
            raise MisconfigurationException(f"Argument `layers` must list two layers or more, each once, but got {layers!r}.")
        self.layers = tuple(layers)
        each = tuple(intermediate) if isinstance(intermediate, Sequence) else (intermediate,) * (len(layers) - 1)
        if len(each) != len(layers) - 1:
            raise MisconfigurationException(
                f"Between {len(layers)} layers are {len(layers) - 1} reconstructions but `intermediate` has {len(each)} weights."
            )
        if min(*each, end_to_end) < 0:
            raise MisconfigurationException(f"Weights must not be negative but got {each} and {end_to_end}.")
        self.given = dict(zip(layers[1:], each, strict=True)) | ({END_TO_END: end_to_end} if len(layers) > 2 else {})
        self.terms = tuple(name for name, weight in self.given.items() if weight)
        if not self.terms:
            raise MisconfigurationException("All weights are 0: there is nothing to reconstruct.")
        if balance is not None and balance <= 0:
            raise MisconfigurationException(f"Argument `balance` must be positive or None but got {balance}.")
        if balance_batches < 1:
            raise MisconfigurationException(f"Argument `balance_batches` must be at least 1 but got {balance_batches}.")
        if balance_every is not None and balance_every < 1:
            raise MisconfigurationException(f"Argument `balance_every` must be at least 1 or None but got {balance_every}.")
        if not 0 <= dropout < 1:
            raise MisconfigurationException(f"Argument `dropout` must lie in [0, 1) but got {dropout}.")
        if draw_every_n_epochs is not None and draw_every_n_epochs < 1:
            raise MisconfigurationException(
                f"Argument `draw_every_n_epochs` must be at least 1 or None but got {draw_every_n_epochs}."
            )
        self.balance, self.balance_batches, self.mask, self.dropout = balance, balance_batches, mask, dropout
        self.balance_every = balance_every
        self.detach_targets, self.boxes, self.optimizer = detach_targets, boxes, optimizer
        self.draw_every_n_epochs = draw_every_n_epochs
        self._random_states = RandomStates(self)
        self._reset()

    def _reset(self) -> None:
        """Another run begins."""
        self.autoencoders: Autoencoders | None = None
        self.own_optimizer: Optimizer | None = None
        self.balances: list[Balance] = []  # of the last batches measured
        self._waited = 0  # batches since
        self._taps: EncoderTaps | None = None
        self._plan: Plan | None = None  # what was cut when the decoders were made, or last followed
        self._resumed: dict[str, Any] | None = None
        self._outlets: Outlets | None = None
        self._batch: Any = None  # only while it is trained on
        self._draws = False

    @property
    def weights(self) -> dict[str, float]:
        """Name of a term to its weight."""
        if self.balance is None:
            return {name: self.given[name] for name in self.terms}
        return dict.fromkeys(self.terms, 0.0) | mean_balance(self.balances).weights(self.balance)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layers=self.layers)

    # ---------------------------------------------------------------- hooks, in the order in which they fire

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._random_states.reset()
            if trainer.global_step == 0:  # what is resumed brings its own decoders later
                self._reset()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, and add the loss."""
        refuse_manual(pl_module, NAME)
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"RoIAutoencoder trains on one device or under DDP, but the Trainer uses {type(trainer.strategy).__name__}."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, RoIAutoencoder) and other is not self:
                raise MisconfigurationException("There are two RoIAutoencoder. Name all layers in one.")
            if isinstance(other, PruningCallback) and (other.fallback is not None or other.skips == "pad"):
                asked = "skips='pad'" if other.fallback is None else "max_drop"
                raise MisconfigurationException(
                    f"The decoders of RoIAutoencoder follow cuts, but not `{asked}` of {type(other).__name__}. Leave it out, or "
                    "prune in a run of its own: nothing of the decoders is left in the detector."
                )
        with _told():
            Taps(pl_module, self.layers)  # tells of names that do not exist
        self.own_optimizer = self._taps = None  # the module's own optimizer is new as well
        add_loss(pl_module, NAME, self._loss, self._watch, beside=True)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        outlets = Outlets(trainer)
        self._outlets = outlets if outlets.open else None
        self._random_states.on_train_start(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._random_states.on_train_epoch_start(trainer)
        every = self.draw_every_n_epochs
        self._draws = self._outlets is not None and every is not None and (trainer.current_epoch + 1) % every == 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make the decoders; bring them along if something was cut, whichever callback came first."""
        with _told():
            if self.autoencoders is None:
                self.autoencoders = self._made(trainer, pl_module, batch)
                self._plan = plan_of(pl_module)
                if self._resumed is not None:  # perhaps from before a cut that was made since
                    fill(self.autoencoders, self._resumed["decoders"])
                    plan = self._resumed["plan"]
                    self._plan = None if plan is None else Plan.from_dict(plan)
            if self.own_optimizer is None:
                self.own_optimizer = self._own_optimizer(trainer, pl_module, self.autoencoders)
                self._resumed = None
            plan = plan_of(pl_module)
            if plan is not self._plan and plan != self._plan:
                follow_cut(self.autoencoders, self._plan, plan, self.own_optimizer)
                self._plan = plan
        if self._taps is None:
            self._taps = EncoderTaps(pl_module, self.autoencoders)
        self._batch = batch

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.own_optimizer is None or self.autoencoders is None:
            return
        _average_gradients(self.autoencoders)
        if self.optimizer is None:
            for group in self.own_optimizer.param_groups:  # of the same kind, so that it has the same options
                group.update({name: value for name, value in _like(optimizer, self._shared(pl_module)).items() if name in group})
        step_own(trainer, self.own_optimizer, clip=True)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batch = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._random_states.on_exception()
        self._leave(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        held, decoders = self._resumed, self.autoencoders
        if decoders is not None and self.own_optimizer is not None:
            plan = None if self._plan is None else self._plan.to_dict()
            held = {"decoders": decoders.state_dict(), "optimizer": self.own_optimizer.state_dict(), "plan": plan}
        balances = [{"own": one.own, "terms": dict(one.terms)} for one in self.balances]
        return {"held": held, "balances": balances, "waited": self._waited, "rng": self._random_states.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict["held"]
        self.autoencoders = self.own_optimizer = self._taps = None
        self.balances = [Balance(one["own"], one["terms"]) for one in state_dict["balances"]]
        self._waited = state_dict["waited"]
        self._random_states.load_state_dict(state_dict["rng"])

    def _leave(self, pl_module: LightningModule) -> None:
        remove_loss(pl_module, NAME)
        self._batch = None

    # ---------------------------------------------------------------- the decoders

    def _made(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Autoencoders:
        """Decoders for the network as it is, the same on all ranks; they draw no random numbers that anyone else sees."""
        example = deepcopy(batch)  # a step may change its batch in place, and this one is still to be trained on

        def run() -> None:
            share(None)  # norms that sync over ranks talk to the others
            if (error := training_error(trainer, pl_module, example)) is not None:
                raise MisconfigurationException(
                    f"RoIAutoencoder runs `training_step` once, to see what lies between the layers, and it fails: {error}"
                ) from error

        with as_one(), rng.isolated():
            encoder = follow(pl_module, self.layers, run)
            torch.manual_seed(share(torch.initial_seed())[0])
            like = next(pl_module.parameters())
            return Autoencoders(encoder, self.dropout).to(like.device, like.dtype)

    def _own_optimizer(self, trainer: Trainer, pl_module: LightningModule, autoencoders: Autoencoders) -> Optimizer:
        parameters = list(autoencoders.parameters())
        if self.optimizer is not None:
            own = self.optimizer(parameters)
        else:
            theirs = trainer.optimizers[0]
            kind = type(theirs)
            if isinstance(theirs, LBFGS):
                raise ValueError("LBFGS cannot train decoders beside the network. Give RoIAutoencoder another `optimizer`.")
            options = {name: value for name, value in _like(theirs, self._shared(pl_module)).items() if name in theirs.defaults}
            try:
                own = kind(parameters, **options)
            except TypeError as error:
                raise ValueError(
                    f"{kind.__name__} cannot be made for the decoders: {error}. Give RoIAutoencoder an `optimizer`."
                ) from error
        if self._resumed is not None:
            own.load_state_dict(self._resumed["optimizer"])
        return own

    def _shared(self, pl_module: LightningModule) -> list[Tensor]:
        """Weights of the layers that both losses train."""
        if self.autoencoders is None:
            return []
        encoder = self.autoencoders.encoder
        weights = [pl_module.get_parameter(name) for name in encoder.weights_before(encoder.marks[self.layers[-1]])]
        return [weight for weight in weights if weight.requires_grad]

    # ---------------------------------------------------------------- a training step

    @contextmanager
    def _watch(self, module: LightningModule) -> Iterator[Seen]:
        if self._taps is None or self._batch is None:  # a step that somebody tries, on other data
            yield None
            return
        with resizing(module) as resizings, self._taps.reading() as reading:
            yield reading, resizings

    def _loss(self, module: LightningModule, seen: Seen, own: Tensor) -> dict[str, Tensor]:
        if seen is None or self.autoencoders is None:
            return {}
        reading, resizings = seen
        if not reading.maps:
            raise MisconfigurationException(
                f"RoIAutoencoder: the training step does not run {self.layers[-1]!r}, or runs it as compiled code, where no hook "
                "sees it. Compile nothing that holds it."
            )
        made: dict[str, Reconstruction] = self.autoencoders(reading, self.terms)
        with _told():
            masks = self._masks(module, made, reading, resizings)
            values = {}
            for name, one in made.items():
                target = one.target.detach() if self.detach_targets else one.target
                values[name] = roi_reconstruction(one.made, target, masks.get(name)) / len(target)  # the mean over images
            self._measure(module, own, values, masks)
        self._draw(made, masks)
        weights = self.weights
        return {name: weights[name] * value for name, value in values.items()}

    def _masks(
        self, module: LightningModule, made: Mapping[str, Reconstruction], reading: Reading, resizings: Sequence[Resizing]
    ) -> dict[str, Tensor]:
        if not self.mask:
            return {}
        offered = getattr(module, "roi_boxes", None)
        if self.boxes is not None:
            boxes = self.boxes(module, self._batch)
        elif callable(offered):
            boxes = offered(self._batch)
        else:
            boxes = boxes_on_input(annotated(self._batch), resizings, reading.input_size)
        images = len(next(iter(made.values())).target)
        if len(boxes) != images:
            raise ValueError(
                f"The backbone gets {images} images but there are boxes of {len(boxes)}; give boxes of each by `boxes`."
            )
        return {name: box_masks(boxes, (one.target.shape[2], one.target.shape[3]), one.stride) for name, one in made.items()}

    def _measure(self, module: LightningModule, own: Tensor, values: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Note, and tell, how hard each term pulls beside the module's own loss, if it is time to and the batch shows boxes."""
        self._waited += 1
        if not self._measures:
            return
        shared = self._shared(module)
        if self.balance is None and not (shared and own.requires_grad):  # only to be told, and there is nothing to tell
            return
        norms: dict[str, float] = {}
        if all(bool(mask.any()) for mask in masks.values()):  # otherwise there is nothing to see on this rank
            measured = balance(own, values, shared)
            norms = {"": measured.own} | {name: norm for name, norm in measured.terms.items() if norm > 0}
        norms = over_ranks(norms)
        if len(norms) < 2:
            return
        found = Balance(norms.pop(""), {name: norms.get(name, 0.0) for name in values})
        self.balances = [*self.balances, found][-self.balance_batches :]
        self._waited = 0
        if self._outlets is not None:
            weights = self.weights
            self._outlets.values({f"{NAME}/weight/{name}": weight for name, weight in weights.items()})
            self._outlets.values({f"{NAME}/gradient_share/{name}": one for name, one in found.shares(weights).items()})

    @property
    def _measures(self) -> bool:
        """Whether it is time to measure a batch."""
        if len(self.balances) < (1 if self.balance is None else self.balance_batches):
            return True
        return self.balance is not None and self.balance_every is not None and self._waited >= self.balance_every

    def _draw(self, made: Mapping[str, Reconstruction], masks: Mapping[str, Tensor]) -> None:
        if not self._draws or self._outlets is None or not all(bool(mask.any()) for mask in masks.values()):
            return
        self._draws = False
        try:
            images: Sequence[Tensor] | None = annotated(self._batch).images
        except ValueError:  # a batch of another form, whose boxes are found by `boxes`
            images = None
        figure = plot_reconstructions(made, masks or None, images)
        self._outlets.figure(f"{NAME}/reconstructions", figure, f"{NAME}_reconstructions_{self._outlets.step}")


def _like(optimizer: Optimizer, shared: Sequence[Tensor]) -> dict[str, Any]:
    """Options of the group that trains the last of the shared layers."""
    held = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    group = next((held[id(one)] for one in reversed(shared) if id(one) in held), optimizer.param_groups[0])
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _average_gradients(autoencoders: nn.Module) -> None:
    """Over ranks, as DDP does it for parameters of the module."""
    if world_size() == 1:
        return
    for parameter in autoencoders.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(world_size())


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(f"RoIAutoencoder: {error}") from error
