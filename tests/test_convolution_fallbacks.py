"""conv_bn_relu where no node of ours runs: bad input, what no kernel covers, transforms of torch's."""

import copy
import warnings

import pytest
import torch
from layers import Case, assert_accurate, channels_last, conv_bn_relu, is_node
from torch.autograd import forward_ad

from fastres import _C, models, ops, recording, sites
from fastres.packing import keep_packed

pytestmark = pytest.mark.usefixtures("one_thread", "small_layers")


# ---------------------------------------------------------------------------------------------------------
# bad input


BAD = {
    "channels": dict(weight=torch.randn(64, 16, 3, 3)),
    "bn_weight": dict(bn_weight=torch.ones(63)),
    "bn_bias": dict(bn_bias=torch.ones(65)),
    "running_mean": dict(running_mean=torch.zeros(63)),
    "running_var": dict(running_var=torch.ones(65)),
    "residual": dict(residual=torch.randn(8, 64, 5, 5)),
    "kernel": dict(weight=torch.randn(64, 32, 40, 3)),
    "weight of two dimensions": dict(weight=torch.randn(64, 32)),
    "weight's dtype": dict(weight=torch.randn(64, 32, 3, 3).double()),
    "stride": dict(stride=0),
    "padding": dict(padding=-1),
    "dilation": dict(dilation=0),
    "stride of three": dict(stride=(1, 1, 1)),
    "padding of three": dict(padding=(1, 1, 1)),
    "padding's name": dict(padding="some"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_bad_input_raises_as_in_stock_and_writes_nothing(change):
    case = Case()
    arguments = case.leaves() | case.by | change
    statistics = {name: arguments[name].clone() for name in ("running_mean", "running_var")}
    with pytest.raises(Exception) as stock:
        conv_bn_relu(**arguments | statistics)
    with pytest.raises((type(stock.value), ValueError) if change is BAD["residual"] else type(stock.value)):
        ops.conv_bn_relu(**arguments)
    for name in statistics:
        if name not in change:
            assert torch.equal(arguments[name], case.values[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_autocast_leaves_the_input_as_stock_does(dtype):
    case = Case(residual=False)
    leaves = case.leaves() | dict(input=channels_last(torch.ones(8, 32, 17, 15, dtype=dtype)))
    for function in (conv_bn_relu, ops.conv_bn_relu):
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(RuntimeError, match="expected scalar type"),
        ):
            function(**leaves, **case.by)


# ---------------------------------------------------------------------------------------------------------
# what falls back


FALLBACKS = {
    "groups": (dict(groups=2), lambda v: v | dict(weight=v["weight"][:, :16].clone())),
    "contiguous": ({}, lambda v: v | dict(input=v["input"].contiguous())),
    "strided": ({}, lambda v: v | dict(input=v["input"].repeat(1, 1, 1, 2)[..., ::2])),
    "float64": ({}, lambda v: {n: t.double() for n, t in v.items()}),
    "few channels of many values": (
        {}, lambda v: v | dict(input=channels_last(v["input"][:, :8]), weight=v["weight"][:, :8])
    ),
    "padding of a name": (dict(padding="same"), lambda v: v),
    "contiguous residual": ({}, lambda v: v | dict(residual=v["residual"].contiguous())),
    "residual that broadcasts": ({}, lambda v: v | dict(residual=v["residual"][:1])),
}  # fmt: skip


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_no_kernel_covers_equals_stock(name):
    case = Case()
    change, prepare = FALLBACKS[name]
    values, results = prepare(case.values), []
    runs = ((ops.conv_bn_relu, False), (conv_bn_relu, False), (conv_bn_relu, True))
    for function, double in runs:
        leaves = {
            n: t.detach().to(torch.float64 if double else t.dtype, copy=True) for n, t in values.items()
        }
        for n, leaf in leaves.items():
            leaf.requires_grad_(not n.startswith("running"))
        output = function(**leaves, **case.by | change)
        assert not is_node(output)
        generator = torch.Generator().manual_seed(0)
        output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
        gradients = {f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None}
        results.append(
            {"output": output, **gradients, **{n: leaves[n] for n in ("running_mean", "running_var")}}
        )
    for key, fused in results[0].items():
        if fused.dtype == torch.float64:  # the reference has this dtype's errors itself
            torch.testing.assert_close(fused, results[1][key], rtol=1e-9, atol=1e-9)
        else:
            assert_accurate(key, fused, results[1][key], results[2][key])


def transformed(function, values, by, how: str):
    """A transform of torch's of the mean square of `function`, as a function of the input."""
    values = dict(values)
    input = values.pop("input")
    names = ("running_mean", "running_var")

    def loss(input, weight=values["weight"]):
        fresh = {name: values[name].clone() for name in names} if how != "vmap" else dict.fromkeys(names)
        return function(input, **values | fresh | dict(weight=weight), **by).square().mean()

    if how == "grad":
        return torch.func.grad(loss, argnums=(0, 1))(input, values["weight"])
    if how == "vmap":
        return (torch.func.vmap(loss)(torch.stack([input, input.flip(0)])),)
    if how == "jvp":
        return torch.func.jvp(loss, (input,), (input.flip(0),))
    if how == "dual":
        with forward_ad.dual_level():
            dual = loss(forward_ad.make_dual(input, input.flip(0)))
            return tuple(forward_ad.unpack_dual(dual))
    input = input.clone().requires_grad_()
    value = torch.compile(loss, backend="aot_eager")(input) if how == "compile" else loss(input)
    value.backward()
    return value, input.grad


@pytest.mark.parametrize("how", ["grad", "vmap", "jvp", "dual", "compile"])
def test_transforms_equal_stock(how):
    case = Case()
    results = [
        transformed(
            function, {n: t.double() if double else t for n, t in case.values.items()}, case.by, how
        )
        for function, double in ((ops.conv_bn_relu, False), (conv_bn_relu, False), (conv_bn_relu, True))
    ]
    for tensors in zip(*results, strict=True):
        assert_accurate(how, *tensors)


def test_a_tangent_elsewhere_does_not_keep_the_node_away():
    case = Case()
    with forward_ad.dual_level():
        assert is_node(ops.conv_bn_relu(**case.leaves(), **case.by))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_runs_where_fastres_is_not_installed(training, grad, tmp_path):
    """torch.jit.trace, and what writes ONNX files by it, sees PyTorch's own operations alone."""
    model = models.resnet18(num_classes=10).to(memory_format=torch.channels_last).train(training)
    input = channels_last(torch.randn(4, 3, 64, 64))
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = torch.jit.trace(copy.deepcopy(model), input, check_trace=not training)
        assert "fastres::" not in str(trace.inlined_graph) and "PythonOp" not in str(trace.inlined_graph)
        trace.save(tmp_path / "trace.pt")
        output = torch.jit.load(tmp_path / "trace.pt")(input)
        with sites.stock():
            expected = model(input)
    torch.testing.assert_close(output, expected)
    assert output.requires_grad == grad


# ---------------------------------------------------------------------------------------------------------
# what PyTorch is faster at


@pytest.mark.skipif(not _C.convolves("float32"), reason="there are no convolutions for this processor")
@pytest.mark.parametrize(
    ("batch", "channels", "training", "kept", "ours"),
    [
        (1, 128, False, False, False),
        (1, 128, False, True, True),
        (1, 128, True, False, True),
        (4, 128, False, False, True),
        (1, 64, False, False, True),
    ],
)
def test_packing_a_large_weight_for_few_pixels(batch, channels, training, kept, ours):
    """64 an image; a weight of 147,456 values, or of 36,864."""
    conv, bn = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False), torch.nn.BatchNorm2d(channels)
    if kept:
        keep_packed(conv.weight)
    with torch.no_grad(), recording.record() as records:
        input = torch.randn(batch, channels, 8, 8).to(memory_format=torch.channels_last)
        sites.conv_bn_act(conv, bn.train(training), None, input, relu=True)
    assert [record.own_convolution for record in records] == [ours]


@pytest.mark.skipif(not _C.convolves("float32"), reason="there are no convolutions for this processor")
@pytest.mark.parametrize(
    ("batch", "side", "stride", "ours"),
    [(1, 8, 1, False), (2, 8, 1, True), (1, 8, 2, True), (1, 16, 1, True)],
)
def test_training_on_one_image_of_few_pixels(batch, side, stride, ours):
    conv, bn = torch.nn.Conv2d(64, 64, 3, stride, padding=1, bias=False), torch.nn.BatchNorm2d(64)
    input = channels_last(torch.randn(batch, 64, side, side))
    with recording.record() as records:
        sites.conv_bn_act(conv, bn, None, input, relu=True).sum().backward()
    assert [record.own_convolution for record in records] == [ours]
