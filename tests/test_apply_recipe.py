"""A run that starts with a network that is cut already: before training, before sharding, and on resume."""

import copy

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, seed_everything
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from lit_compress import Recipe, cut
from lit_compress.callbacks import ApplyRecipe, PFAPruning
from lit_compress.plan import plan_of
from tests.modules import Small, every_epoch, new_trainer, same, small_loaders, vectors

RECIPE = Recipe(keep={"net.0": (1, 2, 5, 9), "net.2": (0, 3, 4, 7, 8, 15)})
WIDTHS = [(4, 6), (6, 4), (3, 6)]


def widths(module):
    return [tuple(layer.weight.shape) for layer in module.modules() if isinstance(layer, nn.Linear)]


def fit(folder, *callbacks, module=None, ckpt_path=None, **options):
    seed_everything(2, verbose=False)
    module = module or Small()
    trainer = new_trainer(folder, *callbacks, **{"enable_checkpointing": True, **options})
    trainer.fit(module, *small_loaders(), ckpt_path=ckpt_path)
    return module, trainer


class Late(Small):
    """Builds its network in `configure_model`."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            with torch.random.fork_rng():
                torch.manual_seed(4)
                self.net = Small().net


class Sharded(Small):
    """Shards its network in `configure_model`, as a strategy of parallel models has it."""

    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.mark.parametrize("kind", [Small, Late])
def test_the_run_trains_the_network_that_a_cut_by_hand_leaves(kind, tmp_path):
    seed_everything(2, verbose=False)
    small = kind()
    small.configure_model()
    cut(small, RECIPE, torch.rand(2, 6), forward_fn=lambda module, x: module.net(x))
    by_hand, _ = fit(tmp_path / "hand", module=small)
    seed_everything(2, verbose=False)
    module, trainer = fit(tmp_path / "callback", ApplyRecipe(RECIPE), module=kind())
    assert widths(module) == WIDTHS
    assert same(dict(module.state_dict()), dict(by_hand.state_dict()))
    assert "configure_model" not in vars(module)
    assert not trainer.validating


def test_inputs_come_from_the_data_the_module_or_the_user(tmp_path):
    class Forward(Small):
        def forward(self, x):
            return self.net(x)

    given, own = Forward(), Forward()
    own.example_input_array = torch.rand(1, 6)
    for module, options in ((given, {"example_inputs": torch.rand(2, 6)}), (own, {})):
        trainer = new_trainer(tmp_path, ApplyRecipe(RECIPE, **options))
        trainer.predict(module, dataloaders=[])  # a stage without data
        assert widths(module) == WIDTHS
    with pytest.raises(MisconfigurationException, match="example_inputs"):
        new_trainer(tmp_path, ApplyRecipe(RECIPE)).predict(Forward(), dataloaders=[])


def test_a_datamodule_and_a_recipe_on_disk_will_do(tmp_path):
    class Data(LightningDataModule):
        def setup(self, stage):
            self.rows = vectors()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(self.rows, 32)

    Recipe(keep={"0": (1, 2, 5, 9), "2": RECIPE.keep["net.2"]}).save(tmp_path / "recipe.json")  # made on the bare network
    module = Small()
    new_trainer(tmp_path, ApplyRecipe(tmp_path / "recipe.json"), max_epochs=1).fit(module, datamodule=Data())
    assert widths(module) == WIDTHS


def test_a_resumed_run_ends_as_one_that_never_stopped_also_if_it_was_cut_further(tmp_path):
    def callbacks(folder):
        return ApplyRecipe(RECIPE), PFAPruning(energy=0.8, at_epoch=1), every_epoch(folder)

    whole, _ = fit(tmp_path / "whole", *callbacks(tmp_path / "files"), max_epochs=3)
    assert widths(whole) != WIDTHS
    for epoch in (0, 1):
        resumed, _ = fit(
            tmp_path / f"resumed{epoch}", *callbacks(tmp_path / f"more{epoch}"), max_epochs=3,
            ckpt_path=tmp_path / "files" / f"epoch={epoch}.ckpt",
        )  # fmt: skip
        assert same(dict(resumed.state_dict()), dict(whole.state_dict())), epoch
        assert plan_of(resumed) == plan_of(whole)
    new_trainer(tmp_path, ApplyRecipe(RECIPE)).validate(resumed, small_loaders()[1])  # a second run of a cut module
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe(keep={"net.7": (0,)}), "'net.7'"),
        (Recipe(keep={"net.0": (0, 16)}), "16 channels"),
        (Recipe(keep={"net.4": (0,)}), "'net.4' cannot be removed"),
        (Recipe(keep={"net.0": (0,)}, original={"net.0": 12, "net.2": 16, "net.4": 3}), "another network"),
    ],
)
def test_a_recipe_that_does_not_fit_stops_the_run_and_leaves_the_network(recipe, says, tmp_path):
    module = Small()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=says):
        new_trainer(tmp_path, ApplyRecipe(recipe)).fit(module, *small_loaders())
    assert same(dict(module.state_dict()), dict(before))
    assert "configure_model" not in vars(module)


def test_nothing_to_apply_and_another_cut_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="nothing to apply"):
        ApplyRecipe(Recipe(keep={}))
    module = Small()
    cut(module, Recipe(keep={"net.0": (0, 3)}), torch.rand(2, 6), forward_fn=lambda module, x: module.net(x))
    with pytest.raises(MisconfigurationException, match="cut already"):
        new_trainer(tmp_path, ApplyRecipe(RECIPE)).fit(module, *small_loaders())


class CPUModelParallel(ModelParallelStrategy):
    """Lightning offers it on GPUs alone; torch shards on the CPU all the same."""

    @property
    def root_device(self):
        return torch.device("cpu")


def under(strategy, folder):
    """Weights after training under a strategy, whole, and the shapes of this rank's shards."""
    sharded = strategy == "fsdp"
    seed_everything(2, verbose=False)
    made = CPUModelParallel(data_parallel_size=2, tensor_parallel_size=1) if sharded else DDPStrategy()
    module = Sharded() if sharded else Small()
    trainer = new_trainer(folder, ApplyRecipe(RECIPE), strategy=made, devices=2)
    trainer.fit(module, *small_loaders(16))
    if sharded:
        module.net.reshard()  # a validation leaves it whole until the next backward
    shards = [tuple((p.to_local() if sharded else p).shape) for p in module.parameters()]
    return {name: (p.full_tensor() if sharded else p).detach().clone() for name, p in module.named_parameters()}, shards


