"""Activations that are made again in backward: same gradients to the bit, less kept, and nothing missed."""

import contextlib
import gc
import weakref

import pytest
import torch
from saving import kept
from torch import library
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastres import models, ops, sites
from fastres.recompute import set_recompute


class Chain(torch.nn.Module):
    """A stem with its pool, two residual blocks, and a layer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6))
        self.bns = torch.nn.ModuleList(torch.nn.BatchNorm2d(8) for _ in range(6))
        self.pool = torch.nn.MaxPool2d(2)
        self.to(dtype)

    def forward(self, x):
        def layer(i, x, residual=None):
            return sites.conv_bn_act(self.convs[i], self.bns[i], None, x, residual, relu=True)

        x = sites.max_pool(self.pool, layer(0, x))
        for i in (1, 3):
            x = layer(i + 1, layer(i, x), x)
        return layer(5, x)


def run(model, input):
    input = input.clone().requires_grad_()
    model.zero_grad()
    output = model(input)
    output.square().sum().backward()
    return [output, input.grad, *(p.grad for p in model.parameters())]


def assert_same_where_kept(model, input):
    """To the bit, whether activations are made again or kept."""
    results = []
    for enabled in (True, False):
        before = set_recompute(enabled)
        results.append(run(model, input))
        set_recompute(before)
    for again, as_kept in zip(*results, strict=True):
        assert torch.equal(again, as_kept)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_are_the_same_to_the_bit(dtype, channels_last):
    model, input = Chain(dtype), torch.randn(4, 8, 12, 12).to(dtype)
    if channels_last:
        input = input.to(memory_format=torch.channels_last)
    assert_same_where_kept(model, input)


def test_keeps_less_than_stock():
    """ResNet-50 in float32: at most three quarters of what stock PyTorch keeps."""
    model = models.resnet50()
    input = torch.randn(2, 3, 64, 64)
    counts = []
    for context in (contextlib.nullcontext, sites.stock):
        with kept() as count, context():
            output = model(input)
        weights = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.dim() > 1)
        counts.append(count() - weights)
        del output
    assert counts[0] <= 0.75 * counts[1]


def test_keeps_little_more_than_half_at_the_usual_size():
    """ResNet-50 in float32 at 224x224: at most 0.55x of what stock PyTorch keeps, weights apart."""
    model, counts = models.resnet50().to(memory_format=torch.channels_last), []
    input = torch.randn(2, 3, 224, 224).to(memory_format=torch.channels_last)
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.dim() > 1)
    for context in (contextlib.nullcontext, sites.stock):
        with kept() as count, context():
            output = model(input)
        counts.append(count() - weights)
        del output
    assert counts[0] <= 0.55 * counts[1]


class Blocks(torch.nn.Module):
    """Residual blocks of one layer each, behind one with a projected shortcut."""

    def __init__(self, count, call=lambda block, x: block(x)):
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 1, bias=False) for _ in range(count + 2))
        self.bns = torch.nn.ModuleList(torch.nn.BatchNorm2d(4) for _ in range(count + 2))
        self.call, self.calls = call, [0] * count
        self.double()

    def layer(self, i, x, residual, relu=True):
        return sites.conv_bn_act(self.convs[i], self.bns[i], None, x, residual, relu=relu)

    def block(self, i, x):
        self.calls[i] += 1
        return self.layer(i + 2, x, x)

    def forward(self, x):
        x = self.layer(0, x, self.layer(1, x, None, relu=False))
        for i in range(len(self.calls)):
            x = self.call(lambda x, i=i: self.block(i, x), x)
        return x


def test_of_a_long_chain_of_sums_few_are_kept():
    """Five in six: the sum before the first block is made of two outputs of convolutions."""
    blocks, input = Blocks(12), torch.randn(2, 4, 20, 20, dtype=torch.float64)
    with kept() as count:
        blocks(input)
    activations = count() // (input.numel() * input.element_size())
    assert activations == 14 + 1 + 2  # outputs of convolutions, the input, sums
    assert_same_where_kept(blocks, input)


def test_a_checkpointed_block_does_not_compute_the_one_before_again():
    blocks = Blocks(3, lambda block, x: checkpoint(block, x, use_reentrant=False))
    input = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    plain = Blocks(3)
    plain.load_state_dict(blocks.state_dict())
    for a, b in zip(run(plain, input), run(blocks, input), strict=True):
        assert torch.equal(a, b)
    blocks.calls = [0] * 3
    output = blocks(input)
    torch.autograd.grad(output.sum(), blocks.convs[-1].weight)
    assert blocks.calls == [1, 1, 2]


@pytest.mark.parametrize("before_it", ["nothing of ours", "a layer of ours"])
def test_a_sum_without_relu_reaches_the_next_layer(before_it, recompute):
    """The next convolution's weights get their gradient from the sum, not from what was added to it."""
    gradients = []
    for fused in (True, False):
        torch.manual_seed(0)
        blocks, input = Blocks(1), torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        with contextlib.nullcontext() if fused else sites.stock():
            x = blocks.layer(0, input, None) if before_it == "a layer of ours" else input * 1
            x = blocks.layer(2, blocks.layer(1, x, x, relu=False), None)
        x.square().sum().backward()
        gradients.append([input.grad, *(p.grad for p in blocks.parameters() if p.grad is not None)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_activation_is_really_freed(recompute):
    input, conv = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 1, 1, requires_grad=True)
    middle = ops.bn_relu(input, None, None, training=True)
    alive = weakref.ref(middle)
    output = ops.conv_bn_relu(middle, conv, None, None, training=True)
    del middle
    gc.collect()
    assert (alive() is None) == recompute
    output.sum().backward()


def test_a_second_backward_through_a_retained_graph(recompute):
    model, input = Chain(torch.float64), torch.randn(2, 8, 8, 8, dtype=torch.float64)
    loss = model(input).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(model.parameters()))


