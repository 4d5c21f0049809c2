"""Whatever holds tensors of a network follows its cut: optimizers, averages, state dicts; plans compose and can be stored."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lion_pytorch import Lion
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_compress import Plan, Recipe, cut
from lit_compress.plan import note_plan, plan_of
from tests.networks import clone, conv, randomized

KEEP = [0, 2, 3, 6]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))


def mlp(hidden=7):
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3))


def step(model, optimizer):
    optimizer.zero_grad()
    F.mse_loss(model(X), Y).backward()
    optimizer.step()


def by_hand(name, tensor):
    """What remains of a tensor that belongs to a parameter of the MLP."""
    if name == "0.weight":
        return tensor[KEEP]
    if name == "0.bias":
        return tensor[KEEP]
    if name == "2.weight":
        return tensor[:, KEEP]
    return tensor


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW with amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adam, over all tensors at once": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Lion, of another package": lambda p: Lion(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_next_step_is_that_of_a_small_network_sliced_by_hand(make):
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    small, names = mlp(len(KEEP)), [name for name, _ in model.named_parameters()]
    small.load_state_dict({name: by_hand(name, tensor) for name, tensor in model.state_dict().items()})
    beside = make(small.parameters())
    state = copy.deepcopy(optimizer.state_dict())
    for index, name in enumerate(names):
        held = state["state"].get(index, {})
        for key, value in held.items():
            if isinstance(value, torch.Tensor) and value.shape == dict(mlp().named_parameters())[name].shape:
                held[key] = by_hand(name, value).clone()
    beside.load_state_dict(state)

    groups, held = optimizer.param_groups, {id(p): id(s) for p, s in optimizer.state.items()}
    plan = cut(model, Recipe(keep={"0": KEEP}), X)
    plan.apply_to(optimizer)
    assert optimizer.param_groups is groups
    assert {id(p): id(s) for p, s in optimizer.state.items()} == held
    for _ in range(3):
        step(model, optimizer)
        step(small, beside)
        for mine, other in zip(model.parameters(), small.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


def lbfgs_by_hand(state, shapes):
    """The state of an LBFGS over the small network: rows sliced, and their products made anew."""

    def row(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        cut = [by_hand(name, part.view(shape)) for part, (name, shape) in zip(parts, shapes.items(), strict=True)]
        return torch.cat([part.flatten() for part in cut])

    state["d"], state["prev_flat_grad"] = row(state["d"]), row(state["prev_flat_grad"])
    gradients, steps = map(row, state["old_dirs"]), map(row, state["old_stps"])
    pairs = [(y, s) for y, s in zip(gradients, steps, strict=True) if (y * s).sum() > 1e-10]
    state["old_dirs"], state["old_stps"] = [y for y, _ in pairs], [s for _, s in pairs]
    state["ro"] = [1 / (y * s).sum() for y, s in pairs]
    state["H_diag"] = (pairs[-1][0] * pairs[-1][1]).sum() / pairs[-1][0].square().sum()


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_the_history_of_lbfgs_follows(line_search):
    def make(model):
        return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3, history_size=4, line_search_fn=line_search)

    def step(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = F.mse_loss(model(X.double()), Y.double())
            loss.backward()
            return loss

        optimizer.step(closure)

    torch.manual_seed(0)
    model, small = mlp().double(), mlp(len(KEEP)).double()
    optimizer, beside = make(model), make(small)
    for _ in range(3):
        step(model, optimizer)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    small.load_state_dict({name: by_hand(name, tensor) for name, tensor in model.state_dict().items()})
    state = copy.deepcopy(optimizer.state_dict())
    lbfgs_by_hand(state["state"][0], shapes)
    beside.load_state_dict(state)
    before = optimizer.state[next(model.parameters())]["func_evals"]

    cut(model, Recipe(keep={"0": KEEP}), X.double()).apply_to(optimizer)
    for _ in range(2):
        step(model, optimizer)
        step(small, beside)
        for mine, other in zip(model.parameters(), small.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)  # products are summed in another order
    assert optimizer.state[next(model.parameters())]["func_evals"] > before


def test_groups_options_and_schedule_go_on():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.1, "custom": "kept"}, {"params": model[2].parameters()}], lr=0.01
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=10)
    step(model, optimizer)
    scheduler.step()
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    params = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    cut(model, Recipe(keep={"0": KEEP}), X).apply_to(optimizer)
    assert [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups] == before
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == params
    step(model, optimizer)
    scheduler.step()
    assert scheduler.last_epoch == 2
    assert all(s["exp_avg"].shape == p.shape for p, s in optimizer.state.items())


def test_an_optimizer_that_has_not_stepped_or_holds_something_else_is_left_alone():
    torch.manual_seed(0)
    model, other = mlp(), mlp()
    fresh, foreign = torch.optim.Adam(model.parameters()), torch.optim.Adam(other.parameters())
    step(other, foreign)
    held = copy.deepcopy(foreign.state_dict())
    plan = cut(model, Recipe(keep={"0": KEEP}), X)
    plan.apply_to(fresh)
    plan.apply_to(foreign)
    assert not fresh.state
    assert_same(foreign.state_dict(), held)
    step(model, fresh)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Nested(torch.optim.SGD):
    """SGD with momentum that keeps it, and what came before, in containers."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                held = self.state[p].setdefault("held", {"momentum": [torch.zeros_like(p)], "past": (), "steps": 0})
                held["momentum"][0].mul_(0.9).add_(p.grad)
                held["past"] = (*held["past"][-1:], p.grad.clone())
                held["steps"] += 1
                p.data.sub_(group["lr"] * (held["momentum"][0] + sum(held["past"])))


