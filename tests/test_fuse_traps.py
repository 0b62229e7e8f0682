"""fuse() on forwards that a careless trace would get wrong: the same numbers, fused or not."""

import copy
import gc
import inspect
import random

import pytest
import torch
from fusing import DTYPE, close, images, ran, same
from torch import nn
from torch.nn import functional as F
from user_blocks import Chosen, Layers, OneLine, Training

from fastres.fuse import fuse, is_fused


class WritesToArgument(Layers):
    """The caller sees the sum in its tensor."""

    def forward(self, x):
        x += self.bn1(self.conv1(x * 1))
        return self.relu(x) + x


class WritesToArgumentByMethod(Layers):
    def forward(self, x):
        return x.mul(2).add(x.add_(self.bn1(self.conv1(x * 1)))).relu_()


class NormUsedTwice(Layers):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return F.relu(out) + out


class InPlaceReluUsedTwice(Layers):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        F.relu_(out)
        return out * 2


class SumSeenThroughView(Layers):
    def forward(self, x):
        out = self.bn1(self.conv1(x * 1))
        view = out.flatten(1)
        out = out + x
        return F.relu(out).flatten(1) + view


class ConvUsedTwice(Layers):
    def forward(self, x):
        out = self.conv1(x)
        return F.relu(self.bn1(out)) + out


class Doubled(Layers):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return F.relu(out + out)


class Alpha(Layers):
    def forward(self, x):
        return F.relu(torch.add(self.bn1(self.conv1(x)), x, alpha=2))


class SharedNormAcrossShortcut(Layers):
    """The shortcut updates the same running statistics, between this chain's first and last call."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(self.conv2, self.bn1)

    def forward(self, x):
        out = self.bn1(self.conv1(x * 1))
        out = out + torch.sigmoid(self.shortcut(x))
        return F.relu(out)


class Clips(nn.Module):
    def forward(self, x):
        return x.clamp_(-0.5, 0.5) * 2


class WritesBetween(Layers):
    """Called after the convolution read x, and before the sum."""

    def __init__(self):
        super().__init__()
        self.shortcut = Clips()

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return F.relu(out + self.shortcut(x))


class WritesBetweenInTheOpen(Layers):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        x *= 2
        return F.relu(out + x)


class WritesResidualAfterSum(Layers):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        identity = x * 2
        out = out + identity
        identity *= 3
        return F.relu(out) + identity


class Depth(Layers):
    """Stochastic depth by Python's random numbers."""

    def forward(self, x):
        if random.random() < 0.5:
            return x * 1
        return F.relu(self.bn1(self.conv1(x)))


class TorchDepth(Layers):
    def forward(self, x):
        if torch.rand(1).item() < 0.5:
            return x * 1
        return F.relu(self.bn1(self.conv1(x)))


class NormalDepth(Layers):
    """`torch.normal` takes tensors, and here it gets none."""

    def forward(self, x):
        if torch.normal(0.0, 1.0, (1,)).item() < 0:
            return x * 1
        return F.relu(self.bn1(self.conv1(x)))


class Counts(Layers):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.relu(self.bn1(self.conv1(x))) * self.calls


class NoGrad(Layers):
    def forward(self, x):
        with torch.no_grad():
            out = self.bn1(self.conv1(x))
        return F.relu(out + x)


class NoGradMethod(Layers):
    @torch.no_grad()
    def features(self, x):
        return self.bn1(self.conv1(x))

    def forward(self, x):
        return F.relu(self.features(x) + x)


class AsksGradMode(Layers):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return out if torch.is_grad_enabled() else -out


SIGN = 1.0


class ReadsGlobal(Layers):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x))) * SIGN


class Shapes(Layers):
    def forward(self, x):
        if x.shape[1] != 4:
            raise ValueError("four channels, please")
        return F.relu(self.bn1(self.conv1(x)))


class AsksType(Layers):
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = x * 2
        return F.relu(self.bn1(self.conv1(x)))


class Catches(Layers):
    def forward(self, x):
        try:
            return F.relu(self.bn1(self.conv1(x)))
        except RuntimeError:
            return x


class Variadic(Layers):
    def forward(self, *inputs, **options):
        return F.relu(self.bn1(self.conv1(inputs[0])))