def test_second_derivatives(recompute):
    torch.manual_seed(0)
    make = dict(dtype=torch.float64, requires_grad=True)
    input, first, second = (
        torch.randn(2, 3, 4, 4, **make),
        torch.randn(3, 3, 1, 1, **make),
        torch.randn(2, 3, 1, 1, **make),
    )

    def function(input, first, second):
        middle = ops.conv_bn_relu(input, first, None, None, training=True)
        return ops.conv_bn_relu(middle, second, None, None, training=True)

    assert torch.autograd.gradcheck(function, (input, first, second))
    assert torch.autograd.gradgradcheck(function, (input, first, second))


@pytest.mark.parametrize("changed", ["bn weight", "bn input", "conv weight"])
def test_what_was_changed_in_place_is_noticed(changed, recompute):
    weight, bias = (torch.rand(4, requires_grad=True) for _ in range(2))
    conv = torch.randn(4, 4, 1, 1, requires_grad=True)
    input = torch.randn(2, 4, 3, 3, requires_grad=True) * 1
    middle = ops.bn_relu(input, None, None, weight, bias, True)
    output = ops.conv_bn_relu(middle, conv, None, None, training=True)
    with torch.no_grad():
        {"bn weight": weight, "bn input": input, "conv weight": conv}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_output_that_was_changed_before_its_use_is_kept(recompute):
    """What the convolution saw is what counts, also where that is no longer what the batch norm made."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        input = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        conv = torch.randn(4, 4, 1, 1, dtype=torch.float64, requires_grad=True)
        bn_relu = ops.bn_relu if fused else lambda *a, **k: F.relu(F.batch_norm(*a, **k))
        middle = bn_relu(input, None, None, training=True)
        middle = middle.mul_(3) if fused else middle * 3
        if fused:
            output = ops.conv_bn_relu(middle, conv, None, None, training=True)
        else:
            output = F.relu(F.batch_norm(F.conv2d(middle, conv), None, None, training=True))
        output.square().sum().backward()
        results.append((input.grad, conv.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_activation_checkpointing(reentrant, recompute):
    model, input = Chain(torch.float64), torch.randn(2, 8, 8, 8, dtype=torch.float64)
    plain = run(model, input)
    checkpointed = run(lambda_module(model, lambda x: checkpoint(model, x, use_reentrant=reentrant)), input)
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def lambda_module(model, function):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return function(x)

    return Wrapped()


def test_hooks_around_see_what_is_kept(recompute):
    model, input = Chain(torch.float64), torch.randn(2, 8, 8, 8, dtype=torch.float64)
    plain = run(model, input)
    with save_on_cpu():
        again = run(model, input)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
    convolutions = {conv.weight.data_ptr() for conv in model.convs}
    packed = set()
    with saved_tensors_hooks(lambda t: packed.add(t.data_ptr()) or t, lambda t: t):
        model(input)
    assert convolutions <= packed


def test_whole_models_train_alike(recompute):
    losses = []
    for stock in (False, True):
        torch.manual_seed(0)
        model = models.cifar_resnet20().double()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        images, labels = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.arange(8)
        with sites.stock() if stock else contextlib.nullcontext():
            for _ in range(5):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_again_is_checked_like_the_forward(device, emulated):
    if emulated:
        pytest.skip("there are no bindings")
    op = torch.ops.fastres.bn_act_again
    input, residual = (torch.randn(3, 5, 4, 4, device=device) for _ in range(2))
    weight, bias = torch.rand(5, device=device), torch.randn(5, device=device)
    for other, relu in ((None, True), (residual, True), (residual, False)):
        output, mean, rstd = torch.ops.fastres.bn_act_forward(
            input, other, None, None, weight, bias, True, 0.1, 1e-5, relu
        )
        arguments = (input, other, weight, bias, mean, rstd, relu)
        assert torch.equal(op(*arguments), output)
        library.opcheck(op.default, arguments)
    with pytest.raises(RuntimeError, match="fastres::bn_act_again: save_mean has shape"):
        op(input, None, weight, bias, mean[:3], rstd, True)
