"""What the convolution kernels refuse, with its message and before anything is written; and no images."""

import pytest
import torch
from layers import channels_last, conv_bn_relu, without_memory

from fastres import _C, ops

KERNELS = torch.ops.fastres

X, W = channels_last(torch.randn(2, 4, 6, 6)), torch.randn(5, 4, 3, 3)
G = channels_last(torch.randn(2, 5, 4, 4))
MEAN, RSTD = torch.zeros(5).double(), torch.ones(5).double()
ONE, NONE = [1, 1], [0, 0]


def _forward(input=X, weight=W, bias=None, residual=None, stride=ONE, padding=NONE, dilation=ONE):
    return KERNELS.conv_forward(input, weight, bias, residual, stride, padding, dilation, True)


def _backward_input(grad=G, weight=W, input_size=X.shape, stride=ONE, padding=NONE, dilation=ONE):
    return KERNELS.conv_backward_input(grad, weight, input_size, stride, padding, dilation)


def _backward_weight(grad=G, input=X, weight=W, stride=ONE, padding=NONE, dilation=ONE):
    return KERNELS.conv_backward_weight(grad, input, weight, stride, padding, dilation)


def _bn_act_forward(
    input=X, conv_weight=W, residual=None, running_mean=None, running_var=None, weight=None, bias=None
):
    return KERNELS.conv_bn_act_forward(
        input,
        conv_weight,
        residual,
        running_mean,
        running_var,
        weight,
        bias,
        ONE,
        NONE,
        ONE,
        0.1,
        1e-5,
        True,
    )


def _bn_act_backward(
    grad=G,
    conv_output=G,
    output=None,
    weight=None,
    bias=None,
    save_mean=MEAN,
    save_rstd=RSTD,
    relu=True,
    input=X,
    input_weight=None,
    input_bias=None,
    input_mean=None,
    input_rstd=None,
    conv_weight=W,
    add_to=None,
    needs_input=True,
):
    return KERNELS.conv_bn_act_backward(
        grad, conv_output, output, weight, bias, save_mean, save_rstd, relu,
        input, input_weight, input_bias, input_mean, input_rstd, True,
        conv_weight, ONE, NONE, ONE, add_to, needs_input, True,
    )  # fmt: skip


