"""Companion classifiers on hidden layers: their loss, that they follow cuts, and that the network knows nothing of them."""

import pytest
import torch
from torch import nn

from lit_compress.callbacks import PFAPruning
from lit_compress.modules import LitClassifier
from tests.modules import new_trainer, train_loader, val_loader
from tests.networks import Net

COMPANIONS = {"conv1": 6 * 6 * 6, "fc1": 20}


def supervised(**options):
    torch.manual_seed(0)
    parts = {"conv1": nn.Conv2d(1, 6, 3), "fc1": nn.Linear(6 * 36, 20), "fc2": nn.Linear(20, 10)}
    net = Net(lambda m, x: m.fc2(m.fc1(m.conv1(x).relu().flatten(1)).relu()), **parts)
    return LitClassifier(net, num_classes=10, companions=COMPANIONS, **options)


def test_companions_add_the_loss_of_classifiers_on_hidden_layers():
    module = supervised()
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    loss = module.training_step((images, labels), 0)
    maps = module.net.conv1(images)
    units = module.net.fc1(maps.relu().flatten(1))
    expected = [
        torch.nn.functional.cross_entropy(logits, labels)
        for logits in (module.net(images), module.companions[0](maps.flatten(1)), module.companions[1](units))
    ]
    torch.testing.assert_close(loss, sum(expected))
    assert not any(part._forward_hooks for part in module.net.modules())
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_companions_follow_a_cut_and_are_no_part_of_the_network(tmp_path):
    module = supervised()
    names = set(module.net.state_dict())
    callback = PFAPruning(keep_params=0.5, at_epoch=1)
    new_trainer(tmp_path, callback, max_epochs=2).fit(module, train_loader(), val_loader())
    conv, fc = module.net.conv1.out_channels, module.net.fc1.out_features
    assert conv < 6 or fc < 20
    assert [companion.in_features for companion in module.companions] == [conv * 36, fc]
    assert set(module.net.state_dict()) == names
    logged = new_trainer(tmp_path).validate(module, val_loader(), verbose=False)[0]
    assert logged["val/companion_loss"] > 0


def test_input_dropout_drops_in_training_alone():
    module = LitClassifier(Net(lambda m, x: x.flatten(1)), num_classes=4, input_dropout=0.5)
    seen = []
    module.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    batch = (torch.ones(100, 4), torch.zeros(100, dtype=torch.long))
    module.training_step(batch, 0)
    module.eval().validation_step(batch, 0)
    assert sorted(seen[0].unique().tolist()) == [0.0, 2.0]
    assert 0.3 < float((seen[0] == 0).float().mean()) < 0.7
    assert torch.equal(seen[1], batch[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"companions": {"conv9": 3}}, r"`companions` names \['conv9'\], which are no modules"),
        ({"input_dropout": 1.0}, r"`input_dropout` must lie in \[0, 1\)"),
    ],
)
def test_refuses_companions_and_dropout_that_cannot_be(options, text):
    with pytest.raises(ValueError, match=text):
        LitClassifier(nn.Sequential(nn.Linear(4, 4)), num_classes=4, **options)


def test_a_companion_of_another_size_is_told():
    module = supervised()
    module.companions[0] = nn.Linear(7, 10)
    with pytest.raises(ValueError, match="Module 'conv1' gives 216 numbers a sample, but `companions` says 7"):
        module.training_step((torch.rand(2, 1, 8, 8), torch.arange(2)), 0)