def test_state_in_lists_and_dicts_follows():
    torch.manual_seed(0)
    model = mlp()
    optimizer = Nested(model.parameters(), lr=0.01)
    for _ in range(3):
        step(model, optimizer)
    before = copy.deepcopy(optimizer.state[model[0].weight]["held"])
    plan = cut(model, Recipe(keep={"0": KEEP}), X)
    plan.apply_to(optimizer)
    held = optimizer.state[model[0].weight]["held"]
    assert_same(held["momentum"][0], before["momentum"][0][list(KEEP)])
    assert_same(held["past"], tuple(one[list(KEEP)] for one in before["past"]))
    assert held["steps"] == 3
    step(model, optimizer)


class Factored(torch.optim.SGD):
    """Keeps a number a row, as Adafactor does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"rows": p.detach().new_ones(len(p), 1), "whole": p.detach().clone()}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda p: Factored(p, lr=0.1),
            r"Factored keeps 'rows' of shape \(7, 1\) for parameter '0\.weight' of shape \(7, 4\); .* Cut before",
        ),
    ],
    ids=["factored"],
)
def test_state_that_cannot_follow_is_refused_and_stays(make, said):
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    held = copy.deepcopy(optimizer.state_dict())
    plan = cut(model, Recipe(keep={"0": KEEP}), X)
    with pytest.raises(ValueError, match=said):
        plan.apply_to(optimizer)
    assert_same(optimizer.state_dict(), held)


def test_an_optimizer_is_cut_once():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    plan = cut(model, Recipe(keep={"0": KEEP}), X)
    plan.apply_to(optimizer)
    held = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"keeps 'exp_avg' of shape \(4, 4\) for parameter '0\.weight' of shape \(7, 4\)"):
        plan.apply_to(optimizer)
    assert_same(optimizer.state_dict(), held)


# ---------------------------------------------------------------- averages and state dicts


def rich(seed=0):
    """A network with norms, a tied weight, and a buffer that no state dict holds."""

    class Rich(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.b, self.c = conv(3, 6), nn.BatchNorm2d(6), conv(6, 6), conv(6, 6)
            self.c.weight = self.b.weight
            self.register_buffer("mask", torch.rand(6, 1, 1), persistent=False)
            self.end = nn.Linear(6, 2)

        def forward(self, x):
            y = F.relu(self.n(self.a(x)))
            return self.end((self.c(F.relu(self.b(y))) * self.mask).mean((2, 3)))

    torch.manual_seed(seed)
    return randomized(Rich(), seed).eval()


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))
RECIPE = Recipe(keep={"a": (1, 2, 5)}, method="by hand")


@pytest.mark.parametrize("buffers", [False, True])
def test_an_average_of_the_weights_follows(buffers):
    model = rich()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    for p in model.parameters():
        p.data.mul_(1.5)
    average.update_parameters(model)
    whole, parameters = copy.deepcopy(average), list(average.parameters())
    plan = cut(model, RECIPE, IMAGES)
    plan.apply_to(average)
    # The same as cutting the average itself.
    cut(whole, RECIPE, IMAGES)
    assert_same(average.state_dict(), whole.state_dict())
    assert [id(p) for p in average.parameters()] == [id(p) for p in parameters]
    assert average.module.a.out_channels == 3
    assert average.module.c.weight is average.module.b.weight
    assert plan_of(average) == plan.renamed(add="module.")
    average.update_parameters(model)
    average.eval()(IMAGES)


@pytest.mark.parametrize(("add", "drop"), [("", ""), ("module.", ""), ("net.", ""), ("model._forward_module.", ""), ("", "net.")])
def test_a_state_dict_follows_under_any_prefix(add, drop):
    model = rich()
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target = {add + name: tensor for name, tensor in states.items()}
    target["something else"] = torch.ones(6)
    untouched = [name for name in target if name.endswith(("end.bias", "num_batches_tracked", "something else"))]
    kept = {name: target[name] for name in untouched}
    plan = cut(model, RECIPE, IMAGES)
    if drop:
        plan = plan.renamed(add=drop)
    plan.apply_to(target)
    assert all(target[name] is kept[name] for name in untouched)
    fresh = rich(seed=1)
    cut(fresh, RECIPE, IMAGES)
    fresh.load_state_dict({name: target[add + name] for name in states})
    fresh.mask.copy_(model.mask)
    assert_same(fresh(IMAGES), model(IMAGES))


def broken(states, name, shape):
    states[name] = torch.zeros(shape)
    return states


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            lambda: broken(rich().state_dict(), "c.weight", (6, 5, 3, 3)),
            r"Tensor 'c\.weight' should have shape \(6, 6, 3, 3\) before",
        ),
        (lambda: {"a.weight": torch.zeros(6, 3, 3, 3)}, r"The state dict lacks \['a\.bias', 'b\.bias', 'b\.weight'\]"),
        (
            lambda: {p + n: t for p in ("x.", "y.") for n, t in rich().state_dict().items()},
            "or holds more than one copy of this one",
        ),
        (mlp, "The module lacks"),
    ],
    ids=["shape", "missing", "two copies", "other module"],
)
def test_a_target_that_does_not_fit_is_refused_and_stays(target, said):
    plan = cut(rich(), RECIPE, IMAGES)
    target = target()
    states = target.state_dict() if isinstance(target, nn.Module) else target
    before = {name: (id(tensor), tensor.clone()) for name, tensor in states.items()}
    with pytest.raises(ValueError, match=said):
        plan.apply_to(target)
    states = target.state_dict() if isinstance(target, nn.Module) else target
    assert list(states) == list(before)
    for name, tensor in states.items():
        assert isinstance(target, nn.Module) or id(tensor) == before[name][0]
        assert_same(tensor, before[name][1])


def test_a_module_that_was_cut_is_not_cut_again():
    model, other = rich(), rich()
    plan = cut(model, RECIPE, IMAGES)
    plan.apply_to(other)
    states = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"should have shape \(6, 3, 3, 3\) before the cut but has \(3, 3, 3, 3\); it was cut already"
    ):
        plan.apply_to(other)
    assert_same(other.state_dict(), states)
    assert plan_of(other) == plan


def test_only_what_holds_tensors_can_follow():
    plan = cut(rich(), RECIPE, IMAGES)
    with pytest.raises(TypeError, match="Expected an optimizer, a module or a state dict but got list"):
        plan.apply_to([])
    with pytest.raises(ValueError, match="knows no parameters, only names; bind it"):
        copy.deepcopy(plan).apply_to(torch.optim.SGD(rich().parameters(), lr=1))


# ---------------------------------------------------------------- composition


SECOND = Recipe(keep={"a": (0, 2)}, method="again")


def test_two_cuts_in_a_row_are_one_cut_of_a_fresh_network():
    twice = rich()
    first = cut(twice, RECIPE, IMAGES)
    second = cut(twice, SECOND, IMAGES)
    composed = plan_of(twice)
    assert composed == first.then(second)
    assert composed.recipe.keep["a"] == (1, 5)
    assert composed.recipe.method == "by hand then again"

    by_plan, by_recipe, states = rich(), rich(), rich().state_dict()
    composed.apply_to(by_plan)
    cut(by_recipe, composed.recipe, IMAGES)
    composed.apply_to(states)
    for other in (by_plan, by_recipe):
        assert_same(other.state_dict(), twice.state_dict())
        assert_same(other.mask, twice.mask)
        assert_same(other(IMAGES), twice(IMAGES))
        assert plan_of(other).keep == composed.keep
        assert other.c.weight is other.b.weight
    assert_same(dict(states), dict(twice.state_dict()))


def test_a_second_cut_of_other_layers_keeps_both():
    model, fresh = mlp(), mlp()
    fresh.load_state_dict(model.state_dict())
    model.append(nn.Tanh()).append(nn.Linear(3, 2))
    fresh.append(copy.deepcopy(model[3])).append(copy.deepcopy(model[4]))
    cut(model, Recipe(keep={"0": KEEP}), X)
    cut(model, Recipe(keep={"2": (1,)}), X)
    plan_of(model).apply_to(fresh)
    assert_same(fresh.state_dict(), model.state_dict())


@st.composite
def keeps(draw, number):
    """A shape, and for each of some cuts in a row the indices kept along some of its dimensions."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    cuts, left = [], list(shape)
    for _ in range(number):
        dims = {}
        for dim in draw(st.sets(st.sampled_from(range(len(shape))))):
            dims[dim] = tuple(sorted(draw(st.sets(st.integers(0, left[dim] - 1), min_size=1))))
        cuts.append(Plan(recipe=Recipe(keep={}), keep={"t": dims} if dims else {}, shapes={"t": tuple(left)} if dims else {}))
        left = [len(dims[dim]) if dim in dims else size for dim, size in enumerate(left)]
    return tuple(shape), tuple(left), cuts