BAD = [
    (_forward, dict(stride=[0, 1]), "stride takes two integers of at least 1"),
    (_forward, dict(stride=[1]), "stride takes two integers of at least 1"),
    (_forward, dict(padding=[0, -1]), "padding takes two integers of at least 0"),
    (_forward, dict(dilation=[1, 0]), "dilation takes two integers of at least 1"),
    (_forward, dict(weight=W[0]), "weight is not a 4-d tensor"),
    (_forward, dict(weight=W.int()), "weight has an unsupported dtype"),
    (_forward, dict(weight=W.double()), "weight"),
    (_forward, dict(input=X[0]), "input is not 4-d"),
    (_forward, dict(input=X.contiguous()), "input is not channels last"),
    (_forward, dict(input=X.int()), "input has an unsupported dtype"),
    (_forward, dict(input=X.double(), weight=W.double()), "float64"),
    (_forward, dict(input=X[:, :3]), "weight takes 4 input channels, input has 3"),
    (_forward, dict(weight=W[:, :2]), "no kernel for 2 groups of 2 input channels and 5 output channels"),
    (_forward, dict(weight=W[:, :0]), "weight takes 0 input channels, input has 4"),
    (_forward, dict(weight=torch.randn(5, 4, 7, 1)), "the kernel is larger than the padded input"),
    (_forward, dict(weight=torch.randn(5, 4, 0, 3)), "the kernel has no pixels"),
    (_forward, dict(dilation=[1, 3]), "the kernel is larger than the padded input"),
    (_forward, dict(residual=G[0]), "residual is not a 4-d tensor on the CPU"),
    (_forward, dict(residual=X), "residual has another shape than the convolution gives it"),
    (_forward, dict(residual=G.contiguous()), "residual is not channels last"),
    (_forward, dict(residual=G.bfloat16()), "residual is not of dtype float32"),
    (_forward, dict(bias=torch.zeros(4)), "bias takes one float32 for each output channel"),
    (_forward, dict(bias=torch.zeros(5).bfloat16()), "bias takes one float32 for each output channel"),
    (_forward, dict(bias=torch.zeros(10)[::2]), "bias takes one float32 for each output channel"),
    (_forward, dict(bias=torch.zeros(5, 1)), "bias takes one float32 for each output channel"),
    (_forward, dict(bias=without_memory(torch.zeros(5))), "bias has no memory"),
    (_backward_input, dict(input_size=X.shape[1:]), "input is not 4-d"),
    (_backward_input, dict(grad=G[0]), "grad is not a 4-d tensor on the CPU"),
    (_backward_input, dict(grad=X), "grad has another shape than the convolution gives it"),
    (_backward_input, dict(grad=G.contiguous()), "grad is not channels last"),
    (_backward_input, dict(weight=W.double()), "weight"),
    (_backward_input, dict(input_size=[2, 4, -6, 6]), "the kernel is larger than the padded input"),
    (_backward_weight, dict(grad=X), "grad has another shape than the convolution gives it"),
    (_backward_weight, dict(grad=G.bfloat16()), "input is not of dtype bfloat16"),
    (_backward_weight, dict(input=X.contiguous()), "input is not channels last"),
    (_backward_weight, dict(weight=W.double()), "weight"),
    (
        _bn_act_forward,
        dict(input=channels_last(X[:1, :, :3, :3])),
        "expected more than 1 value per channel when training",
    ),
    (_bn_act_forward, dict(residual=X), "residual has another shape than the convolution gives it"),
    (_bn_act_forward, dict(running_mean=torch.zeros(4)), r"running_mean has shape \[4\], expected \[5\]"),
    (_bn_act_forward, dict(running_var=torch.zeros(5, 1)), r"running_var has shape \[5, 1\]"),
    (_bn_act_forward, dict(weight=torch.zeros(5).double()), "weight is float64"),
    (_bn_act_forward, dict(bias=torch.zeros(10)[::2]), "bias is strided"),
    (_bn_act_backward, dict(add_to=G), "add_to has another shape than the convolution gives it"),
    (_bn_act_backward, dict(add_to=X.contiguous()), "add_to is not channels last"),
    (_bn_act_backward, dict(add_to=X.bfloat16()), "add_to is not of dtype float32"),
    (_bn_act_backward, dict(add_to=X.clone(), needs_input=False), "add_to is given without needs_input"),
    (_bn_act_backward, dict(conv_output=X), "conv_output has another shape"),
    (_bn_act_backward, dict(grad=G.bfloat16()), "grad is not of dtype float32"),
    (_bn_act_backward, dict(input=X.bfloat16()), "input is not of dtype float32"),
    (_bn_act_backward, dict(output=X), "output has another shape"),
    (_bn_act_backward, dict(output=G, relu=False), "output is given without relu, which needs no mask"),
    (
        _bn_act_backward,
        dict(input_mean=torch.zeros(4).double()),
        "input_mean and input_rstd are given together",
    ),
    (
        _bn_act_backward,
        dict(input_rstd=torch.zeros(4).double()),
        "input_mean and input_rstd are given together",
    ),
    (_bn_act_backward, dict(save_mean=torch.zeros(5)), "save_mean is float32, expected float64"),
    (_bn_act_backward, dict(save_rstd=torch.zeros(4).double()), "save_rstd has shape"),
    (_bn_act_backward, dict(input_mean=torch.zeros(4), input_rstd=torch.ones(4)), "input_mean is float32"),
    (_bn_act_backward, dict(weight=torch.zeros(4)), r"weight has shape \[4\]"),
    (_bn_act_backward, dict(bias=torch.zeros(4)), r"bias has shape \[4\]"),
    (_bn_act_backward, dict(input_weight=torch.zeros(5)), r"input_weight has shape \[5\], expected \[4\]"),
    (_bn_act_backward, dict(input_bias=torch.zeros(5)), r"input_bias has shape \[5\], expected \[4\]"),
]


@pytest.mark.parametrize("call, change, message", BAD, ids=[f"{c.__name__[1:]}-{m}" for c, _, m in BAD])
def test_bad_input(call, change, message):
    call()
    statistics = {}
    if call is _bn_act_forward:
        statistics = dict(running_mean=torch.zeros(5), running_var=torch.ones(5))
    with pytest.raises(RuntimeError, match=f"fastres::conv{call.__name__}: .*{message}"):
        call(**statistics | change)
    if statistics:
        assert torch.equal(statistics["running_mean"], torch.zeros(5))
        assert torch.equal(statistics["running_var"], torch.ones(5))


