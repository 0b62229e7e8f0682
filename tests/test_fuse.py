"""fuse() and unfuse(): same numbers, same model, for every client and every trap."""

import abc
import copy
import inspect
import io
import pickle
import random
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fastres import sites
from fastres.fuse import fuse, is_fused, unfuse

DTYPE = torch.float64


@pytest.fixture
def transformers(torchvision):  # which it imports where it is installed
    return import_module("transformers")


# ---------------------------------------------------------------------------------------------------------
# comparing a model with its fused self


def close(actual, expected, what, scale=0.0):
    """To 1e-10 of the largest value; `scale` is the largest of what is computed together with it."""
    scale = max(scale, expected.abs().max().item())
    torch.testing.assert_close(
        actual, expected, rtol=1e-10, atol=1e-10 * scale, msg=lambda text: f"{what}: {text}"
    )


def logits(output):
    return getattr(output, "logits", output)


def step(model, *inputs):
    """Output, inputs after the call, gradients and buffers of one forward and backward; the seed is set."""
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    # Not leaves, so that a model may write to them.
    arguments = [x * 1 for x in inputs]
    torch.manual_seed(1)
    random.seed(1)
    model.zero_grad()
    output = logits(model(*arguments))
    if output.requires_grad:
        output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients |= {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return output.detach(), [a.detach() for a in arguments], gradients, dict(model.named_buffers())


def same(stock, fused, *inputs, modes=(True, False)):
    """Assert that both compute the same, in train and in eval."""
    for mode in modes:
        stock.train(mode)
        fused.train(mode)
        expected, actual = step(stock, *inputs), step(fused, *inputs)
        close(actual[0], expected[0], f"output, train({mode})")
        for i, (a, e) in enumerate(zip(actual[1], expected[1], strict=True)):
            close(a, e, f"input {i} after the call, train({mode})")
        for kind in (2, 3):
            assert actual[kind].keys() == expected[kind].keys()
            scale = max((g.abs().max().item() for g in expected[2].values() if g is not None), default=0.0)
            for name, value in expected[kind].items():
                if value is None:
                    assert actual[kind][name] is None, name
                else:
                    close(actual[kind][name], value, f"{name}, train({mode})", scale if kind == 2 else 0.0)


def images(channels=3, size=32, batch=2):
    return torch.randn(batch, channels, size, size, dtype=DTYPE)


def ran(model, *inputs):
    """The fused operations that a forward of the model (a copy of it: the statistics stay) runs."""
    model = copy.deepcopy(model)
    with sites.record() as records:
        model(*inputs)
    return [record.ran for record in records if record.fused]


def fused_names(model):
    return [name for name, module in model.named_modules() if is_fused(module)]


# ---------------------------------------------------------------------------------------------------------
# real clients


# 64x64 pixels are 2x2 at the end: with fewer, batch norm there amplifies rounding errors beyond the bound.


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvision_is_fused_and_computes_the_same(torchvision, name):
    stock = getattr(torchvision.models, name)().to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, images(size=64))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in stock.modules())
    assert len(ran(fused, images())) == norms  # each batch norm is in a chain of its own


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet26d", "resnet10t"])
def test_timm_is_fused_and_computes_the_same(timm, name):
    stock = timm.create_model(name).to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, images(size=64))
    assert len(ran(fused, images())) == sum(isinstance(m, nn.BatchNorm2d) for m in stock.modules())


@pytest.mark.parametrize("name", ["seresnet18", "resnetblur18"])
def test_timm_models_that_are_recognised_in_part_compute_the_same(timm, name):
    stock = timm.create_model(name).to(DTYPE)
    same(stock, fuse(stock), images(size=64))


def test_timm_drop_path_keeps_its_random_numbers(timm):
    stock = timm.create_model("resnet18", drop_path_rate=0.5, drop_block_rate=0.1).to(DTYPE)
    same(stock, fuse(stock), images(size=64))


