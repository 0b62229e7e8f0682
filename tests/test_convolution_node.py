"""conv_bn_relu in training as one autograd node: values, derivatives, machinery, what falls back."""

import contextlib
import itertools
from typing import NamedTuple

import pytest
import torch
from accuracy import FACTOR
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastres import _C, convolution, models, ops, sites
from fastres.recompute import set_recompute

LEARNED = ("input", "weight", "residual", "bn_weight", "bn_bias")


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def is_node(output: torch.Tensor) -> bool:
    return output.grad_fn is not None and "_ConvBnAct" in output.grad_fn.name()


def conv_bn_relu(
    input, weight, running_mean, running_var, bn_weight=None, bn_bias=None, *, residual=None,
    conv_bias=None, stride=1, padding=0, dilation=1, groups=1, training=False, momentum=0.1, eps=1e-5,
    activation="relu",
):  # fmt: skip
    """By PyTorch's ops."""
    output = F.conv2d(input, weight, conv_bias, stride, padding, dilation, groups)
    output = F.batch_norm(output, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    output = output if residual is None else output + residual
    return F.relu(output) if activation else output


def rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def assert_accurate(name: str, fused, stock, reference) -> None:
    """Root mean square error of `fused` within FACTOR of stock's, or of the rounded reference's."""
    assert fused.dtype == stock.dtype and fused.shape == stock.shape, name
    reference = reference.detach()
    error, theirs, floor = (
        rms(value.detach().double() - reference) for value in (fused, stock, reference.to(stock.dtype))
    )
    bound = FACTOR * max(theirs, floor)
    assert error <= bound, f"{name}: error {error:.3e}, stock's {theirs:.3e}, bound {bound:.3e}"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _small_layers(monkeypatch):
    """Run by the kernels, from wherever they are the faster ones."""
    monkeypatch.setattr(convolution, "_LEAST_CHANNELS", 16)
    monkeypatch.setattr(convolution, "_LEAST_PIXELS", 512)


@pytest.fixture(params=[True, False], ids=["recompute", "keep"])
def recompute(request):
    before = set_recompute(request.param)
    yield request.param
    set_recompute(before)


# ---------------------------------------------------------------------------------------------------------
# one layer


class Precision(NamedTuple):
    activations: torch.dtype
    weights: torch.dtype
    autocast: bool

    @property
    def convolves(self) -> bool:
        return _C.convolves(str(self.activations).removeprefix("torch."))

    def context(self):
        return torch.autocast("cpu", self.activations, enabled=self.autocast)


FLOAT32 = Precision(torch.float32, torch.float32, False)
PRECISIONS = {
    "float32": FLOAT32,
    "bfloat16-autocast": Precision(torch.bfloat16, torch.float32, True),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16, False),
    "float16": Precision(torch.float16, torch.float16, False),
}


