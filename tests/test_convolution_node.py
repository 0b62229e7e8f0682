"""conv_bn_relu in training as one autograd node: values, derivatives, and the machinery of autograd."""

import contextlib
import functools
import itertools

import pytest
import torch
from accuracy import FACTOR
from layers import FLOAT32, LEARNED, PRECISIONS, Case, assert_accurate, channels_last, conv_bn_relu, is_node
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastres import _C, convolution, models, ops, sites
from fastres.recompute import set_recompute

pytestmark = pytest.mark.usefixtures("one_thread", "small_layers")


# ---------------------------------------------------------------------------------------------------------
# one layer


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


@pytest.mark.parametrize("channels, groups, stride", [(32, 8, 1), (64, 8, 2), (48, 3, 1)])
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_groups(precision, channels, groups, stride):
    Case(precision, channels=(channels, channels), groups=groups, stride=stride).check()


@pytest.mark.parametrize(
    "batch, image", [(1, (3, 3)), (1, (7, 7)), (1, (13, 17)), (2, (11, 12)), (3, (13, 13))], ids=str
)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_few_pixels(precision, batch, image, monkeypatch):
    monkeypatch.setattr(convolution, "_FEWEST_PIXELS_OF_AN_IMAGE", 0)
    Case(precision, batch=batch, image=image).check()


@pytest.mark.parametrize(
    "image, kernel, stride", [((1, 1), 3, 2), ((1, 20), 3, (2, 1)), ((1, 20), 1, (2, 1))]
)
@pytest.mark.parametrize("batch", [1, 16])
def test_a_stride_over_one_row(batch, image, kernel, stride, monkeypatch):
    """In float32: of a single pixel in bf16, stock PyTorch's gradients may be NaN."""
    monkeypatch.setattr(convolution, "_FEWEST_PIXELS_OF_AN_IMAGE", 0)
    if batch * image[1] > 1:
        Case(batch=batch, image=image, kernel=kernel, stride=stride).check()


def test_few_channels_of_few_values(few_values, monkeypatch):
    monkeypatch.undo()
    Case(channels=(3, 16), batch=2).check()  # asserts that it runs as one node
    many = Case(residual=False, channels=(3, 16), batch=few_values // 1024)
    assert not is_node(ops.conv_bn_relu(**many.leaves(), **many.by))


def convolved(output: torch.Tensor) -> bool:
    """Whether the convolution before a batch norm of ours is ours in one direction alone."""
    return type(output.grad_fn.next_functions[0][0]).__name__ == "_Conv2dBackward"


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("order", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("matrices", [False, True])
def test_of_images_one_direction_is_ours(precision, order, matrices, monkeypatch):
    monkeypatch.setattr(convolution, "_LEAST_CHANNELS", 32)
    monkeypatch.setattr(convolution, "_MANY_VALUES", 2**16)
    monkeypatch.setattr(convolution, "_is_of_matrices", lambda dtype: matrices)
    called = []
    for name in ("_forward", "_backward_weight"):
        noted = functools.partial(call_noted, called, name, getattr(convolution, name))
        monkeypatch.setattr(convolution, name, noted)
    case = Case(precision, channels=(3, 32), kernel=7, stride=2, image=(33, 31), residual=False)
    case.keep_off_the_kink()
    results, learned = [], ("input", "weight", "bn_weight", "bn_bias")
    for function, double in ((ops.conv_bn_relu, False), (conv_bn_relu, False), (conv_bn_relu, True)):
        leaves = case.leaves(double, learned)
        with contextlib.nullcontext() if double else precision.context():
            output = function(**leaves, **case.by)
        if function is ops.conv_bn_relu:
            assert convolved(output) == precision.convolves
        grads = torch.autograd.grad(
            output, [leaves[n] for n in learned], case.grad.to(output.dtype), create_graph=order == 2
        )
        if order == 2:
            penalty = sum(grad.double().square().mean() for grad in grads)
            grads = torch.autograd.grad(penalty, [leaves[n] for n in learned[:3]])
        results.append([output, *grads])
    for name, *tensors in zip(("output", *learned), *results, strict=False):
        assert_accurate(name, *tensors)
    expected = "_backward_weight" if matrices else "_forward"
    assert called == [expected] * precision.convolves


def call_noted(called, name, function, *arguments):
    called.append(name)
    return function(*arguments)


def test_a_single_pixel_is_refused_as_by_stock():
    case = Case(batch=1, image=(1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ops.conv_bn_relu(**case.leaves(), **case.by)
    assert torch.equal(case.leaves()["running_mean"], case.values["running_mean"])


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
    """Over some draws: the errors of one gradient of 32 values in bf16 vary more than by the bound."""
    draws = []
    for _ in range(6):
        block, input = make_block(precision)
        ours, stock = (run_block(block, input, precision, call) for call in (None, in_stock))
        draws.append((ours, stock, run_block(block.double(), input.double(), FLOAT32, in_stock)))
    for name in draws[0][0]:
        if "num_batches" not in name:
            sides = zip(*([side[name] for side in draw] for draw in draws), strict=True)
            assert_accurate(name, *(torch.stack(values) for values in sides))


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
    # Each convolution's output, the input; without making again two activations more, and the sum.
    assert activations == (5 if recompute else 8)


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


CHANGED = ("conv weight", "next conv weight", "bn weight", "input")


def changed_in_place(block, input, what: str) -> None:
    tensors = block.convs[0].weight, block.convs[1].weight, block.bns[0].weight, input
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
@pytest.mark.parametrize("groups", [1, 12])
def test_second_derivatives(layers, residual, groups, recompute):
    case = Case(residual=residual, channels=(48, 48), image=(9, 10), activation="relu", groups=groups)
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
