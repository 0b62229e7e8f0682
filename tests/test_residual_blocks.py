"""Residual blocks as one autograd node: to the bit what their layers give, where nobody can tell."""

import copy
import itertools

import pytest
import torch
from layers import FLOAT32, PRECISIONS, channels_last
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import models, recording, residual_blocks, sites, tuning
from fastres.nn import BasicBlock, Bottleneck, ConvBn2d
from fastres.recompute import set_recompute

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "basic": lambda: BasicBlock(64, 64),
    "basic, projected": lambda: BasicBlock(64, 96, 2, ConvBn2d(64, 96, 1, 2, bias=False)),
    "bottleneck": lambda: Bottleneck(128, 32),
    "bottleneck, projected": lambda: Bottleneck(64, 32, 2, ConvBn2d(64, 128, 1, 2, bias=False)),
    "bottleneck, groups": lambda: Bottleneck(128, 64, 1, ConvBn2d(128, 256, 1, bias=False), 8, 32),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def made(make, precision=FLOAT32):
    block = make().train()
    for bn in block.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias)
        elif isinstance(bn, nn.Conv2d):
            bn.to(precision.weights)
    channels = block.conv1.in_channels
    return block, channels_last(torch.randn(4, channels, 9, 10).to(precision.activations))


def is_one(output: torch.Tensor) -> bool:
    return output.grad_fn is not None and "_ResidualBlock" in output.grad_fn.name()


def run(block, input, precision=FLOAT32, call=None, needs_input=True):
    """Output, gradients and buffers of a copy, and whether it ran as one node."""
    block = copy.deepcopy(block)
    leaf = input.clone().requires_grad_(needs_input)
    with precision.context():
        output = (call or (lambda block, x: block(x)))(
            block, leaf + 0
        )  # no leaf, whose gradients do not meet
    generator = torch.Generator().manual_seed(0)
    if output.requires_grad:
        grad = torch.randn(output.shape, generator=generator).to(output.dtype)
        output.backward(channels_last(grad) if grad.dim() == 4 else grad)
    values = {"output": output.detach(), "gradient of input": leaf.grad}
    values |= {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    return values | dict(block.named_buffers()), is_one(output)


def by_layers(block, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites, "_as_one", lambda *_: None)
        return block(x)


def in_stock(block, x):
    with sites.stock():
        return block(x)


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        same = value is expected[name] if value is None else torch.equal(value, expected[name])
        assert same, name


def assert_as_layers(block, input, precision=FLOAT32, **options):
    ours, one = run(block, input, precision, **options)
    expected, in_layers = run(block, input, precision, by_layers, **options)
    assert one and not in_layers
    assert_equal(ours, expected)


# ---------------------------------------------------------------------------------------------------------
# values


@pytest.fixture(params=[True, False], ids=["recompute", "keep"])
def recompute(request):
    before = set_recompute(request.param)
    yield
    set_recompute(before)


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
        assert_as_layers(part, input, needs_input=needs_input)


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

    def one_by_one(model, x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sites, "_as_one", lambda *_: None)
            return model(x)

    ours, _ = run(model, images)
    expected, _ = run(model, images, call=one_by_one)
    assert_equal(ours, expected)


def test_all_blocks_of_a_model_are_nodes():
    model = models.resnet50().train()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(channels_last(torch.randn(2, 3, 64, 64)))
    calls = {event.key: event.count for event in profiled.key_averages()}
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


def test_a_graph_may_be_walked_twice():
    block, input = made(KINDS["bottleneck, projected"])
    output = block(input.requires_grad_())
    parameters = list(block.parameters())
    first, again = (torch.autograd.grad(output.sum(), parameters, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))


# ---------------------------------------------------------------------------------------------------------
# what is kept, and who sees it


def kept_bytes(call) -> int:
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def test_a_model_keeps_no_more_than_its_layers(recompute):
    model = models.resnet50().train()
    images = channels_last(torch.randn(2, 3, 64, 64))
    one = kept_bytes(lambda: model(images))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites, "_as_one", lambda *_: None)
        assert one <= kept_bytes(lambda: model(images))


