"""Biases of convolutions in front of a batch norm, which in training are left out."""

import copy

import pytest
import torch
from blocks import calls_of, is_one, run
from layers import channels_last
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import kernels, ops, recording, sites
from fastres.nn import BasicBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def made(**norm):
    conv, bn = nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48, **norm)
    with torch.no_grad():
        conv.bias.uniform_(-3, 3)
    return fastres.fuse(nn.Sequential(conv, bn, nn.ReLU()).train())


def results(model, x, dtype=torch.float32, autocast=None):
    """Output, buffers and gradients of a copy."""
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(x)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    output.backward(channels_last(grad).to(output.dtype))
    found = {"output": output.detach(), "input": x.grad, **dict(model.named_buffers())}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {name.replace("_orig_mod.", ""): value for name, value in found.items()}


def rms(tensor):
    return float(tensor.double().square().mean().sqrt())


MODELS = {
    "layer": made,
    "cumulative": lambda: made(momentum=None),
    "no statistics": lambda: made(track_running_stats=False),
    "not learned": lambda: made(affine=False),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", [channels_last, torch.Tensor.contiguous], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_as_float64(make, memory, dtype):
    model, x = make(), memory(torch.randn(8, 32, 12, 14))
    autocast = None if dtype == "float32" else torch.bfloat16
    ours = results(model, x, autocast=autocast)
    with sites.stock():
        stock, exact = results(model, x, autocast=autocast), results(model, x, torch.float64)
    for name, value in exact.items():
        if name == "gradient of 0.bias":
            assert rms(value) < 1e-12 and not ours[name].any()
            assert ours[name].dtype == stock[name].dtype
        else:
            assert rms(ours[name] - value) <= 1.5 * rms(stock[name] - value) + 1e-7 * rms(value), name


def test_few_values(few_values, monkeypatch):
    """Of which PyTorch's ops take care."""
    monkeypatch.undo()
    model, x = made(), channels_last(torch.randn(4, 32, 4, 4))
    ours = results(model, x)
    with sites.stock():
        stock = results(model, x)
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)


def test_in_inference_mode():
    """Where tensors count no versions."""
    with torch.inference_mode():
        model, x = made(), channels_last(torch.randn(8, 32, 12, 14))
        stock = copy.deepcopy(model)
        output = model(x)
        with sites.stock():
            torch.testing.assert_close(output, stock(x))
        torch.testing.assert_close(model[1].running_mean, stock[1].running_mean)


def test_the_convolution_is_ours():
    with recording.record() as records:
        made()(channels_last(torch.randn(8, 32, 12, 14)))
    assert [(record.ran, record.own_convolution) for record in records] == [("conv_bn_relu", True)]


def biased_block(frozen=()):
    block = BasicBlock(64, 96, 2, nn.Sequential(nn.Conv2d(64, 96, 1, 2), nn.BatchNorm2d(96)))
    block.conv1 = nn.Conv2d(64, 96, 3, 2, 1)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return block.train()


@pytest.mark.parametrize("frozen", [(), ("conv1.bias",), ("conv1.weight",), ("conv1.weight", "conv1.bias")])
def test_blocks(frozen):
    block, x = biased_block(frozen), channels_last(torch.randn(4, 64, 10, 11))
    ours, one = run(block, x)
    with sites.stock():
        stock, _ = run(block, x)
    assert one
    for name, value in stock.items():
        if value is None or name.endswith("conv1.bias") or name.endswith("downsample.0.bias"):
            assert (ours[name] is None) == (value is None) and not (value is not None and ours[name].any())
        else:
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3 * max(1, rms(value)))


def test_gradients_of_all_orders():
    model, x = made().double(), torch.randn(2, 32, 2, 3, dtype=torch.float64, requires_grad=True)
    conv, bn, _ = model

    def layer(x, weight, bias):
        statistics = torch.zeros(48).double(), torch.ones(48).double()
        return ops.conv_bn_relu(
            x, weight, *statistics, bn.weight, conv_bias=bias, padding=1, training=True
        ).square()[:, :2]

    arguments = x, conv.weight, conv.bias
    assert torch.autograd.gradcheck(layer, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, arguments, fast_mode=True)