class Case:
    """A layer with all that goes into it, of values that `precision` holds; `run` computes it."""

    def __init__(
        self, precision=FLOAT32, residual=True, kernel=3, channels=(32, 64), image=(17, 15), batch=8, **by
    ):
        self.precision, self.by = precision, dict(stride=1, padding=kernel // 2, training=True) | by
        self.by |= dict(momentum=0.3, eps=1e-3)
        self.values = {
            "input": channels_last(torch.randn(batch, channels[0], *image).to(precision.activations)),
            "weight": torch.randn(channels[1], channels[0], kernel, kernel) / (channels[0] ** 0.5 * kernel),
            "bn_weight": torch.rand(channels[1]) + 0.5,
            "bn_bias": torch.randn(channels[1]),
            "running_mean": torch.randn(channels[1]),
            "running_var": torch.rand(channels[1]) + 0.5,
        }
        self.values["weight"] = self.values["weight"].to(precision.weights)
        geometry = (self.by["stride"], self.by["padding"], self.by.get("dilation", 1))
        size = F.conv2d(self.values["input"].float(), self.values["weight"].float(), None, *geometry).shape
        if residual:
            self.values["residual"] = channels_last(torch.randn(size).to(precision.activations))
        self.grad = channels_last(torch.randn(size).to(precision.activations))

    def keep_off_the_kink(self) -> None:
        """Let no gradient come from where the ReLU's mask is a matter of rounding."""
        values = {name: value.double() for name, value in self.values.items()}
        by = {name: value for name, value in self.by.items() if name in ("stride", "padding", "dilation")}
        products = F.conv2d(values["input"], values["weight"], **by)
        output = conv_bn_relu(**values, **self.by | dict(activation=None))
        scale = (products.var((0, 2, 3), keepdim=True, unbiased=False) + self.by["eps"]).rsqrt()
        if "bn_weight" in values:
            scale = scale * values["bn_weight"].view(1, -1, 1, 1)
        largest = (products * scale).abs().amax((0, 2, 3), keepdim=True)
        largest += output.abs().amax((0, 2, 3), keepdim=True)
        # Both are rounded to half of eps at the most: this is eight times as much.
        margin = 4 * torch.finfo(self.precision.activations).eps * largest
        self.grad[output.abs() < margin] = 0

    def leaves(self, double: bool = False, wanted=LEARNED) -> dict[str, torch.Tensor]:
        return {
            name: (value.double() if double else value.clone()).requires_grad_(name in wanted)
            for name, value in self.values.items()
        }

    def run(self, function, double: bool = False, wanted=LEARNED) -> dict[str, torch.Tensor]:
        leaves = self.leaves(double, wanted)
        with contextlib.nullcontext() if double else self.precision.context():
            output = function(**leaves, **self.by)
        if function is ops.conv_bn_relu and not double:
            expected = self.precision.convolves and any(name in wanted for name in self.values)
            assert is_node(output) == expected
        if output.requires_grad:
            output.backward(self.grad.to(output.dtype))
        gradients = {f"gradient of {n}": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
        return {"output": output, **gradients, **{n: leaves[n] for n in ("running_mean", "running_var")}}

    def check(self) -> None:
        if self.by.get("activation", "relu"):
            self.keep_off_the_kink()
        fused, stock = self.run(ops.conv_bn_relu), self.run(conv_bn_relu)
        reference = self.run(conv_bn_relu, double=True)
        assert fused.keys() == stock.keys() == reference.keys()
        for name in fused:
            assert_accurate(name, fused[name], stock[name], reference[name])


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_a_layer_is_as_accurate_as_stock(precision, kernel, stride, residual, activation):
    Case(precision, residual, kernel, stride=stride, activation=activation).check()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_channels_that_fill_no_vector(precision, threads):
    torch.set_num_threads(threads)
    Case(precision, channels=(17, 67), kernel=3, image=(13, 29), dilation=2, padding=(3, 1)).check()


def test_without_parameters_and_statistics():
    case = Case()
    for name in ("bn_weight", "bn_bias"):
        del case.values[name]
    case.check()
    input, weight = (case.values[n].clone().requires_grad_() for n in ("input", "weight"))
    output = ops.conv_bn_relu(input, weight, None, None, padding=1, training=True, eps=1e-3)
    assert is_node(output)
    reference = conv_bn_relu(
        input.double(), weight.double(), None, None, padding=1, training=True, eps=1e-3
    )
    stock = conv_bn_relu(input, weight, None, None, padding=1, training=True, eps=1e-3)
    assert_accurate("output", output, stock, reference)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_running_statistics_at_the_ends_of_momentum(momentum):
    case = Case()
    case.by["momentum"] = momentum
    case.check()


def test_a_mean_far_from_zero_costs_no_digits():
    case = Case(kernel=1)
    case.values["input"] += 100
    case.check()


def test_any_part_of_the_inputs_may_need_a_gradient():
    case = Case(channels=(16, 48))
    whole = case.run(ops.conv_bn_relu)
    for count in range(len(LEARNED)):
        for wanted in itertools.combinations(LEARNED, count):
            part = case.run(ops.conv_bn_relu, wanted=wanted)
            got = {name.removeprefix("gradient of ") for name in part if name.startswith("gradient")}
            assert got == set(wanted)
            for name, value in part.items():
                assert torch.equal(value, whole[name]), (name, wanted)


def test_without_grad_nothing_is_kept():
    case = Case()
    with torch.no_grad():
        output = ops.conv_bn_relu(**case.leaves(), **case.by)
    assert output.grad_fn is None
    assert torch.equal(output, case.run(ops.conv_bn_relu)["output"])


def test_running_statistics_bump_their_version():
    leaves = Case().leaves()
    statistics = leaves["running_mean"], leaves["running_var"]
    for training in (True, False):
        before = [tensor._version for tensor in statistics]
        ops.conv_bn_relu(**leaves, training=training, padding=1)
        after = [tensor._version for tensor in statistics]
        assert all((b > a) == training for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "make", [torch.zeros_like, lambda t: t.sum().expand(t.shape), lambda t: t.contiguous()]
)
def test_gradients_in_any_layout(make):
    case = Case(activation=None)
    case.grad = make(case.grad)
    case.check()


# ---------------------------------------------------------------------------------------------------------
# layers in a row, whose activations are made again


class Block(torch.nn.Module):
    """Three layers, the last of which adds what the first made; then one that takes the sum."""

    def __init__(self, channels=32):
        super().__init__()
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(channels, channels, k, padding=k // 2, bias=False) for k in (3, 1, 3, 1)
        )
        self.bns = torch.nn.ModuleList(torch.nn.BatchNorm2d(channels) for _ in range(4))
        for bn in self.bns:
            torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
            torch.nn.init.normal_(bn.bias)

    def forward(self, x):
        def layer(i, x, residual=None, relu=True):
            return sites.conv_bn_act(self.convs[i], self.bns[i], None, x, residual, relu=relu)

        first = layer(0, x)
        return layer(3, layer(2, layer(1, first), first), None, False)


def make_block(precision=FLOAT32):
    block = Block().to(precision.weights)
    if precision.weights != torch.float32:  # batch norm's own stay in float32
        block.bns.float()
    return block, channels_last(torch.randn(4, 32, 13, 14).to(precision.activations))


def run_block(block, input, precision=FLOAT32, call=None):
    """Output, running statistics and all gradients of a copy."""
    copy = Block().to(next(block.parameters()).dtype)
    copy.bns.to(block.bns[0].weight.dtype)
    copy.load_state_dict(block.state_dict())
    leaf = input.clone().requires_grad_()
    with precision.context():
        output = (call or (lambda block, x: block(x)))(copy, leaf)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype)
    output.backward(channels_last(grad))
    gradients = {f"gradient of {name}": p.grad for name, p in copy.named_parameters()}
    return {"output": output, "gradient of input": leaf.grad, **gradients, **dict(copy.named_buffers())}


def in_stock(block, x):
    with sites.stock():
        return block(x)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_a_chain_is_as_accurate_as_stock(precision, recompute):
    block, input = make_block(precision)
    results = (
        run_block(block, input, precision),
        run_block(block, input, precision, in_stock),
        run_block(block.double(), input.double(), FLOAT32, in_stock),
    )
    for name, fused in results[0].items():
        if "num_batches" not in name:
            assert_accurate(name, fused, results[1][name], results[2][name])


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_what_is_made_again_is_what_was_there(precision, isa):
    """Gradients to the bit: the loads round as the stores did."""
    before = _C.cpu_isa()
    _C.select_cpu_isa(isa)
    try:
        block, input = make_block(precision)
        results = []
        for enabled in (True, False):
            chosen = set_recompute(enabled)
            results.append(run_block(block, input, precision))
            set_recompute(chosen)
    finally:
        _C.select_cpu_isa(before)
    for name, again in results[0].items():
        assert torch.equal(again, results[1][name]), name


def test_the_chain_runs_by_the_node_and_keeps_less(recompute):
    block, input = make_block()
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(input.requires_grad_())
    assert is_node(output)
    activations = sum(tensor.shape == input.shape for tensor in storages.values())
    # Each convolution's output, the input, the sum at the end; without making again also two activations.
    assert activations == (6 if recompute else 8)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_activation_checkpointing(reentrant, recompute):
    block, input = make_block()

    def call(block, x):
        return checkpoint(block, x, use_reentrant=reentrant)

    plain, checkpointed = run_block(block, input), run_block(block, input, call=call)
    for name, value in plain.items():
        if "running" not in name and "num_batches" not in name:  # which the second forward counts again
            assert torch.equal(value, checkpointed[name]), name


def test_inside_save_on_cpu(recompute):
    block, input = make_block()

    def call(block, x):
        with save_on_cpu():
            return block(x)

    plain, saved = run_block(block, input), run_block(block, input, call=call)
    for name, value in plain.items():
        assert torch.equal(value, saved[name]), name


def test_hooks_around_see_the_weights(recompute):
    block, input = make_block()
    packed = set()
    with saved_tensors_hooks(lambda t: packed.add(t.data_ptr()) or t, lambda t: t):
        block(input)
    assert {conv.weight.data_ptr() for conv in block.convs} <= packed


def test_a_second_backward_through_a_retained_graph(recompute):
    block, input = make_block()
    loss = block(input).square().sum()
    first = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(block.parameters()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(block.parameters()))


CHANGED = ("conv weight", "next conv weight", "bn weight", "bn bias", "input")


def changed_in_place(block, input, what: str) -> None:
    tensors = (
        block.convs[0].weight, block.convs[1].weight, block.bns[0].weight, block.bns[0].bias, input
    )  # fmt: skip
    with torch.no_grad():
        dict(zip(CHANGED, tensors, strict=True))[what].mul_(2)


@pytest.mark.parametrize("what", CHANGED)
def test_what_was_changed_in_place_is_noticed(what, recompute):
    block, input = make_block()
    input = input.requires_grad_() * 1
    output = block(input)
    assert is_node(output)
    changed_in_place(block, input, what)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("what", CHANGED)
def test_what_was_changed_between_two_backwards_is_noticed(what, recompute):
    """Also where the first asked for the gradients of the last layers alone."""
    block, input = make_block()
    input = input.requires_grad_() * 1
    loss = block(input).sum()
    torch.autograd.grad(loss, block.convs[1].weight, retain_graph=True)
    changed_in_place(block, input, what)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_output_that_was_changed_before_its_use_is_kept(recompute):
    """What the convolution saw is what counts, also where that is no longer what the layer made."""
    case = Case(channels=(32, 32), residual=False)
    results = []
    for function, double in ((ops.conv_bn_relu, False), (conv_bn_relu, False), (conv_bn_relu, True)):
        leaves = case.leaves(double)
        middle = function(**leaves, **case.by)
        middle = middle.cos_() if function is ops.conv_bn_relu else middle.cos()
        output = function(middle, leaves["weight"], None, None, padding=1, training=True)
        output.backward(case.grad.to(output.dtype))
        results.append([output, leaves["input"].grad, leaves["weight"].grad])
    for tensors in zip(*results, strict=True):
        assert_accurate("chain", *tensors)


# ---------------------------------------------------------------------------------------------------------
# second derivatives


def second_derivative(function, case: Case, layers: int, double: bool) -> list[torch.Tensor]:
    leaves = case.leaves(double)
    learned = [leaves[name] for name in LEARNED if name in leaves]
    grad = case.grad.to(learned[0].dtype).requires_grad_()
    output = leaves.pop("input")
    for _ in range(layers):
        output = function(output, **leaves, **case.by)
    if function is ops.conv_bn_relu:
        assert is_node(output)
    first = torch.autograd.grad(output, learned, grad, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return list(torch.autograd.grad(penalty, [*learned, grad], materialize_grads=True))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_second_derivatives(layers, residual, recompute):
    case = Case(residual=residual, channels=(48, 48), image=(9, 10), activation="relu")
    results = [
        second_derivative(function, case, layers, double)
        for function, double in ((ops.conv_bn_relu, False), (conv_bn_relu, False), (conv_bn_relu, True))
    ]
    names = [*(name for name in LEARNED if name in case.values), "grad"]
    for name, *tensors in zip(names, *results, strict=True):
        assert_accurate(name, *tensors)


def test_a_gradient_penalty_trains():
    case = Case()
    leaves = case.leaves()
    output = ops.conv_bn_relu(**leaves, **case.by)
    (grad,) = torch.autograd.grad(output.square().sum(), leaves["input"], create_graph=True)
    grad.square().sum().backward()
    assert all(leaves[name].grad.isfinite().all() for name in LEARNED)


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
    "conv_bias": ({}, lambda v: v | dict(conv_bias=torch.randn(64))),
    "contiguous": ({}, lambda v: v | dict(input=v["input"].contiguous())),
    "strided": ({}, lambda v: v | dict(input=v["input"].repeat(1, 1, 1, 2)[..., ::2])),
    "float64": ({}, lambda v: {n: t.double() for n, t in v.items()}),
    "few input channels": (
        {}, lambda v: v | dict(input=channels_last(v["input"][:, :8]), weight=v["weight"][:, :8])
    ),
    "few pixels": ({}, lambda v: v | dict(input=channels_last(v["input"][:2]), residual=v["residual"][:2])),
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


# ---------------------------------------------------------------------------------------------------------
# evaluation, folded


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


# ---------------------------------------------------------------------------------------------------------
# a whole network


def trained(model, images, labels, context) -> torch.Tensor:
    """All parameters after ten steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    with context:
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_resnet18_trains_as_stock():
    """As close to stock as stock is to itself, where each weight is off by a rounding at the start."""
    torch.manual_seed(0)
    state = models.resnet18(num_classes=10).state_dict()
    images, labels = channels_last(torch.randn(8, 3, 64, 64)), torch.arange(8)

    def model(change=lambda t: t):
        model = models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
        model.load_state_dict({n: change(t) if t.is_floating_point() else t for n, t in state.items()})
        return model

    fused = trained(model(), images, labels, contextlib.nullcontext())
    stock = trained(model(), images, labels, sites.stock())
    eps = torch.finfo(torch.float32).eps / 2
    nudged = trained(
        model(lambda t: t * (1 + eps * torch.randn_like(t).sign())), images, labels, sites.stock()
    )
    distance, bound = (fused - stock).square().mean().sqrt(), (nudged - stock).square().mean().sqrt()
    assert 0 < distance <= FACTOR * bound