def test_timm_grad_checkpointing_switched_on_after_fuse(timm):
    stock = timm.create_model("resnet18").to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.set_grad_checkpointing(True)
    same(stock, fused, images())


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_transformers_is_fused_and_computes_the_same(transformers, layer_type):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type=layer_type, num_labels=5
    )
    stock = transformers.ResNetForImageClassification(config).to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, images(size=64))
    assert len(ran(fused, images())) == sum(isinstance(m, nn.BatchNorm2d) for m in stock.modules())


# ---------------------------------------------------------------------------------------------------------
# user-style blocks that must be fused


def conv(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class Layers(nn.Module):
    """What most blocks below are made of."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(4, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()


class OneLine(Layers):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))


class Functional(Layers):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


class TorchRelu(Layers):
    def forward(self, x):
        return torch.relu(self.bn1(self.conv1(x)))


class Method(Layers):
    def forward(self, x):
        return self.bn1(self.conv1(x)).relu_()


class InPlaceSum(Layers):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class SumIntoFreshShortcut(Layers):
    """The sum is written into the shortcut's result, which nothing else holds."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        identity = self.bn2(self.conv2(x))
        identity += out
        return F.relu(identity)


class ResidualFirst(Layers):
    def forward(self, x):
        return self.relu(torch.add(x, self.bn1(self.conv1(x))))


class AddMethod(Layers):
    def forward(self, x):
        return self.bn1(self.conv1(x)).add_(x).relu()


class PreActivation(Layers):
    def forward(self, x):
        out = self.conv1(self.relu(self.bn1(x)))
        return self.conv2(self.relu(self.bn2(out))) + x


class SumAlone(Layers):
    def forward(self, x):
        return self.relu(self.conv1(x) + self.conv2(x))


class Chosen(Layers):
    """Looks layers up by name, in helper methods, under a flag."""

    use_shortcut = True

    def __init__(self):
        super().__init__()
        self.activation = F.relu

    def body(self, x, *names):
        for name in names:
            x = getattr(self, f"bn{name}")(getattr(self, f"conv{name}")(x))
        return x

    def forward(self, x):
        out = self.body(x, 1)
        return self.activation(out + x if self.use_shortcut else out)


class SharedNorm(Layers):
    """One batch norm twice: its running statistics depend on the order of the calls."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        identity = self.bn1(self.conv2(x))
        return self.relu(out + identity)


class Shortcut(Layers):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class EmptyShortcut(Shortcut):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential()


class Body(nn.Module):
    """The branch is a container of its own, as in transformers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4))

    def forward(self, x):
        return F.relu(x + self.body(x))


class Abstract(abc.ABC):
    @abc.abstractmethod
    def forward(self, x): ...


class Registered(Layers, Abstract):
    """A class whose base keeps a list of its subclasses."""

    subclasses = 0

    def __init_subclass__(cls):
        Registered.subclasses += 1

    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)))


class Training(Layers):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        if self.training:
            return F.relu(out)
        return F.relu(out + x)


class Scaled(Layers):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("shift", torch.randn(4, 1, 1))

    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x * self.scale + self.shift)) + self.shift)


@pytest.mark.parametrize(
    "block, expected",
    [
        (OneLine, 1),
        (Functional, 1),
        (TorchRelu, 1),
        (Method, 1),
        (InPlaceSum, 2),
        (SumIntoFreshShortcut, 2),
        (ResidualFirst, 1),
        (AddMethod, 1),
        (PreActivation, 2),
        (SumAlone, 1),
        (Chosen, 1),
        (SharedNorm, 2),
        (Shortcut, 3),
        (EmptyShortcut, 2),
        (Body, 2),
        (Registered, 1),
        (Training, 1),
        (Scaled, 0),  # what is added broadcasts, which no kernel takes
    ],
)
def test_block_is_fused_and_computes_the_same(block, expected):
    stock = block().to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, images(4))
    assert len(ran(fused, images(4))) == expected