class Keeps(Layers):
    """A list that grows: a change that no guard sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return F.relu(self.bn1(self.conv1(x))) * len(self.seen)


@pytest.mark.parametrize(
    "block",
    [
        WritesToArgument,
        WritesToArgumentByMethod,
        NormUsedTwice,
        InPlaceReluUsedTwice,
        SumSeenThroughView,
        ConvUsedTwice,
        Doubled,
        Alpha,
        SharedNormAcrossShortcut,
        WritesResidualAfterSum,
        Depth,
        TorchDepth,
        NormalDepth,
        Counts,
        NoGrad,
        NoGradMethod,
        ReadsGlobal,
        Shapes,
        AsksType,
        Catches,
        Variadic,
        Keeps,
    ],
)
def test_trap(block):
    stock = block().to(DTYPE)
    same(stock, fuse(stock), images(4), modes=(True, True, False))


@pytest.mark.parametrize("block", [WritesBetween, WritesBetweenInTheOpen, AsksGradMode])
def test_trap_without_gradients(block):
    """Here autograd does not complain about what was written to."""
    stock = block().to(DTYPE)
    fused = fuse(stock)
    x = images(4)
    with torch.no_grad():
        close(fused(x.clone()), stock(x.clone()), "output")


@pytest.mark.parametrize("block", [Depth, TorchDepth, NormalDepth])
def test_random_choices_go_on_after_fuse(block):
    stock = block().to(DTYPE)
    fused = fuse(stock)
    x = images(4)
    outputs = []
    for model in (stock, fused):
        random.seed(3)
        torch.manual_seed(3)
        outputs.append([model(x) for _ in range(8)])
    for expected, actual in zip(*outputs, strict=True):
        close(actual, expected, "output")


def test_autocast_inside_a_forward_stays_inside():
    class Mixed(Layers):
        @torch.autocast("cpu", torch.bfloat16)
        def features(self, x):
            return self.bn1(self.conv1(x))

        def forward(self, x):
            return F.relu(self.features(x))

    stock = Mixed()
    fused = fuse(copy.deepcopy(stock), inplace=True)
    x = images(4).float()
    assert stock(x).dtype == torch.bfloat16
    assert torch.equal(fused(x), stock(x))


def test_fuse_draws_no_random_numbers():
    model = nn.Sequential(Depth(), TorchDepth(), NormalDepth())
    before = torch.get_rng_state(), random.getstate()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_fuse_leaves_a_forward_that_raises_alone():
    class Raises(Layers):
        def forward(self, x):
            raise RuntimeError("no")

    block = Raises()
    before = dict(vars(block))
    assert fuse(block, inplace=True) is block
    assert vars(block) == before
    assert type(block) is Raises


@pytest.mark.parametrize("change", ["use_shortcut", "activation"])
def test_an_attribute_that_forward_reads_changes_after_fuse(change):
    stock = Chosen().to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        setattr(model, change, {"use_shortcut": False, "activation": torch.tanh}[change])
    same(stock, fused, images(4))


def test_what_the_garbage_collector_calls_is_no_part_of_forward():
    """Anybody's finalizers, or this callback, which keeps a state as forward must not."""
    seen = []

    def collected(phase, info):
        seen.append(phase)
        collected.last = phase

    thresholds = gc.get_threshold()
    gc.callbacks.append(collected)
    try:
        gc.set_threshold(1)
        fused = fuse(OneLine())
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collected)
    assert seen and is_fused(fused) and gc.isenabled()


class Strided(Layers):
    def forward(self, x):
        return F.relu(self.bn1(F.conv2d(x, self.conv1.weight, stride=self.conv1.stride, padding=1)))


def test_an_attribute_of_a_child_changes_after_fuse():
    stock = Strided().to(DTYPE)
    fused = fuse(stock)
    assert len(ran(fused, images(4))) == 1
    for model in (stock, fused):
        model.conv1.stride = (2, 2)
    same(stock, fused, images(4))


class Options(Layers):
    def forward(self, x, scale=1, *, residual=None):
        out = self.bn1(self.conv1(x)) * scale
        return F.relu(out if residual is None else out + residual)


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((), {}),
        ((1,), {}),
        ((3,), {}),
        ((torch.ones(4, 1, 1, dtype=DTYPE) * 2,), {}),
        ((), {"residual": 1.0}),
    ],
)
def test_arguments_with_defaults(arguments, options):
    stock = Options().to(DTYPE)
    fused = fuse(stock)
    x = images(4)
    close(fused(x, *arguments, **options), stock(x, *arguments, **options), "output")


def test_signature_is_the_original_one():
    assert inspect.signature(fuse(Training()).forward) == inspect.signature(Training().forward)


class Either(Layers):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x[0])))


def test_an_argument_that_is_no_tensor():
    stock = Either().to(DTYPE)
    fused = fuse(stock)
    x = images(4)
    close(fused([x]), stock([x]), "output")


class WritesSumInto(Layers):
    """`out += identity` keeps the dtype of `out`, `out + identity` does not."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, x, identity):
        out = self.bn1(self.conv1(x))
        identity = identity * 1
        if self.target == "out":
            out += identity
        elif self.target == "identity":
            identity += out
            out = identity
        else:
            out = out + identity
        return F.relu(out)


class WritesSumOfConvolutions(Layers):
    def forward(self, x, identity):
        out = self.conv1(x)
        out += identity
        return F.relu(out)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "make", [*(lambda t=t: WritesSumInto(t) for t in ("out", "identity", "")), WritesSumOfConvolutions]
)
def test_a_sum_in_place_keeps_the_dtype_that_it_is_written_to(make, other):
    stock = make()
    fused = fuse(stock)
    assert is_fused(fused)
    x, identity = images(4).float(), images(4).to(other)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = stock(x, identity), fused(x, identity)
    assert actual.dtype == expected.dtype
    # Stock rounds between batch norm and sum, a fused op need not: one unit in the last place of bfloat16.
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=2**-7)