def test_a_weight_that_is_changed_before_its_use_is_an_error():
    block, input = made(KINDS["basic"])
    output = block(input)
    with torch.no_grad():
        block.conv1.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


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


def biased(block):
    block.conv2 = nn.Conv2d(96, 96, 3, padding=1)


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
    **{f.__name__: f for f in (frozen_norm, biased, shared_norm, longer_shortcut, other_container)},
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
    with tuning._forcing(ours=False):
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


# ---------------------------------------------------------------------------------------------------------
# other people's models


def calls_of(model, images) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(images)
    return {event.key: event.count for event in profiled.key_averages()}


@pytest.mark.parametrize("client, arch, blocks, layers", [
    ("torchvision", "resnet18", 8, 0),
    ("torchvision", "resnext50_32x4d", 16, 0),
    ("timm", "resnet50", 16, 0),
    ("timm", "resnet26d", 4, 4 * 4 + 1),  # the other shortcuts begin with an average or an nn.Identity
])  # fmt: skip
def test_fused_blocks_of_clients(client, arch, blocks, layers, request):
    package = request.getfixturevalue(client)
    make = package.create_model if client == "timm" else lambda name: getattr(package.models, name)()
    model = fastres.fuse(make(arch)).train()
    images = channels_last(torch.randn(2, 3, 64, 64))
    calls = calls_of(model, images)
    assert (calls["_ResidualBlock"], calls.get("_ConvBnAct", 0)) == (blocks, layers)
    ours, _ = run(model, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites, "_as_one", lambda *_: None)
        expected, _ = run(model, images)
    assert_equal(ours, expected)


class Block(nn.Module):
    """A block as its users write it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.shortcut = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.nothing = nn.Identity()


class ShortcutFirst(Block):
    def forward(self, x):
        identity = self.shortcut(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(self.nothing(x))) + identity)


class ShortcutLast(Block):
    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return torch.relu_(out)


class Identical(Block):
    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(self.nothing(F.relu(self.bn1(self.conv1(x)))))))


class BranchUsedTwice(Block):
    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + x) + inner


class ShortcutUsedTwice(Block):
    def forward(self, x):
        shortcut = self.shortcut(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut) * shortcut


class SomethingBetween(Block):
    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        half = x * 0.5
        return F.relu(self.bn2(self.conv2(inner)) + x) - half


class ShortcutOfTheBranch(Block):
    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(inner))


def order_of_calls(block, x) -> list[str]:
    names, order = {module: name for name, module in block.named_modules()}, []
    for module in block.modules():
        if module is not block:
            module.register_forward_hook(lambda module, *_: order.append(names[module]))
    block(x)
    return order


@pytest.mark.parametrize("kind, one", [
    (ShortcutFirst, True), (ShortcutLast, True), (Identical, True), (BranchUsedTwice, False),
    (ShortcutUsedTwice, False), (SomethingBetween, False), (ShortcutOfTheBranch, False),
])  # fmt: skip
def test_blocks_as_users_write_them(kind, one):
    stock = kind().train()
    fused, x = fastres.fuse(stock), channels_last(torch.randn(4, 32, 11, 12))
    assert calls_of(fused, x).get("_ResidualBlock", 0) == one
    ours, _ = run(fused, x)
    expected, _ = run(fused, x, call=by_layers)
    assert_equal(ours, expected)
    assert order_of_calls(copy.deepcopy(fused), x) == order_of_calls(copy.deepcopy(stock), x)


def test_a_hook_on_what_is_left_out_is_heard():
    block, calls = fastres.fuse(Identical().train()), []
    x = channels_last(torch.randn(4, 32, 11, 12))
    block.nothing.register_forward_hook(lambda *_: calls.append(None))
    assert not is_one(block(x)) and calls == [None]