def test_the_residual_sum_is_part_of_the_chain():
    assert len(ran(fuse(InPlaceSum().to(DTYPE)), images(4))) == 2  # and no add_relu of its own
    assert "add_relu" not in ran(fuse(InPlaceSum().to(DTYPE)), images(4))


@pytest.mark.parametrize("norm, shape", [(nn.BatchNorm1d, (3, 4, 5)), (nn.BatchNorm3d, (2, 4, 3, 3, 3))])
def test_other_batch_norms_are_fused_with_their_relu(norm, shape):
    stock = nn.Sequential(norm(4), nn.ReLU()).to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, torch.randn(shape, dtype=DTYPE))
    assert len(ran(fused, torch.randn(shape, dtype=DTYPE))) == 1


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}]
)
def test_batch_norm_options(options):
    stock = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, **options), nn.ReLU()).to(DTYPE)
    same(stock, fuse(stock), images(4), modes=(True, True, False))


# ---------------------------------------------------------------------------------------------------------
# traps: what a rewrite could get wrong


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


class LeavesInput(Layers):
    """Two names for one module, one of which may later be another."""

    def __init__(self):
        super().__init__()
        self.relu1 = self.relu2 = nn.ReLU()

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)))


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


# ---------------------------------------------------------------------------------------------------------
# modules that change after fuse


@pytest.mark.parametrize("name", ["bn1", "conv2", "bn2", "relu"])
def test_a_layer_is_replaced_after_fuse(name):
    stock = InPlaceSum().to(DTYPE)
    fused = fuse(stock)
    other = {"relu": nn.GELU()}.get(name, nn.Identity())
    for model in (stock, fused):
        setattr(model, name, other)
    same(stock, fused, images(4))


def test_a_shortcut_is_taken_away_after_fuse(torchvision):
    stock = torchvision.models.resnet.BasicBlock(
        4, 4, downsample=nn.Sequential(conv(4, 4), nn.BatchNorm2d(4))
    ).to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.downsample = None
    same(stock, fused, images(4))


def test_a_shortcut_is_added_after_fuse(torchvision):
    stock = torchvision.models.resnet.BasicBlock(4, 4).to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.downsample = nn.Sequential(nn.Tanh())
    same(stock, fused, images(4))


def test_a_container_grows_after_fuse():
    stock = Body().to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.body.append(nn.Tanh())
    same(stock, fused, images(4))


def test_one_of_two_names_of_a_module_is_set_after_fuse():
    stock = LeavesInput().to(DTYPE)
    fused = fuse(stock)
    assert len(ran(fused, images(4))) == 2
    for model in (stock, fused):
        model.relu2 = nn.Tanh()
    same(stock, fused, images(4))


def test_an_identity_is_replaced_after_fuse(timm):
    stock = timm.create_model("resnet18").to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.layer1[0].drop_block = nn.LeakyReLU()
    same(stock, fused, images())


def test_a_forward_on_the_instance_is_respected():
    """As accelerate and others do."""
    stock = Body().to(DTYPE)
    stock.body[1].forward = lambda x: x * 3
    stock.forward = lambda x: stock.body(x) - x
    fused = copy.copy(stock)
    fuse(fused, inplace=True)
    x = images(4)
    close(fused(x), stock(x), "output")


@pytest.mark.parametrize("name", ["body", "body.3", "body.4"])
def test_a_forward_on_the_instance_of_a_fused_layer(name):
    fused = fuse(Body().to(DTYPE))
    fused.get_submodule(name).forward = lambda x: x * 3
    x = images(4)
    stock = unfuse(fused)
    close(fused(x), stock(x), "output")


def test_a_class_gets_another_forward_after_fuse():
    class Patched(Layers):
        def forward(self, x):
            return F.relu(self.bn1(self.conv1(x)))

    stock = Patched().to(DTYPE)
    fused = fuse(stock, inplace=True)
    Patched.forward = lambda self, x: x * 2
    x = images(4)
    close(fused(x), x * 2, "output")


def test_a_helper_method_is_replaced_on_the_instance_after_fuse():
    stock = Chosen().to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.body = lambda x, *names: x * 2
    same(stock, fused, images(4))