WITHOUT_FSDP = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on accelerators only")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=WITHOUT_FSDP)])
def test_two_processes_train_the_cut_network_as_one_does(strategy, processes, tmp_path):
    (first, shards), (second, _) = processes(2)(under, strategy, tmp_path)
    assert same(first, second)
    assert [tuple(first[f"net.{layer}.weight"].shape) for layer in (0, 2, 4)] == WIDTHS
    assert (shards[0] == (2, 6)) == (strategy == "fsdp")  # half of the first weight's four rows
    # By hand, on the batches that the ranks have seen: Lightning's sampler gives rank r every second sample of the epoch's order.
    seed_everything(2, verbose=False)
    module = Small()
    cut(module, RECIPE, torch.rand(2, 6), forward_fn=lambda module, x: module.net(x))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    rows = vectors()
    for epoch in range(3):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(2 + epoch)).tolist()
        for step in range(3):
            inputs, labels = (
                torch.stack(part) for part in zip(*(rows[i] for i in order[32 * step : 32 * step + 32]), strict=True)
            )
            optimizer.zero_grad()
            F.cross_entropy(module.net(inputs), labels).backward()
            optimizer.step()
    for name, expected in module.named_parameters():
        torch.testing.assert_close(first[name], expected.detach(), rtol=1e-4, atol=1e-6)  # sums in another order
