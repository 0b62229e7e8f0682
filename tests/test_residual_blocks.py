"""Residual blocks as one autograd node: to the bit what their layers give, where nobody can tell."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from blocks import KINDS, assert_equal, by_layers, calls_of, every_kind, in_stock, is_one, made, run
from layers import FLOAT32, PRECISIONS, channels_last
from saving import kept
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastres import models, recording, residual_blocks, tuning
from fastres.nn import BasicBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_as_layers(block, input, precision=FLOAT32, one=True, **options):
    ours, ran_as_one = run(block, input, precision, **options)
    expected, in_layers = run(block, input, precision, by_layers, **options)
    assert ran_as_one == one and not in_layers
    assert_equal(ours, expected)


# ---------------------------------------------------------------------------------------------------------
# values


@every_kind
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_a_block_gives_what_its_layers_give(precision, make, recompute):
    assert_as_layers(*made(make, precision), precision)


@pytest.mark.parametrize(
    "make", [KINDS["basic, projected"], KINDS["bottleneck"]], ids=["basic", "bottleneck"]
)
def test_any_part_may_be_frozen(make):
    block, input = made(make)
    names = [name for name, _ in block.named_parameters()]
    frozen = [[name] for name in names]
    frozen += [list(group) for _, group in itertools.groupby(names, lambda name: name.partition(".")[0])]
    frozen += [names[:at] for at in range(len(names))] + [names[at:] for at in range(1, len(names) + 1)]
    for some, needs_input in itertools.product(frozen, (True, False)):
        if len(some) == len(names) and not needs_input:
            continue
        part = copy.deepcopy(block)
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(name not in some)
        layers = [part.conv1, part.bn1], [] if part.downsample is None else list(part.downsample)
        learn = [any(p.requires_grad for module in layer for p in module.parameters()) for layer in layers]
        one = needs_input or learn[0] and (learn[1] or part.downsample is None)
        assert_as_layers(part, input, one=one, needs_input=needs_input)


@pytest.mark.parametrize(
    "arguments",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}],
    ids=str,
)
def test_batch_norms_of_all_kinds(arguments):
    block = BasicBlock(64, 64, norm_layer=lambda channels: nn.BatchNorm2d(channels, **arguments))
    input = channels_last(torch.randn(4, 64, 9, 10))

    def twice(block, x):
        return block(block(x))

    ours, one = run(block, input, call=twice)
    expected, _ = run(block, input, call=lambda block, x: by_layers(block, by_layers(block, x)))
    assert one
    assert_equal(ours, expected)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_model_gives_what_its_layers_give(arch, recompute):
    model = getattr(models, arch)(num_classes=10).train()
    images = channels_last(torch.randn(2, 3, 64, 64))

    ours, _ = run(model, images)
    expected, _ = run(model, images, call=by_layers)
    assert_equal(ours, expected)


def test_under_vmap():
    block = BasicBlock(
        64, 64, norm_layer=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)
    )
    inputs = torch.stack([channels_last(torch.randn(4, 64, 9, 10)) for _ in range(2)])
    ours = torch.func.vmap(block)(inputs)
    for values, input in zip(ours, inputs, strict=True):
        torch.testing.assert_close(values, in_stock(block, input), rtol=1e-3, atol=1e-4)


def test_all_blocks_of_a_model_are_nodes():
    model = models.resnet50().train()
    calls = calls_of(model, channels_last(torch.randn(2, 3, 64, 64)))
    assert calls["_ResidualBlock"] == 16 and "_ConvBnAct" not in calls


@every_kind
def test_second_derivatives(make):
    block, input = made(make)
    block, input = block.double(), input.double()
    assert not is_one(block(input))  # there are no kernels for double
    block, input = block.float(), input.float()
    direction = torch.randn(input.shape)

    def second(call):
        part = copy.deepcopy(block)
        leaf = input.clone().requires_grad_()
        output = call(part, leaf)
        (first,) = torch.autograd.grad((output * output.detach().cos()).sum(), leaf, create_graph=True)
        (first * direction).sum().backward()
        return {"input": leaf.grad, **{name: p.grad for name, p in part.named_parameters()}}

    ours, stock = second(lambda block, x: block(x)), second(in_stock)
    assert ours.keys() == stock.keys()
    for name, value in ours.items():
        if value is None:  # does not depend on the last bias, of which stock makes zeros
            assert stock[name] is None or not stock[name].any(), name
            continue
        scale = stock[name].square().mean().sqrt()
        assert (value - stock[name]).square().mean().sqrt() < 1e-3 * scale, name


def test_second_derivatives_under_an_autocast_that_the_forward_had_not():
    block, input = made(KINDS["basic, projected"])
    input.requires_grad_()
    gradients = []
    for autocast in (False, True):
        output = block(input)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            gradients.append(
                torch.autograd.grad(output, input, torch.ones_like(output), create_graph=True)[0]
            )
    assert torch.equal(*gradients)


def test_a_graph_may_be_walked_twice():
    block, input = made(KINDS["bottleneck, projected"])
    output = block(input.requires_grad_())
    parameters = list(block.parameters())
    first, again = (torch.autograd.grad(output.sum(), parameters, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))


# ---------------------------------------------------------------------------------------------------------
# what is kept, and who sees it


def test_a_model_keeps_no_more_than_its_layers(recompute):
    model = models.resnet50().train()
    images = channels_last(torch.randn(2, 3, 64, 64))
    with kept() as by_blocks:
        assert model(images).requires_grad
    with kept() as one_by_one:
        assert by_layers(model, images).requires_grad
    assert 0 < by_blocks() <= one_by_one()


def test_gradients_of_an_earlier_part_first(recompute):
    """Where a later block's input is to be made again, that cannot be; the error says so."""
    first, input = made(KINDS["basic"])
    second = made(KINDS["basic"])[0]
    between = first(input + 0)
    output = second(between)
    torch.autograd.grad(between.sum(), list(first.parameters()))
    again = second.conv1.weight, output.sum()
    if recompute:
        with pytest.raises(RuntimeError, match="set_recompute"):
            torch.autograd.grad(again[1], again[0])
    else:
        torch.autograd.grad(again[1], again[0])


