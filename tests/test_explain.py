"""explain(): each block, what ran, and why not."""

import copy
import random
from importlib import import_module

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastres.explain import explain
from fastres.fuse import fuse


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.scale = 1.0

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out) * self.scale


class Straight(Block):
    """Without a call between conv2 and the sum."""

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


@pytest.fixture
def x():
    return torch.randn(2, 4, 8, 8)


@pytest.fixture
def model():
    return nn.Sequential(Block(), Straight())


def row(explanation, name):
    (found,) = [row for row in explanation.rows if row.name == name]
    return found


def test_every_block_of_a_resnet(torchvision):
    explanation = explain(fuse(torchvision.models.resnet18()), torch.randn(2, 3, 32, 32))
    assert [row.name for row in explanation.rows] == [
        "ResNet",
        *(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)),
    ]
    assert all(row.fused and not row.stock for row in explanation.rows)
    assert row(explanation, "layer1.0").ran == ("conv_bn_relu", "conv_bn_add_relu")
    assert row(explanation, "layer2.0").ran == ("conv_bn_relu", "conv_bn", "conv_bn_add_relu")
    assert explanation.summary == "9 of 9 blocks fused"


def test_every_block_of_transformers(torchvision):
    transformers = import_module("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic"
    )
    model = fuse(transformers.ResNetForImageClassification(config))
    explanation = explain(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert explanation.summary == "5 of 5 blocks fused"
    assert explanation.rows[-1].name == "resnet.encoder.stages.1.layers.1"
    assert explanation.rows[-1].ran == ("conv_bn_relu", "conv_bn_add_relu")


def test_a_model_that_is_not_fused(model, x):
    explanation = explain(model, x)
    assert "0: stock, not fused; call fastres.fuse(model)" in str(explanation)
    assert row(explanation, "0").stock == ("0.bn1", "0.relu", "0.bn2")
    assert explanation.summary == "0 of 3 blocks fused, 3 stock"


def test_a_hook_in_a_block_that_runs_its_original_forward(model, x):
    model = fuse(model)
    model[0].bn2.register_forward_hook(lambda *_: None)
    explanation = explain(model, x)
    assert "0: stock, a forward hook is set on 0.bn2" in str(explanation)
    assert row(explanation, "0").stock == ("0.bn1", "0.relu", "0.bn2")
    assert explanation.summary == "2 of 3 blocks fused, 1 stock"


def test_a_hook_in_a_block_that_runs_fused_in_part(model, x):
    model = fuse(model)
    model[1].bn2.register_forward_hook(lambda *_: None)
    explanation = explain(model, x)
    found = row(explanation, "1")
    assert found.status == "partly"
    assert found.ran == ("conv_bn_relu",)
    assert found.stock == ("1.bn2", "1.relu")
    assert "a forward hook is set on 1.bn2" in str(found)
    assert explanation.summary == "1 of 2 blocks fused, 1 partly"


def test_a_hook_in_a_container_that_was_fused_into_its_parent(torchvision):
    modeling = import_module("transformers.models.resnet.modeling_resnet")
    block = fuse(nn.Sequential(modeling.ResNetBasicLayer(4, 4)))
    block[0].layer[1].register_forward_hook(lambda *_: None)
    assert "0: stock, a hook is set on 0.layer.1" in str(explain(block, torch.randn(2, 4, 8, 8)))


def test_a_forward_that_cannot_be_traced(x):
    class Random(Block):
        def forward(self, x):
            if random.random() < 0:
                return x
            return self.relu(self.bn1(self.conv1(x)))

    explanation = explain(fuse(nn.Sequential(Random())), x)
    assert (
        "0: stock, forward could not be traced: forward uses random.random, on which its result may depend"
        in str(explanation)
    )


@pytest.mark.parametrize(
    "forward, reason",
    [
        (
            lambda self, x: self.relu(self.bn1(x)) if x.dim() == 4 else x,
            "symbolically traced variables cannot be used",
        ),
        (lambda self, *x: self.relu(self.bn1(x[0])), "forward takes *x"),
        (lambda self, x: (print(end=""), self.relu(self.bn1(x)))[1], "<lambda> uses print"),
    ],
)
def test_reasons_why_a_forward_cannot_be_traced(forward, reason, x):
    cls = type("Odd", (Block,), {"forward": forward})
    assert reason in str(explain(fuse(cls(), inplace=True), x))


def test_an_attribute_that_changed(model, x):
    model = fuse(model)
    model[0].scale = 2.0
    assert "0: stock, 0.scale was 1.0 when fuse() ran" in str(explain(model, x))


def test_a_child_that_was_taken_away(model, x):
    model = fuse(model)
    model[0].shortcut = None
    with pytest.raises(TypeError):
        explain(model, x)
    model[0].shortcut = nn.Sequential(nn.Identity())
    assert "0.shortcut: " not in str(explain(model, x))  # nothing in it to tell of


def test_an_argument_that_is_no_default(x):
    class Optional(Block):
        def forward(self, x, residual=None):
            out = self.bn1(self.conv1(x))
            return self.relu(out if residual is None else out + residual)

    model = fuse(Optional())
    assert explain(model, x).summary == "1 of 1 blocks fused"
    assert "stock, the argument residual was passed" in str(explain(model, (x, x)))
    assert "stock, the argument residual was passed" in str(explain(model, {"x": x, "residual": x}))


def test_sync_batch_norm(model, x):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(model)).eval()
    text = str(explain(model, x))
    assert "SyncBatchNorm" in text
    assert "1.bn1" in text