# ---------------------------------------------------------------------------------------------------------
# hooks


def hook_calls(model, x, names):
    """The order in which forward hooks on these modules fire, with what they see."""
    seen = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.append((name, output.detach().clone()))
        )
        for name in names
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "names", [["bn2"], ["conv1"], ["shortcut", "bn2"], ["conv2", "shortcut.1", "shortcut.0"]]
)
def test_forward_hooks_fire_in_their_order(names):
    stock = Shortcut().to(DTYPE)
    fused = fuse(stock)
    x = images(4)
    expected = hook_calls(stock, x, names)
    actual = hook_calls(fused, x, names)
    assert [name for name, _ in actual] == [name for name, _ in expected]
    for (name, a), (_, e) in zip(actual, expected, strict=True):
        close(a, e, f"what the hook on {name} sees")


@pytest.mark.parametrize("name", ["layer", "layer.1", "layer.1.activation"])
def test_a_hook_on_an_inlined_container_fires(transformers, name):
    block = transformers.models.resnet.modeling_resnet.ResNetBasicLayer(4, 4).to(DTYPE)
    fused = fuse(block)
    assert [n for n, _ in hook_calls(fused, images(4), [name])] == [name]


def test_a_hook_that_was_there_before_fuse_fires():
    block = Body().to(DTYPE)
    seen = []
    block.body[4].register_forward_hook(lambda *_: seen.append("norm"))
    block.body.register_forward_pre_hook(lambda *_: seen.append("body"))
    fuse(block, inplace=True)
    assert not seen
    block(images(4))
    assert seen == ["body", "norm"]


def test_a_hook_that_changes_its_output():
    stock = InPlaceSum().to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.bn2.register_forward_hook(lambda module, args, output: output * 2)
    same(stock, fused, images(4))


def test_backward_hooks_fire():
    fused = fuse(InPlaceSum().to(DTYPE))
    seen = []
    fused.bn1.register_full_backward_hook(lambda *_: seen.append("bn1"))
    fused(images(4)).sum().backward()
    assert seen == ["bn1"]


def test_a_hook_on_the_block_leaves_it_fused():
    fused = fuse(InPlaceSum().to(DTYPE))
    seen = []
    fused.register_forward_hook(lambda *_: seen.append("block"))
    assert len(ran(fused, images(4))) == 2
    assert seen == ["block"]


@pytest.mark.parametrize("block", [Shortcut, Body])
def test_global_hooks_fire_on_every_layer(block):
    fused = fuse(block().to(DTYPE))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        fused(images(4))
    finally:
        handle.remove()
    layers = (
        ["Conv2d", "BatchNorm2d"] * 3 if block is Shortcut else ["Conv2d", "BatchNorm2d"] * 2 + ["ReLU"]
    )
    assert sorted(seen) == sorted([*layers, "Sequential", block.__name__])


# ---------------------------------------------------------------------------------------------------------
# the model stays what it is


@pytest.fixture
def block():
    return Shortcut().to(DTYPE)


def test_inplace_gives_back_the_same_model(block):
    parameters = list(block.parameters())
    assert fuse(block, inplace=True) is block
    assert all(a is b for a, b in zip(block.parameters(), parameters, strict=True))


def test_out_of_place_leaves_the_model_untouched(block):
    before = copy.deepcopy(block.state_dict())
    fused = fuse(block)
    fused(images(4))
    assert not fused_names(block)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_class_is_still_a_subclass_with_the_same_name(block):
    fused = fuse(block)
    assert is_fused(fused)
    assert isinstance(fused, Shortcut)
    assert type(fused).__name__ == "Shortcut"
    assert type(fused).__module__ == Shortcut.__module__
    assert repr(fused) == repr(block)


def test_a_registry_of_subclasses_sees_no_new_class():
    assert is_fused(fuse(Registered()))
    assert Registered.subclasses == 0