def test_a_weight_that_is_changed_before_its_use_is_an_error():
    block, input = made(KINDS["basic"])
    output = block(input)
    with torch.no_grad():
        block.conv1.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_weight_that_a_hook_changes_in_the_backward_pass_is_an_error():
    first, input = made(KINDS["basic"])
    second = made(KINDS["basic"])[0]
    between = first(input)

    def change(grad):
        with torch.no_grad():
            first.conv1.weight += 1

    between.register_hook(change)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second(between).sum().backward()


FROZEN_PARTS = {
    "its first layer": ("conv1.weight", "bn1.weight", "bn1.bias"),
    "its projection": ("downsample.0.weight", "downsample.1.weight", "downsample.1.bias"),
}


@pytest.mark.parametrize("frozen", FROZEN_PARTS.values(), ids=FROZEN_PARTS)
def test_a_block_of_which_a_part_is_not_differentiated(frozen):
    """What would be kept for that part alone may change."""
    block, input = made(KINDS["basic, projected"])
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    output = block(input)
    with torch.no_grad():
        block.get_parameter(frozen[0]).add_(1)
    output.sum().backward()
    assert not is_one(output)


def test_a_bias_may_change_before_its_use():
    block, input = made(KINDS["basic"])
    expected, _ = run(block, input)
    output = block(input)
    with torch.no_grad():
        block.bn1.bias += 1
    generator = torch.Generator().manual_seed(0)
    output.backward(channels_last(torch.randn(output.shape, generator=generator)))
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter.grad, expected[f"gradient of {name}"]), name


def test_a_checkpointed_block_counts_as_stock():
    block, input = made(KINDS["bottleneck"])
    results = [
        run(block, input, call=lambda block, x, call=call: checkpoint(call, block, x, use_reentrant=False))
        for call in (lambda block, x: block(x), by_layers)
    ]
    assert results[0][1]
    assert_equal(results[0][0], results[1][0])
    stock, _ = run(block, input, call=lambda b, x: checkpoint(in_stock, b, x, use_reentrant=False))
    for name, value in results[0][0].items():
        if "num_batches" in name:
            assert value == stock[name], name


def test_where_no_hooks_may_see_what_is_saved():
    block, input = made(KINDS["basic"])
    with torch.autograd.graph.disable_saved_tensors_hooks("none, please"):
        ours, one = run(block, input, call=lambda block, x: block(block(x)))
        expected, _ = run(block, input, call=lambda block, x: by_layers(block, by_layers(block, x)))
    assert one
    assert_equal(ours, expected)


def test_an_error_after_the_last_layer_leaves_it_counted():
    block, input = made(KINDS["basic"])

    def pack(tensor):
        raise MemoryError

    with saved_tensors_hooks(pack, lambda tensor: tensor), pytest.raises(MemoryError):
        block(input)
    assert [int(bn.num_batches_tracked) for bn in (block.bn1, block.bn2)] == [1, 1]