def test_gradient_penalties_of_our_convolution():
    model, x = made(), channels_last(torch.randn(8, 32, 12, 14)).requires_grad_()

    def penalised(model):
        model = copy.deepcopy(model)
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    ours = penalised(model)
    with sites.stock():
        stock = penalised(model)
    for name, value in stock.items():
        if name == "0.bias":
            assert ours[name] is None or not ours[name].any()
        else:
            torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-3 * rms(value))


def test_checkpointed():
    block, x = biased_block(), channels_last(torch.randn(4, 64, 10, 11))
    plain, _ = run(block, x)
    again, _ = run(block, x, call=lambda block, x: checkpoint(block, x, use_reentrant=False))
    for name in plain:
        if "running" not in name and "tracked" not in name:  # a checkpointed forward runs twice
            assert (plain[name] is None) == (again[name] is None)
            assert plain[name] is None or torch.equal(plain[name], again[name]), name


@pytest.mark.parametrize("memory", [channels_last, torch.Tensor.contiguous], ids=["nhwc", "nchw"])
def test_the_running_mean_of_a_checkpointed_layer_has_it(memory):
    # The second forward ends within the layer's last op.
    model, x = made(), memory(torch.randn(8, 32, 12, 14)).requires_grad_()

    def running_mean(model):
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
        return model[1].running_mean

    ours = running_mean(copy.deepcopy(model))
    with sites.stock():
        torch.testing.assert_close(ours, running_mean(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("composed", [False, True])
def test_two_forwards_before_a_backward(composed, few_values, monkeypatch):
    monkeypatch.setattr(kernels, "few_values", few_values if composed else 0)
    model, x = made(), channels_last(torch.randn(8, 32, 6, 7))
    for memory in (channels_last, torch.Tensor.contiguous):
        losses = [model(memory(x)).square().sum() for _ in range(2)]
        for loss in losses:
            loss.backward()


def test_transforms_see_the_bias_used():
    model, x = made(track_running_stats=False), channels_last(torch.randn(4, 32, 6, 6))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    ours = torch.func.grad(loss)(parameters, x)
    with sites.stock():
        stock = torch.func.grad(loss)(parameters, x)
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-3, atol=1e-2)


def test_many_gradients_at_once():
    model, x = made(), channels_last(torch.randn(4, 32, 6, 6))
    output = model(x)
    many = torch.randn(3, *output.shape)
    grads = torch.autograd.grad(output, list(model.parameters()), many, is_grads_batched=True)
    assert [grad.shape for grad in grads] == [(3, *p.shape) for p in model.parameters()]
    assert not grads[1].any()


@pytest.mark.parametrize(
    "bias",
    [torch.zeros(1), torch.zeros(47), torch.zeros(48).double()],
    ids=["one", "47", "float64"],
)
def test_a_bias_that_pytorch_refuses(bias):
    x, weight = channels_last(torch.randn(4, 32, 6, 6)), torch.randn(48, 32, 3, 3)
    mean, var = torch.zeros(48), torch.ones(48)
    with pytest.raises(RuntimeError) as stock:
        F.conv2d(x, weight, bias)
    with pytest.raises(RuntimeError) as ours:
        ops.conv_bn_relu(x, weight, mean, var, conv_bias=bias, training=True)
    assert str(ours.value) == str(stock.value) and not mean.any()


def test_a_refused_batch_leaves_the_running_mean():
    model = made()
    with pytest.raises(ValueError, match="more than 1 value"):
        model(torch.randn(1, 32, 1, 1))
    assert not model[1].running_mean.any()


def test_a_compiled_model():
    model, x = made(), channels_last(torch.randn(8, 32, 12, 14))
    ours, eager = results(torch.compile(model, backend="aot_eager"), x), results(model, x)
    assert ours.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3)


def test_a_resnet_with_biases_trains_in_blocks():
    model = fastres.models.resnet18(num_classes=10).train()
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    calls = calls_of(model, channels_last(torch.randn(2, 3, 64, 64)))
    assert calls["_ResidualBlock"] == 8
    assert is_one(model.layer1(channels_last(torch.randn(2, 64, 16, 16))))