def test_nothing_is_added_to_the_instance(block):
    assert vars(fuse(block)).keys() == vars(block).keys()


def test_state_dict_has_the_same_keys_and_loads_both_ways(torchvision):
    stock = torchvision.models.resnet18().to(DTYPE)
    fused = fuse(torchvision.models.resnet18().to(DTYPE))
    assert list(fused.state_dict()) == list(stock.state_dict())
    fused.load_state_dict(stock.state_dict())
    same(stock, fused, images(), modes=(False,))
    same(stock, fused, images(), modes=(True,))
    other = torchvision.models.resnet18().to(DTYPE)
    other.load_state_dict(fused.state_dict())
    same(other, fused, images(), modes=(False,))


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_optimizer_made_before_or_after_updates_the_model(block, when):
    stock = copy.deepcopy(block)
    if when == "before":
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
    fused = fuse(block, inplace=True)
    if when == "after":
        optimizer = torch.optim.SGD(fused.parameters(), lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(stock.parameters(), lr=0.1, momentum=0.9)
    x = images(4)
    for _ in range(3):
        for model, rule in ((stock, reference), (fused, optimizer)):
            rule.zero_grad()
            model(x).square().mean().backward()
            rule.step()
    for (name, a), e in zip(fused.named_parameters(), stock.parameters(), strict=True):
        close(a, e, name)


def test_frozen_layers_stay_frozen():
    stock = Shortcut().to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        model.train()
        model.bn1.eval()
        model.conv1.requires_grad_(False)
        model.bn2.weight.requires_grad_(False)
    x = images(4)
    expected, actual = step(stock, x), step(fused, x)
    close(actual[0], expected[0], "output")
    assert actual[2]["conv1.weight"] is None
    assert actual[2]["bn2.weight"] is None
    for name in ("bn1.running_mean", "bn1.num_batches_tracked", "bn2.running_var"):
        close(actual[3][name], expected[3][name], name)
    close(actual[2]["input 0"], expected[2]["input 0"], "gradient of the input")


def test_parametrized_layers_compute_the_same():
    class Centred(nn.Module):
        def forward(self, weight):
            return weight - weight.mean((1, 2, 3), keepdim=True)

    stock = InPlaceSum().to(DTYPE)
    fused = fuse(stock)
    for model in (stock, fused):
        parametrize.register_parametrization(model.conv1, "weight", Centred())
    same(stock, fused, images(4))
    same(copy.deepcopy(stock), fuse(stock), images(4))
    for model in (stock, fused):
        parametrize.remove_parametrizations(model.conv1, "weight")
    same(stock, fused, images(4))
    assert len(ran(fused, images(4))) == 2


def test_sync_batch_norm_is_left_as_it_is(torchvision):
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(torchvision.models.resnet18().to(DTYPE))
    fused = fuse(stock)
    assert [type(m) for m in fused.modules() if isinstance(m, nn.SyncBatchNorm)]
    same(stock, fused, images(), modes=(False,))


def test_sync_batch_norm_after_fuse():
    fused = fuse(InPlaceSum().to(DTYPE)).eval()
    stock = unfuse(fused)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    close(fused(images(4) * 0 + 1), stock(images(4) * 0 + 1), "output")


def test_to_moves_and_casts(block):
    fused = fuse(block).to(torch.float32).to(memory_format=torch.channels_last)
    assert fused(images(4).float()).dtype == torch.float32


def test_runs_on_the_meta_device(block):
    assert fuse(block).to("meta")(images(4).to("meta")).shape == (2, 4, 32, 32)


def test_nested_wrappers_are_entered(block):
    stock = nn.DataParallel(nn.Sequential(block))
    fused = fuse(stock)
    assert fused_names(fused) == ["module.0", "module.0.shortcut"]


def test_fuse_twice_is_fuse_once(block):
    once = fuse(block)
    kinds = [type(module) for module in once.modules()]
    fuse(once, inplace=True)
    assert [type(module) for module in once.modules()] == kinds


def test_modules_with_the_same_code_share_a_class(torchvision):
    fused = fuse(torchvision.models.resnet18())
    assert type(fused.layer1[0]) is type(fused.layer4[1])


def test_a_model_that_has_nothing_to_fuse():
    stock = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(DTYPE)
    assert not fused_names(fuse(stock))


def test_scripted_and_traced_modules_are_left_alone():
    scripted = torch.jit.script(nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU()))
    symbolic = torch.fx.symbolic_trace(OneLine())
    stock = nn.Sequential(scripted, symbolic).to(DTYPE)
    assert not fused_names(fuse(stock, inplace=True))


