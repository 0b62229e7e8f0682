"""fuse() on forwards that decide by what a trace only has a stand-in for: they run as they are."""

import pytest
from fusing import DTYPE, images, same
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from user_blocks import Layers

from fastres.fuse import fuse, is_fused


class Block(Layers):
    def body(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class SizeInSet(Block):
    def forward(self, x):
        return self.body(x) * (3 if x.size(2) in {16, 32} else 1)


class SizesInSet(Block):
    def forward(self, x):
        return self.body(x) * (3 if len({x.size(2), x.size(3)}) == 1 else 1)


class SizeAsKey(Block):
    def forward(self, x):
        return self.body(x) * {16: 2.0, 32: 3.0}.get(x.size(2), 1.0)


class SizeAsText(Block):
    def forward(self, x):
        return self.body(x) * (3 if str(x.shape[-1]) == "32" else 1)


class SizeInText(Block):
    def forward(self, x):
        return self.body(x) * (3 if f"side{x.shape[-1]}" in ("side16", "side32") else 1)


class DtypeAsText(Block):
    def forward(self, x):
        return self.body(x) * (3 if str(x.dtype).endswith("float64") else 1)


class Matched(Block):
    def forward(self, x):
        match x.shape:
            case [_, _, _, _]:
                return self.body(x) * 3
            case _:
                return self.body(x)


class Attribute(Block):
    def forward(self, x):
        return self.body(x) * (1 if getattr(x, "skip", None) is None else 3)


class Gradient(Block):
    def forward(self, x):
        return self.body(x) * (1 if x.is_leaf and x.grad is None else 3)


class Nothing(nn.Module):
    def forward(self, x):
        return None


class ChildReturnsNone(Block):
    def __init__(self):
        super().__init__()
        self.maybe = Nothing()

    def forward(self, x):
        residual = self.maybe(x)
        if residual is None:
            residual = x
        return F.relu(self.bn1(self.conv1(x)) + residual)


class ChildReturnsNoneInAnExpression(ChildReturnsNone):
    def forward(self, x):
        residual = x if (made := self.maybe(x)) is None else made
        return F.relu(self.bn1(self.conv1(x)) + residual)


class ChildReturnsNoneAtOnce(ChildReturnsNone):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)) + (x if self.maybe(x) is None else 0))


class SameObject(Block):
    def __init__(self):
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, x):
        values = [x]
        return self.body(x) * (3 if self.identity(x) is values[0] else 1)


FROZEN = [
    SizeInSet,
    SizesInSet,
    SizeAsKey,
    SizeAsText,
    SizeInText,
    DtypeAsText,
    Matched,
    Attribute,
    Gradient,
    ChildReturnsNone,
    ChildReturnsNoneInAnExpression,
    ChildReturnsNoneAtOnce,
    SameObject,
]


@pytest.mark.parametrize("make", FROZEN)
def test_a_decision_that_a_trace_cannot_see(make):
    stock = make().to(DTYPE)
    fused = fuse(stock)
    assert not is_fused(fused)
    same(stock, fused, images(4))


class NoneOfItsOwn(Block):
    """What is compared with None is known when it is traced."""

    def __init__(self):
        super().__init__()
        self.downsample = None

    def forward(self, x, scale=None):
        identity = x
        if self.downsample is not None:
            identity = self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)) + identity)
        return out if scale is None else out * scale


def test_comparisons_with_none_that_are_no_results():
    stock = NoneOfItsOwn().to(DTYPE)
    fused = fuse(stock)
    assert is_fused(fused)
    same(stock, fused, images(4))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_is_checkpointed_stays_so(reentrant):
    class Checkpointed(Block):
        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=reentrant)

    stock = Checkpointed().to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, images(4))
    counts = [model.bn1.num_batches_tracked.item() for model in (stock, fused)]
    assert counts[0] == counts[1] == 2  # the forward runs again in the backward


class SuperOfClass(Block):
    def forward(self, x):
        return self.body(x)

    def train(self, mode=True):
        return super(self.__class__, self).train(mode)


class SuperOfType(Block):
    def forward(self, x):
        return self.body(x)

    def half(self):
        return super(type(self), self).half()


@pytest.mark.parametrize("make", [SuperOfClass, SuperOfType])
def test_super_of_an_instances_class(make):
    """It would call itself without end in a subclass."""
    stock = make().to(DTYPE)
    fused = fuse(stock)
    assert not is_fused(fused)
    same(stock, fused, images(4))
    fused.half()


def test_an_attribute_of_a_tensor_that_others_have():
    class Size(Block):
        def forward(self, x):
            return self.body(x).view(x.shape[0], -1).to(x.dtype)

    stock = Size().to(DTYPE)
    fused = fuse(stock)
    assert is_fused(fused)
    same(stock, fused, images(4))