@given(keeps(3))
def test_taking_by_a_composed_plan_is_taking_in_a_row(case):
    shape, left, (a, b, c) = case
    tensor = torch.arange(torch.tensor(shape).prod().item()).view(shape)
    composed = a.then(b).then(c)
    assert composed == a.then(b.then(c))
    taken = c.take("t", b.take("t", a.take("t", tensor)))
    assert_same(composed.take("t", tensor), taken)
    assert taken.shape == left == composed.shape_after("t", shape)
    assert Plan.from_dict(json.loads(json.dumps(composed.to_dict()))) == composed


def test_a_plan_that_is_stored_is_the_same_plan(tmp_path):
    plan = cut(rich(), RECIPE, IMAGES)
    torch.save(plan.to_dict(), tmp_path / "plan.pt")
    stored = torch.load(tmp_path / "plan.pt", weights_only=True)
    assert Plan.from_dict(stored) == Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan
    assert plan.transient == ("mask",)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"format": 3}, "has format 3 but this version of lit-compress reads formats up to 2; upgrade"),
        ({}, "has format None"),
        ({"format": 2, "keep": {}}, r"Expected a plan but \['pads', 'recipe', 'shapes', 'transient'\] are missing"),
    ],
)
def test_what_is_no_plan_is_refused(data, said):
    with pytest.raises(ValueError, match=said):
        Plan.from_dict(data)