def test_symbolic_trace_of_a_fused_model_gives_the_original_graph(block):
    stock = torch.fx.symbolic_trace(block)
    fused = torch.fx.symbolic_trace(fuse(block))
    assert [n.op for n in fused.graph.nodes] == [n.op for n in stock.graph.nodes]


def test_our_own_models_are_fused_already():
    stock = import_module("fastres.models").resnet18(num_classes=10).to(DTYPE)
    fused = fuse(stock)
    assert ran(fused, images()) == ran(stock, images())
    same(stock, fused, images())


@pytest.mark.parametrize("model", [3, "resnet18", None, nn.ReLU])
@pytest.mark.parametrize("function", [fuse, unfuse])
def test_not_a_module(function, model):
    with pytest.raises(
        TypeError, match=rf"{function.__name__}: model has type \w+, expected torch.nn.Module"
    ):
        function(model)


# ---------------------------------------------------------------------------------------------------------
# copies


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_torch_save])
@pytest.mark.parametrize("make", [Shortcut, Body, Training])
def test_a_copy_is_fused_and_computes_the_same(make, copied):
    fused = fuse(make().to(DTYPE))
    other = copied(fused)
    assert fused_names(other) == fused_names(fused)
    assert [type(m) for m in other.modules()] == [type(m) for m in fused.modules()]
    same(unfuse(fused), other, images(4), modes=(False, True))


def test_a_deep_copy_shares_nothing(block):
    fused = fuse(block)
    other = copy.deepcopy(fused)
    assert not {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in other.parameters()}


def test_a_pickle_names_the_original_class(block):
    assert b"test_fuse" in pickle.dumps(fuse(block))
    assert b"Shortcut" in pickle.dumps(fuse(block))


class Stateful(OneLine):
    def __getstate__(self):
        return {**super().__getstate__(), "trace": "left"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.trace += " and came back"


def test_a_class_with_a_state_of_its_own_keeps_it():
    other = through_pickle(fuse(Stateful()))
    assert is_fused(other)
    assert other.trace == "left and came back"


def test_a_class_that_pickles_itself_is_left_alone():
    class Own(OneLine):
        def __reduce__(self):
            return OneLine, ()

    assert not is_fused(fuse(Own(), inplace=True))


# ---------------------------------------------------------------------------------------------------------
# unfuse


def test_unfuse_gives_back_the_classes_and_keys(torchvision):
    stock = torchvision.models.resnet18().to(DTYPE)
    back = unfuse(fuse(stock))
    assert [type(m) for m in back.modules()] == [type(m) for m in stock.modules()]
    assert list(back.state_dict()) == list(stock.state_dict())
    same(stock, back, images(), modes=(False,))


def test_unfuse_inplace_gives_back_the_same_model(block):
    fused = fuse(block)
    assert unfuse(fused, inplace=True) is fused
    assert type(fused) is Shortcut


def test_unfuse_out_of_place_leaves_the_fused_model_fused(block):
    fused = fuse(block)
    unfuse(fused)
    assert is_fused(fused)


# ---------------------------------------------------------------------------------------------------------
# torch.compile


def test_compile_sees_one_graph(torchvision):
    fused = fuse(torchvision.models.resnet18().to(DTYPE))
    stock = unfuse(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        stock.train(mode)
        fused.train(mode)
        x = images()
        close(compiled(x), stock(x), f"output, train({mode})")
