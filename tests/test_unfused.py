"""Sites of few values are left to their modules once it is known that nothing of them runs fused."""

import copy
import gc

import pytest
import torch
from layers import channels_last
from saving import kept
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import kernels, ops, recording, sites, unfused


@pytest.fixture(autouse=True)
def usual(few_values, monkeypatch):
    """Few values are as many as they are for users."""
    monkeypatch.setattr(kernels, "few_values", few_values)


@pytest.fixture
def asked(monkeypatch):
    """How often the fused op was called, which asks whether it runs fused."""
    calls = []
    own = ops.conv_bn_act
    monkeypatch.setattr(ops, "conv_bn_act", lambda *args: calls.append(args) or own(*args))
    return calls


def layer(channels=24, groups=24, bias=False):
    """Of a convolution that is PyTorch's: there are no kernels for groups of one channel."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=bias)
    return conv, nn.BatchNorm2d(channels), nn.ReLU()


def images(channels=24, side=8):
    return channels_last(torch.randn(2, channels, side, side))


def call(modules, input, **options):
    return sites.conv_bn_act(*modules, input, relu=True, **options)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_asked_once(asked, training):
    modules = layer()
    stock = copy.deepcopy(modules)
    for module in (*modules, *stock):
        module.train(training)
    input = images()
    for _ in range(3):
        output, (conv, bn, act) = call(modules, input), stock
        torch.testing.assert_close(output, act(bn(conv(input))), rtol=0, atol=0)
    assert len(asked) == 1
    for ours, theirs in zip(modules[1].buffers(), stock[1].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_another_kind_of_call_is_asked_anew(asked):
    modules = layer()
    input = images()
    call(modules, input)
    for another in (images(side=9), images(side=9), input.contiguous(), input.double().float()):
        call(modules, another)
    assert len(asked) == 3  # the size, and the memory layout
    with torch.no_grad():
        call(modules, input)
    modules[1].eval()
    call(modules, input)
    assert len(asked) == 5


@pytest.mark.parametrize("groups, side", [(24, 64), (1, 8)], ids=["many values", "own convolution"])
def test_what_runs_fused_is_not_left(asked, groups, side):
    modules, input = layer(groups=groups), images(side=side)
    for _ in range(3):
        call(modules, input)
    assert len(asked) == 3


def test_who_listens_hears_of_each_call():
    modules, input = layer(), images()
    call(modules, input)
    with recording.record() as records:
        for _ in range(2):
            call(modules, input)
    assert [(record.ran, record.fused) for record in records] == [("conv_bn_relu", False)] * 2
    assert "PyTorch's own operations are as fast" in records[0].reason[1]


def test_hooks_and_sums_of_what_is_left():
    conv, bn, act = modules = layer()
    input, residual = images(), images()
    called = []
    for _ in range(2):
        expected = torch.relu(bn(conv(input)) + residual)
        torch.testing.assert_close(call(modules, input, residual=residual), expected, rtol=0, atol=0)
    bn.register_forward_hook(lambda *_: called.append("bn"))
    call(modules, input, add=lambda a, b: called.append("add") or a + b, residual=residual)
    assert called == ["bn", "add"]


def test_a_transform_leaves_nothing_behind(asked):
    """Under vmap no convolution is ours, whose few values it would be the faster one of without."""
    modules = layer(groups=1)
    for module in modules:
        module.eval()
    batches = torch.stack([images(), images()]).movedim(2, -1).contiguous().movedim(-1, 2)
    with torch.no_grad():
        for _ in range(2):
            torch.func.vmap(lambda input: call(modules, input))(batches)
        assert len(asked) == 2
        with recording.record() as records:
            call(modules, images())
    assert records[0].own_convolution


def test_nothing_is_known_of_modules_that_are_gone():
    modules = layer()
    call(modules, images())
    numbers = tuple(map(id, modules[:2]))
    assert numbers in unfused._known
    del modules
    gc.collect()
    assert numbers not in unfused._known


def after_a_fused_layer():
    layers = [nn.Conv2d(24, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), *layer(64, 64)]
    return fastres.fuse(nn.Sequential(*layers)).to(memory_format=torch.channels_last)


def kept_by(model, input):
    with kept() as count:
        output = model(input)
    assert output.requires_grad
    return count()


def test_every_call_keeps_as_little():
    model, input = after_a_fused_layer(), images()
    first, second = (kept_by(model, input) for _ in range(2))
    assert first == second


def test_a_checkpoint_may_learn_and_then_know():
    model, input = after_a_fused_layer(), images().requires_grad_()
    for _ in range(2):
        checkpoint(model, input, use_reentrant=False).sum().backward()


def test_a_bias_in_training_is_left_out_each_time():
    modules, input = layer(bias=True), images()
    outputs = []
    for _ in range(2):
        outputs.append(call(modules, input))
        outputs[-1].square().sum().backward()
        assert not modules[0].bias.grad.any()
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_what_is_compiled_does_not_depend_on_it():
    model, input, counter = fastres.fuse(nn.Sequential(*layer())), images(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(input)
    model(input)
    compiled(input)
    assert counter.frame_count == 1


def test_what_else_a_call_is_known_by(asked):
    modules, input = layer(), images()
    call(modules, input)
    with torch.autocast("cpu", torch.bfloat16):
        call(modules, input)
    modules[0].weight.requires_grad_(False)
    call(modules, input)
    call(modules, input.clone().requires_grad_())
    call((layer()[0], *modules[1:]), input)
    assert len(asked) == 5


def test_stock_layers_are_stock_layers():
    model, input = after_a_fused_layer(), images()
    with sites.stock():
        expected = kept_by(model, input)
    assert kept_by(model, input) < expected
    with sites.stock():
        assert kept_by(model, input) == expected


@pytest.mark.parametrize("at", [0, 1, 2], ids=["convolution", "batch norm", "ReLU"])
def test_a_part_in_torchscript_is_called(at):
    model, input = fastres.fuse(nn.Sequential(*layer())), images()
    model[at] = torch.jit.script(model[at])
    stock = fastres.unfuse(model)
    torch.testing.assert_close(model(input), stock(input), rtol=0, atol=0)
