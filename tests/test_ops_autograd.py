"""Derivatives and PyTorch's machinery: opcheck, torch.compile, autocast, torch.func, what is saved."""

import pytest
import torch
from torch import library
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

from fastres import _C, composed, ops

CHANNELS = 5
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def double(*shape, requires_grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def statistics(dtype=torch.float64, device="cpu"):
    return torch.randn(CHANNELS, dtype=dtype, device=device), torch.rand(
        CHANNELS, dtype=dtype, device=device
    ) + 0.5


def bn_functions(training):
    """Each batch-norm op as a function of differentiable arguments alone, and those arguments."""
    mean, var = statistics()

    def fresh():
        return mean.clone(), var.clone()

    input, residual = double(3, CHANNELS, 4, 3), double(3, CHANNELS, 4, 3)
    weight, bias, conv = double(CHANNELS), double(CHANNELS), double(CHANNELS, 4, 2, 2)
    return {
        "batch_norm": (lambda x, w, b: ops.batch_norm(x, *fresh(), w, b, training), (input, weight, bias)),
        "bn_relu": (lambda x, w, b: ops.bn_relu(x, *fresh(), w, b, training), (input, weight, bias)),
        "bn_relu-plain": (lambda x: ops.bn_relu(x, *fresh(), training=training), (input,)),
        "bn_add_relu": (
            lambda x, r, w, b: ops.bn_add_relu(x, r, *fresh(), w, b, training),
            (input, residual, weight, bias),
        ),
        "conv_bn_relu": (
            lambda x, c, w, b: ops.conv_bn_relu(x, c, *fresh(), w, b, padding=1, training=training),
            (double(2, 4, 4, 3), conv, weight, bias),
        ),
        "conv_bn_add": (
            lambda x, c, w, b, r: ops.conv_bn_relu(
                x, c, *fresh(), w, b, residual=r, training=training, activation=None
            ),
            (double(2, 4, 4, 3), conv, weight, bias, double(2, CHANNELS, 3, 2)),
        ),
    }


OPS = pytest.mark.parametrize("op", list(bn_functions(True)))


@OPS
@MODES
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients(op, training, channels_last):
    function, inputs = bn_functions(training)[op]
    if channels_last:
        inputs = [
            t.detach().to(memory_format=torch.channels_last).requires_grad_() if t.dim() == 4 else t
            for t in inputs
        ]
    assert gradcheck(function, inputs)


@OPS
@MODES
def test_second_derivatives(op, training):
    function, inputs = bn_functions(training)[op]
    assert gradgradcheck(function, inputs)


@OPS
@MODES
def test_forward_mode_derivatives(op, training):
    function, inputs = bn_functions(training)[op]
    assert gradcheck(
        function, inputs, check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False
    )


def test_add_relu_derivatives():
    inputs = double(3, 4), double(3, 4)
    assert gradcheck(ops.add_relu, inputs, check_forward_ad=True)
    assert gradgradcheck(ops.add_relu, inputs)


def test_third_derivative():
    # Not beside stock, whose double backward takes the saved statistics for constants.
    def plain(x, *_, training):
        centred = x - x.mean(0)
        return centred * (centred.square().mean(0) + 1e-5).rsqrt()

    input = double(4, 3)
    results = []
    for function in (ops.batch_norm, plain):
        value = function(input, None, None, training=True).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, input, create_graph=True)
            value = gradient.square().sum()
        results.append(gradient)
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)], ids=str
)
def test_gradients_of_a_part_of_the_inputs(wanted):
    results = []
    inputs = double(3, CHANNELS, 2, 2), double(3, CHANNELS, 2, 2), double(CHANNELS), double(CHANNELS)
    for function in (
        lambda x, r, w, b: ops.bn_add_relu(x, r, None, None, w, b, True),
        lambda x, r, w, b: F.relu(F.batch_norm(x, None, None, w, b, True) + r),
    ):
        leaves = [
            t.detach().clone().requires_grad_(bool(want)) for t, want in zip(inputs, wanted, strict=True)
        ]
        function(*leaves).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for ours, theirs, want in zip(*results, wanted, strict=True):
        assert (ours is not None) == (theirs is not None) == bool(want)
        if want:
            torch.testing.assert_close(ours, theirs)


