"""A pruned network is built again: from files and from content, with a plan and with a recipe alone, or refused by name."""

import copy
import json

import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningCLI
from torch import nn

from lit_compress import Recipe, cut, load_pruned
from lit_compress.checkpoint import read_plan, rebuild, write_plan
from lit_compress.models import ResNetCIFAR
from lit_compress.modules import LitClassifier, PrunableMixin
from lit_compress.plan import plan_of
from lit_compress.surgery import Plan
from tests.modules import same
from tests.networks import randomized

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(keep={"0": (0, 2, 5), "2": (1, 3)})


def fresh(seed=3):
    """An uncut network; each one has other weights."""
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)]
    return randomized(nn.Sequential(*layers), seed)


def small():
    """A network that was cut, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = fresh(seed=4)
    cut(network, RECIPE, IMAGES)
    return network.eval()


@pytest.fixture
def checkpoint():
    network, content = small(), {}
    write_plan(network, content)
    return {"state_dict": network.state_dict(), **content}


class Holder(LightningModule):
    """Holds the network as `net`."""

    def __init__(self, slope: float = 0.5):
        super().__init__()
        self.save_hyperparameters()
        self.net = fresh()
        self.slope = slope


def held(checkpoint):
    """The checkpoint as a module writes it that holds the network as `net`."""
    plan = Plan.from_dict(checkpoint["lit_compress"]["plan"]).renamed(add="net.")
    weights = {f"net.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    return {"state_dict": weights, "lit_compress": {"format": 1, "plan": plan.to_dict()}}


# ---------------------------------------------------------------- what a checkpoint holds


def test_an_uncut_network_leaves_nothing_in_a_checkpoint():
    content = {}
    write_plan(fresh(), content)
    assert content == {}
    assert read_plan(content) is None
    network = fresh()
    rebuild(network, content)
    assert plan_of(network) is None


def test_a_plan_goes_through_a_file_and_json(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert read_plan(content) == read_plan(checkpoint) == plan_of(small())
    assert json.loads(json.dumps(content["lit_compress"])) == content["lit_compress"]


def test_the_plan_is_that_of_all_cuts():
    network = fresh()
    cut(network, RECIPE, IMAGES)
    cut(network, Recipe(keep={"0": (1,)}), IMAGES)
    content = {}
    write_plan(network, content)
    assert dict(read_plan(content).recipe.keep) == {"0": (2,), "2": (1, 3)}
    again = load_pruned(fresh(), {"state_dict": network.state_dict(), **content})
    assert torch.equal(again.eval()(IMAGES), network.eval()(IMAGES))


# ---------------------------------------------------------------- loading


def test_files_content_and_classes_give_the_same_network(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "a.ckpt")

    class Fresh(nn.Sequential):
        def __init__(self):
            super().__init__(*fresh())

    for network in (
        load_pruned(fresh(), checkpoint),
        load_pruned(fresh(), tmp_path / "a.ckpt"),
        load_pruned(Fresh, str(tmp_path / "a.ckpt")),
    ):
        assert torch.equal(network.eval()(IMAGES), small()(IMAGES))
        assert plan_of(network) == plan_of(small())
    network = fresh()
    assert load_pruned(network, checkpoint) is network
    assert load_pruned(network, checkpoint) is network, "a network that was cut alike takes the weights again"


@pytest.mark.parametrize("as_file", [False, True])
def test_a_state_dict_and_the_recipe_are_enough(as_file, tmp_path):
    recipe = plan_of(small()).recipe
    if as_file:
        recipe.save(tmp_path / "recipe.json")
        recipe = tmp_path / "recipe.json"
    network = load_pruned(fresh(), small().state_dict(), recipe=recipe)
    assert torch.equal(network.eval()(IMAGES), small()(IMAGES))
    assert network[0].out_channels == network[1].num_features == network[2].in_channels == 3
    assert network[5].in_features == 2 * 16
    assert dict(plan_of(network).recipe.keep) == dict(RECIPE.keep)


class Positions(nn.Sequential):
    """Adds a number to each channel, which no state dict holds."""

    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.register_buffer("added", torch.arange(6.0), persistent=False)

    def forward(self, x):
        return self[2](self[1](self[0](x)) + self.added)


def test_a_buffer_that_no_state_dict_holds_is_cut_by_a_checkpoint_and_refused_without():
    x = torch.rand(2, 4)
    network = Positions()
    recipe = cut(network, Recipe(keep={"0": (1, 4)}), x).recipe
    content = {"state_dict": network.state_dict()}
    write_plan(network, content)
    assert torch.equal(load_pruned(Positions(), content)(x), network(x))
    other = Positions()
    with pytest.raises(ValueError, match="Buffer 'added' is in no state dict, and nothing says how it was cut"):
        load_pruned(other, network.state_dict(), recipe=recipe)
    assert [len(tensor) for tensor in other.state_dict().values()] == [6, 6, 3, 3]
    cut(other, recipe, x)  # the way out
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))


def test_a_recipe_for_tied_layers_rebuilds_all_of_them():
    """The recipe names one member of a residual stream; the weights show what followed."""
    torch.manual_seed(0)
    network = ResNetCIFAR(8, in_channels=1, width=4)
    uncut = copy.deepcopy(network)
    stem = next(name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    plan = cut(network, Recipe(keep={stem: (0, 3)}), IMAGES)
    assert len(plan.recipe.keep) > 3
    again = load_pruned(uncut, network.state_dict(), recipe=plan.recipe)
    assert torch.equal(again.eval()(IMAGES), network.eval()(IMAGES))


def test_names_follow_the_module_that_holds_the_network(checkpoint):
    expected = small()(IMAGES)
    module = load_pruned(Holder, held(checkpoint))
    assert torch.equal(module.net.eval()(IMAGES), expected)
    module = load_pruned(Holder(), {f"net.{k}": v for k, v in small().state_dict().items()}, recipe=RECIPE)
    assert torch.equal(module.net.eval()(IMAGES), expected)
    assert dict(plan_of(module).recipe.keep) == {"net.0": (0, 2, 5), "net.2": (1, 3)}
    # The plan of the module also rebuilds the network that it holds.
    network = fresh()
    rebuild(network, held(checkpoint))
    network.load_state_dict(small().state_dict())
    assert torch.equal(network.eval()(IMAGES), expected)


def test_hyperparameters_build_the_class_and_arguments_go_before_them(checkpoint):
    content = {**held(checkpoint), "hyper_parameters": {"slope": 0.25, "gone": 1}}
    assert load_pruned(Holder, content).slope == 0.25
    assert load_pruned(Holder, content, slope=2.0).slope == 2.0
    with pytest.raises(TypeError, match="unknown"):
        load_pruned(Holder, content, unknown=1)

    class TakesAll(Holder):
        def __init__(self, slope=1.0, **kwargs):
            super().__init__(slope)
            self.given = kwargs

    assert load_pruned(TakesAll, {**content, "hparams_name": "kwargs"}).given == {"gone": 1}

    class TakesOne(Holder):
        def __init__(self, config):
            super().__init__(config["slope"])

    assert load_pruned(TakesOne, {**content, "hparams_name": "config"}).slope == 0.25


def test_arguments_that_no_checkpoint_can_give_are_asked_for_by_name(checkpoint):
    """A network among the hyperparameters is pickled as it is when a file is written: cut."""

    class Takes(Holder):
        def __init__(self, backbone, *, classes):
            super().__init__()
            self.net = backbone

    content = held(checkpoint)
    with pytest.raises(
        ValueError, match=r"Takes takes \['backbone', 'classes'\], .* `load_pruned\(Takes, checkpoint, backbone=…"
    ):
        load_pruned(Takes, content)
    content["hyper_parameters"] = {"backbone": small(), "classes": 2}
    with pytest.raises(ValueError, match=r"Takes takes \['backbone'\], which .* not as before the cut"):
        load_pruned(Takes, content)
    assert torch.equal(load_pruned(Takes, content, backbone=fresh()).net.eval()(IMAGES), small()(IMAGES))


class Configured(LightningModule):
    """Makes its layers late."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = fresh()