def test_batch_norms_of_other_classes_are_named(timm):
    model = timm.create_model("resnetv2_50", num_classes=10).eval()
    with torch.no_grad():
        explanation = explain(fuse(model), torch.randn(1, 3, 32, 32))
    assert "norm1: stock, BatchNormAct2d is not fused, only nn.BatchNorm1d, 2d and 3d are" in str(
        explanation
    )


def test_layers_that_stand_alone(x):
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            x = self.twice(torch.tanh(self.first(x)))
            return F.relu(x) + x + self.relu(x * 2)

    text = str(explain(fuse(Alone()), x))
    assert "first: neither a ReLU follows it nor an nn.Conv2d precedes it" in text
    assert "twice: its result is used more than once" in text
    assert "relu: it does not follow a batch norm or a residual sum" in text


def test_functions_count_as_the_block_that_calls_them(x):
    class Sum(nn.Module):
        def forward(self, x):
            return F.relu(x + x.flip(0))

    (found,) = explain(fuse(nn.Sequential(Sum())), x).rows
    assert (found.name, found.ran) == ("0", ("add_relu",))


def test_the_mode_is_the_present_one(x):
    class Mode(Block):
        def forward(self, x):
            out = self.bn1(self.conv1(x))
            if self.training:
                return torch.tanh(out)
            return self.relu(out)

    model = fuse(Mode())
    assert explain(model, x).rows[0].ran == ("conv_bn",)
    assert explain(model.eval(), x).rows[0].ran == ("conv_bn_relu",)


def test_a_compiled_model_is_told_of_as_the_model_in_it(model, x):
    compiled = torch.compile(fuse(model), backend="eager")
    assert explain(compiled, x).summary == "2 of 2 blocks fused"


def test_nothing_changes(model, x):
    model = fuse(nn.Sequential(model, nn.Dropout()))
    before = copy.deepcopy(model.state_dict())
    buffers = [(b, b._version) for b in model.buffers()]
    random_numbers = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    model.register_forward_hook(lambda *_: (random.random(), numpy.random.random()) and None)
    attributes = [dict(vars(m)) for m in model.modules()]
    kept = x.clone()
    explain(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        a is b and a._version == version for a, (b, version) in zip(model.buffers(), buffers, strict=True)
    )
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random_numbers[0])
    assert random.getstate() == random_numbers[1]
    assert numpy.random.get_state()[1].tolist() == random_numbers[2]
    assert torch.equal(x, kept)
    assert all(p.grad is None for p in model.parameters())


def test_everything_is_put_back_when_the_model_raises(model):
    model = fuse(model)
    with pytest.raises(RuntimeError):
        explain(model, torch.randn(2, 5, 8, 8))
    assert nn.Module.__call__.__name__ == "_wrapped_call_impl"
    assert all(b.sum() in (0, 4) for b in model.buffers())


def test_attributes_that_a_forward_sets_are_put_back(x):
    class Counts(Block):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.relu(self.bn1(self.conv1(x)))

    model = Counts()
    explain(model, x)
    assert model.calls == 0


def test_not_a_module(x):
    with pytest.raises(TypeError, match="fastres.explain: model has type int, expected torch.nn.Module"):
        explain(3, x)


def test_says_that_functions_of_batch_norm_are_no_blocks(x):
    class Functions(Block):
        def forward(self, x):
            bn = self.bn1
            return F.relu(F.batch_norm(self.conv1(x), bn.running_mean, bn.running_var, bn.weight, bn.bias))

    told = explain(fuse(Functions()), x)
    assert told.rows == () and str(told).startswith(
        "no block was found: fused are nn.Conv2d, nn.BatchNorm2d"
    )
