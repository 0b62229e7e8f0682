"""Bad input: the message, the exception's type, and that nothing was written before all checks passed."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from fastres import ops

KERNELS = torch.ops.fastres


def make():
    return dict(
        input=torch.randn(2, 4, 3, 3),
        running_mean=torch.zeros(4),
        running_var=torch.ones(4),
        weight=torch.rand(4),
        bias=torch.rand(4),
        training=True,
    )


STOCK_ERRORS = {
    "one value a channel": dict(input=torch.randn(1, 4, 1, 1)),
    "running_mean too short": dict(running_mean=torch.zeros(3)),
    "running_var too long": dict(running_var=torch.ones(5)),
    "weight too short": dict(weight=torch.rand(3)),
    "bias too long": dict(bias=torch.rand(9)),
    "no statistics in evaluation": dict(running_mean=None, running_var=None, training=False),
    "integers": dict(input=torch.ones(2, 4, 3, 3, dtype=torch.int64)),
    "one dimension": dict(input=torch.randn(4)),
    "eps of zero": dict(eps=0.0),
    "eps below zero": dict(eps=-1e-5),
    "eps below zero in evaluation": dict(eps=-1e-5, training=False),
    "running_mean requires a gradient": dict(running_mean=torch.zeros(4, requires_grad=True)),
    "running_var requires a gradient": dict(running_var=torch.ones(4, requires_grad=True), training=False),
}


@pytest.mark.parametrize("change", STOCK_ERRORS.values(), ids=STOCK_ERRORS)
def test_the_error_that_stock_raises(change):
    arguments = make() | change
    with pytest.raises(Exception) as stock:
        F.batch_norm(**arguments)
    before = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    for op in (ops.batch_norm, ops.bn_relu):
        with pytest.raises(type(stock.value), match=re.escape(str(stock.value).splitlines()[0])):
            op(**arguments)
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor), name


@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (2, 5, 3, 3), (3, 4, 3, 3), (2, 2, 5, 3, 3)], ids=str)
def test_residual_of_another_shape(shape):
    arguments = make()
    message = (
        rf"fastres::bn_add_relu: residual has shape {re.escape(str(list(shape)))}, expected \[2, 4, 3, 3\]"
    )
    with pytest.raises(ValueError, match=message):
        ops.bn_add_relu(residual=torch.randn(shape), **arguments)
    assert torch.equal(arguments["running_mean"], torch.zeros(4))
    assert torch.equal(arguments["running_var"], torch.ones(4))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 2, 4, 3, 3), (1, 2, 4, 3, 3)], ids=str)
def test_residual_that_broadcasts_runs_composed(shape):
    arguments, residual = make(), torch.randn(shape)
    stock = F.relu(
        F.batch_norm(**make() | {k: arguments[k] for k in ("input", "weight", "bias")}) + residual
    )
    torch.testing.assert_close(ops.bn_add_relu(residual=residual, **arguments), stock)


def test_add_relu_of_shapes_that_do_not_broadcast():
    with pytest.raises(RuntimeError, match="must match the size"):
        ops.add_relu(torch.randn(2, 3), torch.randn(2, 4))


@pytest.mark.parametrize("activation", ["gelu", "ReLU", True])
def test_activation_of_another_name(activation):
    with pytest.raises(ValueError, match=f"activation is {activation!r}, expected 'relu' or None"):
        ops.conv_bn_relu(
            torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1), None, None, activation=activation
        )


def test_convolution_errors_are_stocks():
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5 channels"):
        ops.conv_bn_relu(torch.randn(1, 5, 4, 4), torch.randn(4, 3, 1, 1), None, None, training=True)


X = torch.randn(2, 4, 3, 3)
STRICT = {
    "is strided": (torch.randn(2, 4, 3, 6)[..., ::2], None),
    "which is empty": (torch.randn(0, 4, 3, 3), None),
    "expected 2 to 5 dimensions": (torch.randn(4), None),
    "unsupported dtype": (torch.ones(2, 4, 3, 3, dtype=torch.int32), None),
    "residual has shape [2, 4, 3, 2], expected [2, 4, 3, 3]": (X, torch.randn(2, 4, 3, 2)),
    "residual differs from input in dtype": (X, X.double()),
    "residual differs from input in memory layout": (X, X.to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("message", STRICT)
def test_kernel_ops_check_what_they_are_given(message):
    input, residual = STRICT[message]
    with pytest.raises(RuntimeError, match="fastres::bn_act_forward: .*" + re.escape(message)):
        KERNELS.bn_act_forward(input, residual, None, None, None, None, True, 0.1, 1e-5, True)


@pytest.mark.parametrize("argument", range(2, 6))
def test_kernel_ops_check_each_channel_vector(argument):
    name = ("running_mean", "running_var", "weight", "bias")[argument - 2]
    for vector, message in (
        (torch.ones(3), r"has shape \[3\], expected \[4\]"),
        (torch.ones(4).double(), "is float64, expected float32"),
        (torch.ones(8)[::2], "is strided"),
    ):
        arguments = [X, None, torch.zeros(4), torch.ones(4), None, None, True, 0.1, 1e-5, True]
        arguments[argument] = vector
        with pytest.raises(RuntimeError, match=f"fastres::bn_act_forward: {name} {message}"):
            KERNELS.bn_act_forward(*arguments)
        assert torch.equal(arguments[2], torch.zeros(4)) or argument == 2


def test_kernel_backward_checks_what_it_is_given():
    _, mean, rstd = KERNELS.bn_act_forward(X, None, None, None, None, None, True, 0.1, 1e-5, True)
    for message, change in (
        ("grad has shape", {0: X[:1]}),
        ("output is given without relu", {2: X, 8: False}),
        ("save_mean is float32, expected float64", {5: mean.float()}),
        ("save_rstd has shape", {6: rstd[:3]}),
    ):
        arguments = [X, X, None, None, None, mean, rstd, True, True]
        for position, value in change.items():
            arguments[position] = value
        with pytest.raises(RuntimeError, match=f"fastres::bn_act_backward: {message}"):
            KERNELS.bn_act_backward(*arguments)


def test_forcing_an_instruction_set():
    command = [sys.executable, "-c", "import torch, fastres; print(fastres._C.cpu_isa())"]
    run = subprocess.run(
        command, env=os.environ | {"FASTRES_CPU_ISA": "scalar"}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "scalar", run.stderr
    run = subprocess.run(
        [
            *command[:2],
            "import torch, fastres; torch.ops.fastres.add_relu_forward(torch.ones(2, 2), torch.ones(2, 2))",
        ],
        env=os.environ | {"FASTRES_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "FASTRES_CPU_ISA: 'sse9' cannot run on this machine, which has: scalar" in run.stderr


VECTORS = ("running_mean", "running_var", "bn_weight", "bn_bias")


@pytest.mark.parametrize("which", VECTORS)
@pytest.mark.parametrize("size", [(1,), (34,), (), (1, 33)], ids=str)
def test_evaluation_takes_the_vectors_that_stock_takes(which, size):
    """Also where the batch norm is folded into the convolution's weight."""
    input, weight = torch.randn(4, 32, 20, 20), torch.randn(33, 32, 1, 1)
    vectors = {name: torch.rand(33) + 0.5 for name in VECTORS} | {which: torch.rand(size) + 0.5}
    mean, var, scale, shift = vectors.values()
    with torch.no_grad():
        try:
            expected = F.batch_norm(F.conv2d(input, weight), mean, var, scale, shift)
        except (RuntimeError, IndexError) as error:
            with pytest.raises(type(error)):
                ops.conv_bn_relu(input, weight, *vectors.values(), activation=None)
        else:
            output = ops.conv_bn_relu(input, weight, *vectors.values(), activation=None)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