def test_a_module_that_is_configured_late_is_configured_first(checkpoint):
    assert torch.equal(load_pruned(Configured, held(checkpoint)).net.eval()(IMAGES), small()(IMAGES))


class Mixed(PrunableMixin, Holder):
    pass


@pytest.mark.parametrize("kind", [Holder, Mixed])
def test_a_module_sees_the_checkpoint_before_the_weights(kind, checkpoint):
    class Looks(kind):
        def on_load_checkpoint(self, content):
            super().on_load_checkpoint(content)
            self.seen = content["mine"], self.net[0].out_channels

    module = load_pruned(Looks, {**held(checkpoint), "mine": 7})
    assert module.seen == (7, 3)
    # Weights of a checkpoint that nobody noted the cuts in, with the recipe.
    content = {"state_dict": held(checkpoint)["state_dict"], "mine": 8}
    assert load_pruned(Looks, content, recipe=RECIPE).seen == (8, 3)
    assert "lit_compress" not in content, "what was given stays as it was"


def test_the_mixin_notes_cuts_that_no_callback_made(checkpoint):
    module = Mixed()
    cut(module.net, RECIPE, IMAGES)
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    again = load_pruned(Holder, content)
    assert same(again.state_dict(), module.state_dict())


def test_weights_that_a_module_does_not_insist_on_may_be_missing(checkpoint):
    class Loose(Holder):
        def __init__(self):
            super().__init__()
            self.strict_loading = False

    content = held(checkpoint)
    del content["state_dict"]["net.5.bias"]
    assert load_pruned(Loose, content).net[5].in_features == 32
    with pytest.raises(ValueError, match=r"(?s)do not fit Holder: .*net\.5\.bias"):
        load_pruned(Holder, content)