@MODES
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck_of_the_kernel_ops(training, relu, residual, device):
    input = torch.randn(3, CHANNELS, 4, 4, device=device)
    other = torch.randn_like(input) if residual else None
    factors = torch.rand(CHANNELS, device=device), torch.randn(CHANNELS, device=device)
    mean, var = statistics(torch.float32, device)
    for requires_grad in (False, True):
        tensors = [t if t is None else t.clone().requires_grad_(requires_grad) for t in (input, other)]
        arguments = (*tensors, mean, var, *factors, training, 0.1, 1e-5, relu)
        library.opcheck(torch.ops.fastres.bn_act_forward.default, arguments)
    output, save_mean, save_rstd = torch.ops.fastres.bn_act_forward(*arguments)
    kept = output.detach() if relu and residual else None
    arguments = (torch.randn_like(input), input, kept, *factors, save_mean, save_rstd, training, relu)
    library.opcheck(torch.ops.fastres.bn_act_backward.default, arguments)


def test_opcheck_of_the_public_ops(device):
    input = torch.randn(3, CHANNELS, 4, 4, device=device, requires_grad=True)
    conv = torch.randn(CHANNELS, CHANNELS, 3, 3, device=device, requires_grad=True)
    other = torch.randn_like(input)
    public = torch.ops.fastres
    library.opcheck(public.batch_norm.default, (input, *statistics(torch.float32, device)))
    library.opcheck(public.bn_relu.default, (input, *statistics(torch.float32, device), None, None, True))
    library.opcheck(public.bn_add_relu.default, (input, other, *statistics(torch.float32, device)))
    library.opcheck(public.add_relu.default, (input, other))
    library.opcheck(public.add_relu_forward.default, (input, other))
    library.opcheck(public.add_relu_backward.default, (input, other))
    library.opcheck(
        public.conv_bn_relu.default,
        (input, conv, *statistics(torch.float32, device)),
        dict(residual=other, padding=[1, 1], training=True),
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic, device):
    def function(x, conv, w, b, mean, var):
        z = ops.conv_bn_relu(x, conv, mean, var, w, b, padding=1, training=True)
        z = ops.bn_add_relu(z, x, mean, var, w, b, True)
        return ops.add_relu(ops.bn_relu(z, mean, var, w, b), x).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        results = []
        leaves = [
            torch.randn(batch, CHANNELS, 6, 6, device=device),
            torch.randn(CHANNELS, CHANNELS, 3, 3, device=device),
            torch.rand(CHANNELS, device=device),
            torch.rand(CHANNELS, device=device),
        ]
        buffers = statistics(torch.float32, device)
        for run in (compiled, function):
            inputs = [t.clone().requires_grad_() for t in leaves]
            updated = [t.clone() for t in buffers]
            value = run(*inputs, *updated)
            value.backward()
            results.append((value, *updated, *(t.grad for t in inputs)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_statistics_and_parameters_in_float32(dtype, device):
    input, conv = torch.randn(4, 8, 6, 6, device=device), torch.randn(CHANNELS, 8, 3, 3, device=device)
    weight, bias = (torch.rand(CHANNELS, device=device, requires_grad=True) for _ in range(2))
    mean, var = statistics(torch.float32, device)
    with torch.autocast(device, dtype):
        output = ops.conv_bn_relu(input, conv, mean, var, weight, bias, training=True)
        residual = torch.randn_like(output)
        again = ops.bn_add_relu(output, residual, mean, var, weight, bias, True)
    again.float().sum().backward()
    assert output.dtype == again.dtype == dtype
    assert mean.dtype == weight.grad.dtype == torch.float32


def test_mixed_dtypes_promote_as_in_stock():
    input, residual = torch.randn(2, CHANNELS, 3, 3).bfloat16(), torch.randn(2, CHANNELS, 3, 3)
    output = ops.bn_add_relu(input, residual, None, None, training=True)
    stock = F.relu(F.batch_norm(input, None, None, training=True) + residual)
    assert output.dtype == stock.dtype == torch.float32
    torch.testing.assert_close(output, stock)


@pytest.mark.parametrize("make", [lambda x: x[:, :, ::2], lambda x: x.transpose(2, 3), lambda x: x[:0]])
def test_memory_that_no_kernel_takes(make):
    results = []
    for function in (ops.bn_relu, lambda *a, **k: F.relu(F.batch_norm(*a, **k))):
        torch.manual_seed(0)
        leaf = torch.randn(4, CHANNELS, 6, 6, requires_grad=True)
        output = function(make(leaf), *statistics(torch.float32))
        output.sum().backward()
        results.append((output, leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torch_func_transforms():
    mean, var = statistics()
    inputs = double(4, 3, CHANNELS, 2, 2, requires_grad=False)

    def loss(function):
        return lambda x: function(x, mean, var).square().sum()

    def stock(*arguments):
        return F.relu(F.batch_norm(*arguments))

    for transform in (
        lambda f: torch.func.vmap(f)(inputs),
        lambda f: torch.func.grad(f)(inputs[0]),
        lambda f: torch.func.vmap(torch.func.grad(f))(inputs),
        lambda f: torch.func.jvp(f, (inputs[0],), (inputs[1],)),
    ):
        torch.testing.assert_close(transform(loss(ops.bn_relu)), transform(loss(stock)))


def test_forward_mode_level_without_tangents_still_runs_fused(monkeypatch):
    monkeypatch.setattr(composed, "bn_act", None)
    with forward_ad.dual_level():
        ops.bn_relu(torch.randn(2, CHANNELS, 3, 3), None, None, training=True)


def saved_bytes(function) -> int:
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return total


def test_saves_the_input_and_no_mask():
    input = torch.randn(8, 64, 16, 16, requires_grad=True)
    size, channels = input.untyped_storage().nbytes(), 64
    small = 2 * channels * 8  # mean and rstd in double
    assert saved_bytes(lambda: ops.bn_relu(input, None, None, training=True)) == size + small
    residual = torch.randn_like(input)
    # The output, which the next layer keeps anyway.
    assert (
        saved_bytes(lambda: ops.bn_add_relu(input, residual, None, None, training=True)) == 2 * size + small
    )


def test_saved_input_changed_in_place_is_noticed():
    input = torch.randn(2, CHANNELS, 3, 3, requires_grad=True)
    middle = input * 1
    output = ops.bn_relu(middle, None, None, training=True)
    middle.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_running_statistics_keep_their_version():
    """As in stock PyTorch, where several forward passes may come before their backward passes."""
    mean, var = statistics(torch.float32)
    before = mean._version, var._version
    ops.bn_relu(torch.randn(2, CHANNELS, 3, 3), mean, var, training=True)
    assert (mean._version, var._version) == before


def test_the_fast_path_runs(monkeypatch, device):
    """No case that is meant for the kernels falls back."""
    for name in ("bn_act", "bn_act_backward"):
        monkeypatch.setattr(composed, name, None)
    monkeypatch.setattr(F, "batch_norm", None)
    for shape in [(4, 6), (4, 6, 5), (4, 6, 5, 5), (2, 6, 3, 3, 3)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            input = torch.randn(shape, device=device).to(dtype).requires_grad_()
            mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)
            for training in (True, False):
                ops.bn_relu(input, mean, var, training=training).sum().backward()
                ops.bn_add_relu(input, input.detach(), mean, var, training=training).sum().backward()
                ops.batch_norm(input, mean.to(dtype), var.to(dtype), training=training).sum().backward()


def test_build_tells_what_it_holds():
    info = _C.build_info()
    assert set(info) == {"version", "compiler", "torch", "cuda", "cuda_archs"}
    assert _C.cpu_isa() in _C.cpu_isas() and _C.cpu_isas()[0] == "scalar"
    assert f"cpu/{_C.cpu_isa()}/add_relu" in _C.kernels()
    with pytest.raises(ValueError, match="mmx.*scalar"):
        _C.select_cpu_isa("mmx")