def test_a_plan_says_only_what_it_knows():
    plan = cut(rich(), RECIPE, IMAGES)
    assert plan.shape_after("a.weight") == (3, 3, 3, 3)
    assert plan.shape_after("end.bias", (2,)) == (2,)
    whole = torch.zeros(9)
    assert plan.take("unknown", whole) is whole
    with pytest.raises(ValueError, match=r"does not know tensor 'end\.bias'"):
        plan.shape_after("end.bias")
    with pytest.raises(ValueError, match=r"Tensor 'a\.bias' should have shape \(6,\) before the cut but has \(7,\)"):
        plan.take("a.bias", torch.zeros(7))


# ---------------------------------------------------------------- what a network knows of its cuts


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.end = rich(), nn.Linear(2, 2)

    def forward(self, x):
        return self.end(F.relu(self.net(x)))


@pytest.mark.parametrize("order", ["inner first", "outer first", "outer, inner, outer"])
def test_cuts_of_a_network_and_of_its_holder_add_up(order):
    torch.manual_seed(0)
    holder, fresh = Holder(), Holder()
    fresh.load_state_dict(holder.state_dict())
    inner = lambda recipe: cut(holder.net, recipe, IMAGES)  # noqa: E731
    outer = lambda recipe: cut(holder, recipe.renamed(add="net."), IMAGES)  # noqa: E731
    for cutting, recipe in zip(
        {"inner first": [inner, outer], "outer first": [outer, inner], "outer, inner, outer": [outer, inner, outer]}[order],
        [RECIPE, SECOND, Recipe(keep={"a": (1,)})],
        strict=False,
    ):
        cutting(recipe)
    composed = plan_of(holder)
    assert composed.recipe.keep["net.a"] == ((5,) if order == "outer, inner, outer" else (1, 5))
    composed.apply_to(fresh)
    assert_same(fresh.state_dict(), holder.state_dict())
    assert sum("lit_compress_plan" in vars(module) for module in holder.modules()) == (2 if order == "outer first" else 1)


def test_what_is_noted_can_be_taken_back_and_is_in_no_state_dict():
    model = rich()
    plan = cut(model, RECIPE, IMAGES)
    note_plan(model, None)
    assert plan_of(model) is None
    note_plan(model, plan)
    assert plan_of(pickle.loads(pickle.dumps(nn.Sequential(conv(3, 2))))) is None
    holder = nn.Sequential(model)
    assert plan_of(holder) == plan.renamed(add="0.")
    assert plan_of(copy.deepcopy(holder)) == plan.renamed(add="0.")
    assert clone(model(IMAGES))
    assert set(model.state_dict()) == set(rich().state_dict())


def test_a_plan_of_the_first_format_is_read_as_one_without_padded_blocks():
    torch.manual_seed(0)
    plan = cut(mlp(), Recipe(keep={"0": KEEP}), X)
    old = {name: value for name, value in plan.to_dict().items() if name not in ("pads", "transient")} | {"format": 1}
    assert Plan.from_dict(old) == plan
    assert Plan.from_dict(old).to_dict()["format"] == 2