def test_a_checkpoint_of_the_command_line_builds_its_network(tmp_path):
    """Its hyperparameters hold the network as `class_path` and `init_args`."""
    net = {"class_path": "lit_compress.models.LeNet300100", "init_args": {"in_features": 64}}
    pruning = {"class_path": "lit_compress.callbacks.PFAPruning", "init_args": {"energy": 0.8}}
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    config = {
        "trainer": {"max_epochs": 2, "default_root_dir": str(tmp_path), "callbacks": [pruning], **quiet},
        "model": {"class_path": "tests.test_checkpoint.FromConfig", "init_args": {"net": net}},
        "data": {"class_path": "lit_compress.datamodules.DigitsDataModule", "init_args": {"train_size": 200}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    cli = LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
        save_config_callback=None,
    )
    path = cli.trainer.checkpoint_callback.best_model_path
    assert "_instantiator" in torch.load(path, weights_only=True)["hyper_parameters"]
    module = load_pruned(FromConfig, path)
    assert same(module.state_dict(), cli.model.state_dict())
    assert sum(parameter.numel() for parameter in module.parameters()) < 0.6 * 49_610


class FromConfig(LitClassifier):
    """Keeps its network among the hyperparameters."""

    def __init__(self, net: nn.Module):
        super().__init__(net, num_classes=10)
        self.save_hyperparameters()


# ---------------------------------------------------------------- refusals


def test_a_later_format_is_refused_by_name(checkpoint):
    checkpoint["lit_compress"]["format"] = 9
    with pytest.raises(
        ValueError, match="The checkpoint has format 9 but this version of lit-compress reads formats up to 2; upgrade"
    ):
        load_pruned(fresh(), checkpoint)


def test_a_network_that_was_cut_in_another_way_is_refused(checkpoint):
    network = fresh()
    cut(network, Recipe(keep={"0": (1, 2, 3)}, method="mine"), IMAGES)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="cut already, by mine, but the checkpoint holds one cut by by hand"):
        load_pruned(network, checkpoint)
    with pytest.raises(ValueError, match="but the checkpoint holds an uncut network"):
        rebuild(network, {})
    assert same(before, network.state_dict())


def test_a_checkpoint_of_another_network_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"made from another network: Linear lacks \['0\.bias', '0\.weight'"):
        load_pruned(nn.Linear(2, 2), checkpoint)
    wider = nn.Sequential(nn.Conv2d(1, 7, 3), *list(fresh())[1:])
    with pytest.raises(ValueError, match=r"'0\.weight' should have shape \(6, 1, 3, 3\) before the cut but has \(7, 1, 3, 3\)"):
        load_pruned(wider, checkpoint)
    assert wider[0].weight.shape == (7, 1, 3, 3)


def test_a_state_dict_of_a_cut_network_needs_its_recipe():
    with pytest.raises(ValueError, match=r"(?s)do not fit Sequential: .*A plain state dict of a cut network needs `recipe=`"):
        load_pruned(fresh(), small().state_dict())


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (Recipe(keep={"0": (0, 1, 2, 3)}), r"keeps 4 channels of layer '0', whose weight has shape \(3, 1, 3, 3\)"),
        (Recipe(keep={"0": (0, 2, 5)}), None),  # names one of the layers; the weights show the other
    ],
    ids=["other width", "one layer"],
)
def test_a_recipe_is_held_against_the_weights(recipe, text):
    if text is None:
        assert torch.equal(load_pruned(fresh(), small().state_dict(), recipe=recipe).eval()(IMAGES), small()(IMAGES))
        return
    with pytest.raises(ValueError, match=text):
        load_pruned(fresh(), small().state_dict(), recipe=recipe)


def test_weights_that_are_not_cut_out_of_the_network_are_refused():
    weights = fresh().state_dict() | {"0.weight": torch.zeros(9, 1, 3, 3)}
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(9, 1, 3, 3\), which is not cut out of \(6, 1, 3, 3\)"):
        load_pruned(fresh(), weights, recipe=RECIPE)


def test_a_file_that_could_run_code_is_refused(tmp_path):
    torch.save({"state_dict": small().state_dict(), "anything": nn.Linear(1, 1)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt holds more than .* such as \S+\.Linear, .*weights_only=False"):
        load_pruned(fresh(), tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none\.ckpt\. A Trainer writes them into"):
        load_pruned(fresh(), tmp_path / "none.ckpt")
