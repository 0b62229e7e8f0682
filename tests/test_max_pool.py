"""Batch norm, ReLU and the maximum over windows as one: values, gradients, and when it runs."""

import contextlib
import copy
import itertools

import pytest
import torch
from convolving import poisoned
from layers import assert_accurate, channels_last, without_memory
from saving import kept
from torch import library, nn
from torch.nn import functional as F

import fastres
from fastres import kernels, recording, sites
from fastres.max_pool import MaxPool, bn_relu_max_pool, covers

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# kernel, stride, padding, ceil_mode
POOLS = [
    ((3, 3), (2, 2), (1, 1), False),  # ResNet's
    ((2, 2), (2, 2), (0, 0), True),
    ((3, 2), (1, 3), (1, 0), False),
    ((5, 4), (2, 1), (2, 2), True),
    ((1, 1), (1, 1), (0, 0), False),
    ((2, 3), (3, 4), (1, 1), True),  # a stride that skips pixels
]
SHAPES = [(2, 64, 9, 12), (3, 5, 7, 5), (1, 130, 5, 6), (5, 19, 6, 5)]
CASES = [(shape, pool) for shape, pool in itertools.product(SHAPES, POOLS) if shape[2] >= pool[0][0]]


def reference(pool, input, mean, var, weight, bias, training):
    values = F.relu(F.batch_norm(input, mean, var, weight, bias, training, 0.3, 1e-3))
    return F.max_pool2d(values, *pool[:3], 1, pool[3])


def at(pool):
    return lambda *arguments: reference(pool, *arguments)


