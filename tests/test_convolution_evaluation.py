"""conv_bn_relu in evaluation: the norm folded into the weights, the rest done as the output is stored."""

import pytest
import torch
from layers import LEARNED, PRECISIONS, Case, assert_accurate, conv_bn_relu
from torch.nn import functional as F

from fastres import convolution, ops

pytestmark = pytest.mark.usefixtures("one_thread", "small_layers")


@pytest.fixture
def calls(monkeypatch):
    """Of the convolution that stores with bias, residual and activation."""
    made, forward = [], convolution._forward
    monkeypatch.setattr(convolution, "_forward", lambda *a: made.append(a) or forward(*a))
    return made


@pytest.mark.parametrize("conv_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", ["float32", "bfloat16-autocast"])
def test_evaluation_is_as_accurate_as_stock(name, residual, activation, conv_bias, calls):
    precision = PRECISIONS[name]
    case = Case(precision, residual, training=False, activation=activation)
    if conv_bias:
        case.values["conv_bias"] = torch.randn(64)
    before = case.values["running_mean"].clone()
    with torch.no_grad():
        reference = conv_bn_relu(**case.leaves(double=True), **case.by)
        with precision.context():
            fused, stock = (f(**case.leaves(), **case.by) for f in (ops.conv_bn_relu, conv_bn_relu))
    assert len(calls) == precision.convolves
    assert_accurate("output", fused, stock, reference)
    assert torch.equal(case.values["running_mean"], before)


@pytest.mark.parametrize("activation", ["relu", None])
def test_folded_and_unfolded_agree(activation, calls):
    """Folding rounds each weight and each channel's bias a few times more than not folding."""
    case = Case(training=False, activation=activation)
    with torch.no_grad():
        folded = ops.conv_bn_relu(**case.leaves(), **case.by)
    unfolded = ops.conv_bn_relu(**case.leaves(), **case.by)
    assert len(calls) == 1 and unfolded.requires_grad
    v = {name: value.double() for name, value in case.values.items()}
    scale = (v["bn_weight"] / (v["running_var"] + case.by["eps"]).sqrt()).abs().view(-1, 1, 1)
    products = F.conv2d(v["input"].abs(), v["weight"].abs(), padding=1) * scale
    mean, bias = (v[name].view(-1, 1, 1).abs() for name in ("running_mean", "bn_bias"))
    magnitude = products + mean * scale + bias + v["residual"].abs()
    # Higham 2002, (3.5): the products of a sum, and some ten operations before and behind it, on each side.
    operations = 2 * (v["weight"][0].numel() + 10)
    bound = operations * torch.finfo(torch.float32).eps / 2 * magnitude
    assert ((folded.double() - unfolded.double()).abs() <= bound).all()


def test_evaluation_with_gradients_equals_stock():
    case = Case(training=False)
    results = []
    for function, double in ((ops.conv_bn_relu, False), (conv_bn_relu, False), (conv_bn_relu, True)):
        leaves = case.leaves(double)
        output = function(**leaves, **case.by)
        output.backward(case.grad.to(output.dtype))
        results.append([output, *(leaves[name].grad for name in LEARNED)])
    for tensors in zip(*results, strict=True):
        assert_accurate("evaluation", *tensors)