@pytest.mark.parametrize("channels", [(0, 5), (4, 0), (0, 0)])
def test_no_channels(channels):
    inputs, outputs = channels
    input, weight = channels_last(torch.randn(2, inputs, 6, 6)), torch.randn(outputs, inputs, 3, 3)
    with pytest.raises(RuntimeError, match="fastres::conv_forward"):
        _forward(input=input, weight=weight)
    assert not _C.convolves("float32", inputs, outputs, 1)

    def shape_or_error(function):
        try:
            return function(input, weight, torch.zeros(5), torch.ones(5)).shape
        except RuntimeError:
            return RuntimeError

    assert shape_or_error(ops.conv_bn_relu) == shape_or_error(conv_bn_relu)


def test_a_dtype_without_a_kernel(isa):
    with pytest.raises(RuntimeError, match=f"no kernel for float64 with instruction set {isa}"):
        KERNELS.conv_forward(X.double(), W, None, None, ONE, NONE, ONE, True)


def _bn_act_eval(packed, input=X, weight=W):
    return KERNELS.conv_bn_act_eval(
        input,
        weight,
        packed,
        None,
        None,
        MEAN.float(),
        RSTD.float(),
        None,
        None,
        ONE,
        NONE,
        ONE,
        0.0,
        False,
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda packed: packed[:-1],
        lambda packed: packed.view(torch.float32),
        lambda packed: torch.zeros_like(packed),
        lambda packed: KERNELS.conv_pack_weight(W[:, :3], X, ONE, ONE, 1),
    ],
    ids=["too short", "no bytes", "no header", "another weight's"],
)
def test_a_weight_that_is_packed_otherwise(spoil):
    packed = KERNELS.conv_pack_weight(W, X, ONE, ONE, 1)
    assert _bn_act_eval(packed).shape == (2, 5, 4, 4)
    with pytest.raises(
        RuntimeError, match="fastres::conv_bn_act_eval: packed is not what conv_pack_weight"
    ):
        _bn_act_eval(spoil(packed))


def test_a_packed_weight_without_memory():
    packed = KERNELS.conv_pack_weight(W, X, ONE, ONE, 1)
    with pytest.raises(RuntimeError, match="packed has no memory"):
        _bn_act_eval(without_memory(packed))


def test_a_weight_that_another_instruction_set_packed():
    isas = [isa for isa in _C.cpu_isas() if isa != "scalar"]
    if len(isas) < 2:
        pytest.skip("one instruction set has convolutions")
    weight, input = W.bfloat16(), X.bfloat16()  # which no two of them multiply alike
    packed = KERNELS.conv_pack_weight(weight, input, ONE, ONE, 1)
    before = _C.cpu_isa()
    _C.select_cpu_isa(next(isa for isa in isas if isa != before))
    try:
        with pytest.raises(RuntimeError, match="with the instruction set in use"):
            _bn_act_eval(packed, input, weight)
    finally:
        _C.select_cpu_isa(before)


def test_no_images(isa):
    input, grad = X[:0], G[:0]
    assert _forward(input).shape == (0, 5, 4, 4)
    assert _backward_input(grad, input_size=input.shape).shape == (0, 4, 6, 6)
    assert torch.equal(_backward_weight(grad, input), torch.zeros_like(W))


@pytest.mark.parametrize(
    "groups, channels, covered",
    [(1, (5, 7), True), (3, (4, 4), True), (2, (16, 16), True), (2, (4, 8), False), (2, (2, 2), False)]
    + [(2, (12, 12), False), (1, (256, 256), True), (2, (256, 256), False)],
)
def test_which_groups_have_kernels(unit, groups, channels, covered):
    """Of as many channels in as out: a power of two from 4 to a block."""
    inputs, outputs = (groups * c for c in channels)
    dtype = str(unit).removeprefix("torch.")
    assert _C.convolves(dtype, inputs, outputs, groups) == covered
    tensors = channels_last(torch.randn(1, inputs, 5, 5).to(unit)), torch.randn(outputs, channels[0], 3, 3)
    if covered:
        assert _forward(*tensors).shape == (1, outputs, 3, 3)
    else:
        with pytest.raises(RuntimeError, match=f"no kernel for {groups} groups of {channels[0]} input"):
            _forward(*tensors)