def case(shape, dtype, training):
    """Input, statistics and factors; and a gradient of the output by its shape."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    channels = shape[1]
    input = channels_last((torch.randn(shape) * 2 + 0.5).to(dtype))
    vectors = (
        torch.randn(channels),
        torch.rand(channels) + 0.5,
        torch.randn(channels),
        torch.randn(channels),
    )
    return input, *(vector.to(real) for vector in vectors), training


def run(function, input, mean, var, weight, bias, training, *, double=False):
    """Output, gradients, and statistics afterwards."""
    leaves = [t.double() if double else t.clone() for t in (input, weight, bias)]
    for leaf in leaves:
        leaf.requires_grad_()
    statistics = [t.double() if double else t.clone() for t in (mean, var)]
    output = function(leaves[0], *statistics, *leaves[1:], training)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to(input.dtype).to(output.dtype).to(output.device)
    return [output, *torch.autograd.grad(output, leaves, grad), *statistics]


def fused(pool):
    def function(input, mean, var, weight, bias, training):
        pool_ = MaxPool(*pool)
        assert covers(pool_, input)
        return bn_relu_max_pool(pool_, input, mean, var, weight, bias, training, 0.3, 1e-3)

    return function


NAMES = (
    "output",
    "gradient of the input",
    "of the weight",
    "of the bias",
    "running mean",
    "running variance",
)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_stock(dtype, training, any_isa, one_thread):
    """Over all cases together: low precisions have ties, whose gradients go either way."""
    results = [[] for _ in NAMES]
    for shape, pool in CASES:
        arguments = case(shape, dtype, training)
        with poisoned():
            ours = run(fused(pool), *arguments)
        assert ours[0].is_contiguous(memory_format=torch.channels_last)
        stock = run(at(pool), *arguments)
        exact = run(at(pool), *arguments, double=True)
        for found, triple in zip(results, zip(ours, stock, exact, strict=True), strict=True):
            found.append([t.detach().flatten() for t in triple])
    for name, triples in zip(NAMES, results, strict=True):
        ours, stock, exact = (torch.cat(tensors) for tensors in zip(*triples, strict=True))
        if dtype == torch.float64:
            torch.testing.assert_close(ours, exact)
        else:
            assert_accurate(name, ours, stock, exact)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_each_device(dtype, training, device):
    results = [[] for _ in NAMES]
    for shape, pool in CASES:
        arguments = case(shape, dtype, training)
        on_device = [t.to(device) for t in arguments[:-1]]
        runs = run(fused(pool), *on_device, training), run(at(pool), *on_device, training)
        exact = run(at(pool), *on_device, training, double=True)
        for found, triple in zip(results, zip(*runs, exact, strict=True), strict=True):
            found.append([t.detach().flatten() for t in triple])
    for name, triples in zip(NAMES, results, strict=True):
        assert_accurate(name, *(torch.cat(tensors) for tensors in zip(*triples, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_indices_are_those_of_pytorch(dtype, any_isa, one_thread):
    """Of integers, which tie, with infinities and NaN among them; normalised by 0 and 1."""
    for shape, pool in CASES:
        input = channels_last(torch.randint(-2, 3, shape).to(dtype))
        values = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
        input.flatten()[::7] = values[torch.randint(3, input.flatten()[::7].shape)]
        mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
        mean, var = (t.to(kernels.accumulation_dtype(dtype)) for t in (mean, var))
        size = MaxPool(*pool).output_size(input.shape[2:])
        output, index, *_ = torch.ops.fastres.bn_relu_max_pool_forward(
            input, mean, var, None, None, False, 0.0, 0.0, size, *pool[:3]
        )
        expected, pixels = F.max_pool2d(F.relu(input), *pool[:3], 1, pool[3], return_indices=True)
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
        (kernel_w,), stride, padding = pool[0][1:], pool[1], pool[2]
        tap = index.view(shape[0], *size, shape[1]).permute(0, 3, 1, 2).long()
        rows = torch.arange(size[0])[:, None] * stride[0] - padding[0] + tap // kernel_w
        columns = torch.arange(size[1]) * stride[1] - padding[1] + tap % kernel_w
        assert torch.equal(rows * shape[3] + columns, pixels)


def test_threads_only_share_out(any_isa, one_thread):
    """The output, and in evaluation the gradient, are the same to the bit for one and for two threads."""
    for dtype in DTYPES:
        arguments = case((4, 64, 65, 33), dtype, False)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(fused(POOLS[0]), *arguments)[:2])
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("pool", POOLS[:3], ids=str)
def test_derivatives(pool, training):
    input, mean, var, weight, bias, _ = case((2, 3, 6, 5), torch.float64, training)
    leaves = [t.clone().requires_grad_() for t in (input, weight, bias)]

    def function(input, weight, bias):
        return fused(pool)(input, mean.clone(), var.clone(), weight, bias, training)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_any_subset_of_gradients(wanted):
    input, mean, var, weight, bias, _ = case((2, 3, 6, 5), torch.float32, True)
    results = []
    for function in (fused(POOLS[0]), at(POOLS[0])):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((input, weight, bias), wanted, strict=True)]
        output = function(leaves[0], mean.clone(), var.clone(), *leaves[1:], True)
        output.square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for ours, theirs, want in zip(*results, wanted, strict=True):
        assert (ours is not None) == (theirs is not None) == want
        if want:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_opcheck(training):
    input, mean, var, weight, bias, _ = case((2, 5, 6, 7), torch.float32, training)
    pool = MaxPool(*POOLS[0])
    forward, backward = (
        getattr(torch.ops.fastres, f"bn_relu_max_pool_{way}") for way in ("forward", "backward")
    )
    size = pool.output_size(input.shape[2:])
    arguments = (input, mean, var, weight, bias, training, 0.1, 1e-5, size, *pool[:3])
    library.opcheck(forward.default, arguments)
    output, index, save_mean, save_rstd = forward(*arguments)
    grad = torch.randn_like(output)
    arguments = (grad, input, index, weight, bias, save_mean, save_rstd, training, *pool[:3])
    library.opcheck(backward.default, arguments)


X = channels_last(torch.randn(2, 4, 6, 6))
STATISTICS = torch.zeros(4), torch.ones(4)


def _forward(input=X, statistics=STATISTICS, size=(3, 3), kernel=(3, 3), stride=(2, 2), padding=(1, 1)):
    return torch.ops.fastres.bn_relu_max_pool_forward(
        input, *statistics, None, None, True, 0.5, 1e-5, size, kernel, stride, padding
    )


def _backward(grad=None, index=None, save=torch.float64):
    output, own, mean, rstd = _forward()
    return torch.ops.fastres.bn_relu_max_pool_backward(
        output if grad is None else grad(output), X, own if index is None else index(own), None, None,
        mean.to(save), rstd, True, (3, 3), (2, 2), (1, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    "call, change, message",
    [
        (_forward, dict(input=X.contiguous()), "not a 4-d channels-last tensor"),
        (_forward, dict(input=X[0]), "not a 4-d channels-last tensor"),
        (_forward, dict(size=(3,)), "output_size takes two integers of at least 1"),
        (_forward, dict(size=(3, 5)), "output_size has windows outside of the image"),
        (_forward, dict(kernel=(17, 17)), "kernel_size has more than 256 pixels"),
        (_forward, dict(stride=(0, 1)), "stride takes two integers of at least 1"),
        (_forward, dict(padding=(2, 1)), "padding is more than half of the kernel"),
        (_forward, dict(statistics=(torch.zeros(3), None)), "running_mean"),
        (_backward, dict(grad=lambda g: g.contiguous()), "grad is not a channels-last tensor"),
        (_backward, dict(grad=lambda g: g.double()), "grad is not a channels-last tensor"),
        (_backward, dict(index=lambda i: i[:-1]), "index is not what bn_relu_max_pool_forward gave"),
        (_backward, dict(index=lambda i: i.long()), "index is not what bn_relu_max_pool_forward gave"),
        (_backward, dict(grad=lambda g: without_memory(g.clone())), "grad has no memory"),
        (_backward, dict(index=lambda i: without_memory(i.clone())), "index has no memory"),
        (_backward, dict(save=torch.float32), "save_mean is float32, expected float64"),
    ],
)
def test_what_the_kernels_refuse(call, change, message):
    with pytest.raises(RuntimeError, match=f"fastres::bn_relu_max_pool{call.__name__}: .*{message}"):
        call(**change)
    if "statistics" not in change and call is _forward:
        assert torch.equal(STATISTICS[0], torch.zeros(4))  # nothing was written before all checks


# ---------------------------------------------------------------------------------------------------------
# as a part of a site


class Stem(nn.Module):
    def __init__(self, pool=None, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1) if pool is None else pool

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


def step(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    output = output[0] if isinstance(output, tuple) else output
    output.square().sum().backward()
    return [output, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def images(dtype=torch.float64, memory_format=torch.channels_last):
    return torch.randn(2, 3, 17, 19).to(dtype).contiguous(memory_format=memory_format)


POOL_MODULES = {
    "3x3": (nn.MaxPool2d(3, 2, 1), True),
    "2x2": (nn.MaxPool2d(2), True),
    "oblong, ceil": (nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0), ceil_mode=True), True),
    "dilated": (nn.MaxPool2d(2, dilation=2), False),
    "indices": (nn.MaxPool2d(2, return_indices=True), False),
    "large": (nn.MaxPool2d(3, 1, 1), True),
    "average": (nn.AvgPool2d(2), False),
}


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("name", POOL_MODULES)
def test_a_fused_stem_equals_stock(name, mode):
    pool, fits = POOL_MODULES[name]
    stock = Stem(copy.deepcopy(pool)).double().to(memory_format=torch.channels_last)
    if mode == "frozen":
        stock.bn.requires_grad_(False)
    stock.train(mode == "train")
    model = fastres.fuse(stock)
    x = images()
    with recording.record() as records:
        ours = step(model, x)
    assert [record.ran for record in records] == ["conv_bn_relu_max_pool" if fits else "conv_bn_relu"]
    assert records[0].fused
    for a, b in zip(ours, step(stock, x), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("change", [{}, {"groups": 2}, {"bias": True}], ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_evaluation_without_gradients(relu, change, memory_format):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1, **change)
            self.bn, self.pool = nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return self.pool(F.relu(y) if relu else y)

    stock = Block().eval().to(memory_format=memory_format)
    x = torch.randn(2, 64, 17, 19).contiguous(memory_format=memory_format)
    with torch.no_grad():
        for model in (fastres.fuse(stock), fastres.optimize_for_inference(stock)):
            torch.testing.assert_close(model(x), stock(x))


APART = {
    "contiguous": (lambda model: None, dict(memory_format=torch.contiguous_format)),
    "a hook on the pool": (lambda model: model.pool.register_forward_hook(lambda *_: None), {}),
    "a subclass": (lambda model: setattr(model, "pool", type("Pool", (nn.MaxPool2d,), {})(3, 2, 1)), {}),
}


@pytest.mark.parametrize("name", APART)
def test_a_pool_that_runs_by_itself(name):
    spoil, how = APART[name]
    stock = Stem().double()
    if not how:
        stock.to(memory_format=torch.channels_last)
    spoil(stock)
    x = images(**how)
    model = fastres.fuse(stock)
    with recording.record() as records:
        ours = step(model, x)
    assert [record.ran for record in records] == ["conv_bn_relu"]
    for a, b in zip(ours, step(stock, x), strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_fire_in_the_order_of_stock():
    for names in (["pool"], ["relu"], ["bn", "pool"]):
        calls = []
        for model in (Stem(), fastres.fuse(Stem())):
            calls.append([])
            for name in names:
                getattr(model, name).register_forward_hook(
                    lambda *_, name=name, own=calls[-1]: own.append(name)
                )
            model(images(torch.float32))
        assert calls[0] == calls[1] == names


def test_another_use_of_the_activation_keeps_it():
    class Twice(Stem):
        def forward(self, x):
            y = self.relu(self.bn(self.conv(x)))
            return self.pool(y).sum() + y.sum()

    stock = Twice().double().to(memory_format=torch.channels_last)
    with recording.record() as records:
        ours = step(fastres.fuse(stock), images())
    assert [record.ran for record in records] == ["conv_bn_relu"]
    torch.manual_seed(1234)
    stock = Twice().double().to(memory_format=torch.channels_last)
    for a, b in zip(ours, step(stock, images()), strict=True):
        torch.testing.assert_close(a, b)


def test_what_a_stem_keeps():
    """The convolution's output and a byte for each result, instead of an activation and eight."""
    sizes = []
    for model, context in ((fastres.fuse(Stem()), contextlib.nullcontext()), (Stem(), sites.stock())):
        with context, kept() as bytes:
            output = model(channels_last(torch.randn(4, 3, 64, 64)))
        sizes.append(bytes())
        numel = output.numel()
    activation = 4 * 4 * numel
    inputs_and_vectors = sizes[1] - 2 * activation - 8 * numel  # and the output of the relu, in place
    assert sizes[0] <= activation + numel + inputs_and_vectors + 1024


def test_autocast():
    model = fastres.fuse(Stem(channels=32)).to(memory_format=torch.channels_last)
    x = images(torch.float32)
    with recording.record() as records, torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16 and records[0].ran == "conv_bn_relu_max_pool"
    output.float().sum().backward()
    assert model.conv.weight.grad.dtype == torch.float32
