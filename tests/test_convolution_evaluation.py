"""conv_bn_relu in evaluation: all that follows the convolution is done as its output is stored."""

import pytest
import torch
from convolving import KERNELS, Shape, failures, poisoned
from layers import LEARNED, PRECISIONS, Case, assert_accurate, conv_bn_relu
from torch.nn import functional as F

from fastres import convolution, ops

pytestmark = pytest.mark.usefixtures("one_thread", "small_layers")


@pytest.fixture
def calls(monkeypatch):
    """Of the convolution that stores with batch norm, residual and activation."""
    made, forward = [], convolution._bn_act_eval
    monkeypatch.setattr(convolution, "_bn_act_eval", lambda *a: made.append(a) or forward(*a))
    return made


@pytest.mark.parametrize("conv_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_evaluation_is_as_accurate_as_stock(name, residual, activation, conv_bias, calls):
    precision = PRECISIONS[name]
    case = Case(precision, residual, training=False, activation=activation)
    if conv_bias:
        case.values["conv_bias"] = torch.randn(64).to(precision.weights)
    before = case.values["running_mean"].clone()
    with torch.no_grad():
        reference = conv_bn_relu(**case.leaves(double=True), **case.by)
        with precision.context():
            fused, stock = (f(**case.leaves(), **case.by) for f in (ops.conv_bn_relu, conv_bn_relu))
    assert len(calls) == precision.convolves
    assert_accurate("output", fused, stock, reference)
    assert torch.equal(case.values["running_mean"], before)


@pytest.mark.parametrize("activation", ["relu", None])
def test_with_and_without_gradient_agree(activation, calls):
    case = Case(training=False, activation=activation)
    with torch.no_grad():
        at_once = ops.conv_bn_relu(**case.leaves(), **case.by)
    in_steps = ops.conv_bn_relu(**case.leaves(), **case.by)
    assert len(calls) == 1 and in_steps.requires_grad
    v = {name: value.double() for name, value in case.values.items()}
    scale = (v["bn_weight"] / (v["running_var"] + case.by["eps"]).sqrt()).abs().view(-1, 1, 1)
    products = F.conv2d(v["input"].abs(), v["weight"].abs(), padding=1) * scale
    mean, bias = (v[name].view(-1, 1, 1).abs() for name in ("running_mean", "bn_bias"))
    magnitude = products + mean * scale + bias + v["residual"].abs()
    # Higham 2002, (3.5): the products of a sum, and some ten operations before and behind it, on each side.
    operations = 2 * (v["weight"][0].numel() + 10)
    bound = operations * torch.finfo(torch.float32).eps / 2 * magnitude
    assert ((at_once.double() - in_steps.double()).abs() <= bound).all()


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


def test_packed_once_for_any_size(unit, way):
    found = []
    for shape in way.some(3):
        input, weight, _ = shape.tensors(unit)
        packed = KERNELS.conv_pack_weight(weight, input, shape.stride, shape.dilation, shape.groups)
        height, width = shape.image
        for other in (shape, shape._replace(batch=shape.batch + 3, image=(height + 11, width + 2))):
            input, same_weight, _ = other.tensors(unit)
            assert torch.equal(same_weight, weight)
            channels = shape.out_channels
            mean, var = torch.zeros(channels), torch.ones(channels)
            with poisoned():
                output = KERNELS.conv_bn_act_eval(
                    input, weight, packed, None, None, mean, var, None, None, *shape.by, 0.0, False
                )
            found += failures([output], other, unit, least_error=True)
    assert not found, "\n".join(found)


def test_every_part_of_the_epilogue(isa):
    shape = Shape(2, 20, 33, (7, 6), (3, 3), (1, 2), (1, 1))
    input, weight, residual = shape.tensors(torch.float32)
    conv_bias, mean, factor, bias = torch.randn(4, shape.out_channels)
    var = torch.rand(shape.out_channels) + 0.5
    for packs in (False, True):
        packed = KERNELS.conv_pack_weight(weight, input, shape.stride, shape.dilation, 1) if packs else None
        output = KERNELS.conv_bn_act_eval(
            input, weight, packed, conv_bias, residual, mean, var, factor, bias, *shape.by, 0.1, True
        )
        by = {"stride": shape.stride, "padding": shape.padding, "residual": residual, "eps": 0.1}
        stock = conv_bn_relu(input, weight, mean, var, factor, bias, conv_bias=conv_bias, **by)
        by["residual"] = residual.double()
        tensors = [t.double() for t in (input, weight, mean, var, factor, bias)]
        exact = conv_bn_relu(*tensors, conv_bias=conv_bias.double(), **by)
        assert_accurate("output", output, stock, exact)