@pytest.mark.parametrize("call", [lambda block, x: block(x), by_layers], ids=["block", "layers"])
def test_a_graph_that_nobody_walks_is_freed(call, recompute):
    """Without the collector of garbage; and one that is walked, but kept."""
    blocks = [made(KINDS["basic"])[0] for _ in range(9)]
    input = made(KINDS["basic"])[1]

    def forward():
        values = [input + 0]
        for block in blocks:
            values.append(call(block, values[-1]))
        return values

    gc.collect()
    gc.disable()
    try:
        outputs = list(map(weakref.ref, values := forward()))
        values[-1].sum().backward(retain_graph=True)
        del values
        outputs += list(map(weakref.ref, forward()))
        assert all(output() is None for output in outputs)
    finally:
        gc.enable()


def test_what_was_not_run_is_not_counted(monkeypatch):
    """An error in the third layer: the first two have taken the batch into their statistics."""
    block, input = made(KINDS["bottleneck"])
    forward, calls = residual_blocks._forward, []

    def failing(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise MemoryError
        return forward(*arguments)

    monkeypatch.setattr(residual_blocks, "_forward", failing)
    before = block.bn3.running_mean.clone()
    with pytest.raises(MemoryError):
        block(input)
    assert [int(bn.num_batches_tracked) for bn in (block.bn1, block.bn2, block.bn3)] == [1, 1, 0]
    assert torch.equal(block.bn3.running_mean, before)


# ---------------------------------------------------------------------------------------------------------
# what is in the way


def hook_on(name):
    def change(block):
        block.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * 2)

    return change


def frozen_norm(block):
    block.bn2.eval()


def shared_norm(block):
    block.bn2 = block.bn1


def longer_shortcut(block):
    block.downsample.append(nn.Hardtanh())


def other_container(block):
    class Doubling(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * 2

    block.downsample = Doubling(*block.downsample)


def other_activation(block):
    block.relu = nn.Hardswish()


def few_channels(block):
    block.conv1, block.bn1 = nn.Conv2d(64, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
    block.conv2 = nn.Conv2d(8, 96, 3, padding=1, bias=False)


HINDRANCES = {
    **{f"hook on {n}": hook_on(n) for n in ("conv1", "bn2", "relu", "downsample", "downsample.1")},
    **{f.__name__: f for f in (frozen_norm, shared_norm, longer_shortcut, other_container)},
    **{f.__name__: f for f in (other_activation, few_channels)},
}


@pytest.mark.parametrize("change", HINDRANCES.values(), ids=HINDRANCES)
def test_the_layers_run_one_by_one(change, monkeypatch, few_values):
    monkeypatch.undo()  # of few channels, convolutions of few values are ours
    block = made(KINDS["basic, projected"])[0]
    input = channels_last(torch.randn(8, 64, 40, 40))
    change(block)
    ours, one = run(block, input)
    stock, _ = run(block, input, call=in_stock)
    assert not one
    for name, value in ours.items():
        assert (value is None) == (stock[name] is None), name
        if value is not None:
            scale = (
                1 if name.endswith("conv2.bias") else float(stock[name].abs().max())
            )  # its gradient is 0
            torch.testing.assert_close(value, stock[name], rtol=1e-3, atol=1e-2 * scale)


def contiguous(block, x):
    return block(x.contiguous())


def evaluated(block, x):
    return block.eval()(x)


def without_grad(block, x):
    with torch.no_grad():
        return block(x)


def measured(block, x):
    with tuning.forcing(ours=False):
        return block(x)


def cast(block, x):  # what is added is then float32
    with torch.autocast("cpu", torch.bfloat16):
        return block(x)


@pytest.mark.parametrize("call", [contiguous, evaluated, without_grad, measured, cast, in_stock])
def test_calls_that_go_layer_by_layer(call):
    block, input = made(KINDS["basic, projected"])
    assert not run(block, input, call=call)[1]
    assert run(block, input)[1]  # and what was found out does not hold for other calls


@every_kind
def test_who_listens_hears_of_each_layer(make):
    block, input = made(make)
    heard = []
    for call in (lambda block, x: block(x), by_layers):
        with recording.record() as records:
            output = call(block, input)
        heard.append([(r.modules, r.ran, r.fused, r.reason, r.own_convolution) for r in records])
        assert is_one(output) == (call is not by_layers)
    assert heard[0] == heard[1] and len(heard[0]) >= 2


@every_kind
def test_who_listens_hears_of_each_layers_gradients(make):
    block, input = made(make)
    begun, went_back = [], []

    def listen(record):
        begun.append(record.modules)
        record.at_backward = lambda: went_back.append(record.modules)

    with recording.listen(listen):
        output = block(input)
    output.sum().backward()
    assert set(went_back) == set(begun) and went_back[0] == begun[-1] and went_back[-1] == begun[0]
