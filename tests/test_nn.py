"""Modules: values, gradients, statistics and state_dict of the torch.nn and torchvision modules."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from steps import BN_ARGUMENTS, CONV_ARGUMENTS, DTYPE, MODES, assert_same, filled, randn, run, set_mode
from torch import nn
from torch.nn import functional as F

from fastres import recording
from fastres.nn import BasicBlock, BnAddReLU2d, BnReLU2d, Bottleneck, ConvBn2d, ConvBnReLU2d, PlainBlock


def twins(stock, fused, mode="train"):
    """Both with the same state and in the same mode; their state_dicts have to be laid out alike."""
    filled(stock)
    assert [(k, v.shape) for k, v in stock.state_dict().items()] == [
        (k, v.shape) for k, v in fused.state_dict().items()
    ]
    fused.load_state_dict(stock.state_dict())
    return set_mode(stock, mode), set_mode(fused, mode)


def shortcut(inplanes, planes, stride, norm_layer=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(inplanes, planes, 1, stride, bias=False, dtype=DTYPE), norm_layer(planes).to(DTYPE)
    )


BLOCKS = {
    "BasicBlock": ("BasicBlock", 6, 6, {}),
    "BasicBlock of stride 2": ("BasicBlock", 4, 6, {"stride": 2}),
    "Bottleneck": ("Bottleneck", 16, 4, {}),
    "Bottleneck of stride 2": ("Bottleneck", 6, 4, {"stride": 2}),
    "Bottleneck, grouped, dilated": ("Bottleneck", 16, 4, {"groups": 2, "base_width": 32, "dilation": 2}),
}


def blocks(torchvision, name, norm_layer=None):
    """torchvision's block and ours; a downsample where the shapes ask for it."""
    kind, inplanes, planes, arguments = BLOCKS[name]
    kinds = (
        getattr(torchvision.models.resnet, kind),
        {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[kind],
    )
    outplanes, stride = planes * kinds[1].expansion, arguments.get("stride", 1)
    made = []
    for kind in kinds:
        downsample = None
        if stride != 1 or inplanes != outplanes:
            downsample = shortcut(inplanes, outplanes, stride, norm_layer or nn.BatchNorm2d)
        made.append(
            kind(inplanes, planes, downsample=downsample, norm_layer=norm_layer, **arguments).to(DTYPE)
        )
    return *made, randn(3, inplanes, 6, 7)


# ---------------------------------------------------------------------------------------------------------
# BnReLU2d, BnAddReLU2d


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bn", BN_ARGUMENTS)
def test_bn_relu(bn, mode):
    arguments = BN_ARGUMENTS[bn]
    stock, fused = twins(
        nn.BatchNorm2d(6, **arguments, dtype=DTYPE), BnReLU2d(6, **arguments, dtype=DTYPE), mode
    )
    x = randn(3, 6, 5, 7)
    assert_same(run(fused, fused, x), run(stock, lambda x: F.relu(stock(x)), x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bn", BN_ARGUMENTS)
def test_bn_add_relu(bn, mode):
    arguments = BN_ARGUMENTS[bn]
    stock, fused = twins(
        nn.BatchNorm2d(6, **arguments, dtype=DTYPE), BnAddReLU2d(6, **arguments, dtype=DTYPE), mode
    )
    inputs = randn(3, 6, 5, 7), randn(3, 6, 5, 7)
    assert_same(run(fused, fused, *inputs), run(stock, lambda x, r: F.relu(stock(x) + r), *inputs))


@pytest.mark.parametrize("kind", [BnReLU2d, BnAddReLU2d])
def test_a_batch_norms_own_hooks_fire(kind):
    module, x = filled(kind(6, dtype=DTYPE)), randn(2, 6, 3, 3)
    arguments = (x,) if kind is BnReLU2d else (x, x)
    expected = module(*arguments) + 1
    module.train()
    module.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(module(*arguments), expected)


@pytest.mark.parametrize("kind", [BnReLU2d, BnAddReLU2d])
def test_a_batch_norm_takes_four_dimensions(kind):
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        kind(6)(*((x,) if kind is BnReLU2d else (x, x)))


# ---------------------------------------------------------------------------------------------------------
# ConvBn2d, ConvBnReLU2d


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bn", BN_ARGUMENTS)
@pytest.mark.parametrize("kind", [ConvBn2d, ConvBnReLU2d])
def test_conv_bn_with_every_kind_of_batch_norm(kind, bn, mode):
    conv = CONV_ARGUMENTS["groups"]
    stock, fused = twins(
        nn.Sequential(nn.Conv2d(4, 6, **conv), nn.BatchNorm2d(6, **BN_ARGUMENTS[bn])).to(DTYPE),
        kind(4, 6, **conv, **BN_ARGUMENTS[bn], dtype=DTYPE),
        mode,
    )
    if kind is ConvBnReLU2d:
        stock.append(nn.ReLU())
    x = randn(3, 4, 6, 9)
    assert_same(run(fused, fused, x), run(stock, stock, x))


@pytest.mark.parametrize("conv", [*CONV_ARGUMENTS, "reflect"])
@pytest.mark.parametrize("kind", [ConvBn2d, ConvBnReLU2d])
def test_conv_bn_with_every_kind_of_convolution(kind, conv):
    arguments = CONV_ARGUMENTS.get(conv, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"})
    stock, fused = twins(
        nn.Sequential(nn.Conv2d(4, 6, **arguments), nn.BatchNorm2d(6)).to(DTYPE),
        kind(4, 6, **arguments, dtype=DTYPE),
    )
    if kind is ConvBnReLU2d:
        stock.append(nn.ReLU())
    x = randn(2, 4, 6, 9)
    assert_same(run(fused, fused, x), run(stock, stock, x))


def test_conv_bn_draws_the_weights_that_conv2d_draws():
    torch.manual_seed(3)
    conv = nn.Conv2d(4, 6, 3)
    torch.manual_seed(3)
    assert torch.equal(ConvBnReLU2d(4, 6, 3)[0].weight, conv.weight)


def test_conv_bn_defaults_are_torch_nns():
    conv, bn = ConvBn2d(4, 6, 3)
    assert repr(conv) == repr(nn.Conv2d(4, 6, 3)) and repr(bn) == repr(nn.BatchNorm2d(6))
    assert all(
        p.is_meta and p.dtype == DTYPE for p in ConvBn2d(4, 6, 3, device="meta", dtype=DTYPE).parameters()
    )


def test_a_slice_of_conv_bn_is_a_sequential():
    module = ConvBn2d(4, 6, 3)
    assert type(module[:1]) is nn.Sequential and module[:1][0] is module[0]
    assert module[-1] is module[1]


@pytest.mark.parametrize("kind", [ConvBn2d, ConvBnReLU2d])
def test_conv_bn_of_other_modules_runs_them(kind):
    conv, norm = nn.Conv2d(4, 6, 3, dtype=DTYPE), nn.GroupNorm(2, 6, dtype=DTYPE)
    module, x = kind.of(conv, norm), randn(2, 4, 5, 5)
    assert module[0] is conv and module[1] is norm
    expected = norm(conv(x))
    torch.testing.assert_close(
        module(x), F.relu(expected) if kind is ConvBnReLU2d else expected, rtol=0, atol=0
    )


# ---------------------------------------------------------------------------------------------------------
# blocks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_torchvisions(torchvision, name, mode):
    stock, fused, x = blocks(torchvision, name)
    twins(stock, fused, mode)
    with recording.record() as records:
        actual = run(fused, fused, x)
    assert all(r.fused for r in records) and records[-1].ran == "conv_bn_add_relu"
    assert_same(actual, run(stock, stock, x))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("bn", BN_ARGUMENTS)
@pytest.mark.parametrize("name", ["BasicBlock of stride 2", "Bottleneck of stride 2"])
def test_block_with_every_kind_of_batch_norm(torchvision, name, bn, mode):
    stock, fused, x = blocks(torchvision, name, partial(nn.BatchNorm2d, **BN_ARGUMENTS[bn]))
    twins(stock, fused, mode)
    assert_same(run(fused, fused, x), run(stock, stock, x))


@pytest.mark.parametrize(
    "norm_layer",
    [partial(nn.GroupNorm, 2), nn.Identity, partial(nn.InstanceNorm2d, affine=True)],
    ids=["GroupNorm", "Identity", "InstanceNorm2d"],
)
@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck of stride 2"])
def test_block_with_another_norm_runs_it(torchvision, name, norm_layer):
    stock, fused, x = blocks(torchvision, name, norm_layer)
    twins(stock, fused)
    assert_same(run(fused, fused, x), run(stock, stock, x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_plain_block_is_a_basic_block_without_shortcut(training):
    block = filled(PlainBlock(4, 6, stride=2).to(DTYPE)).train(training)
    twin, x = copy.deepcopy(block), randn(3, 4, 6, 7)

    def stock(x):
        return F.relu(twin.bn2(twin.conv2(F.relu(twin.bn1(twin.conv1(x))))))

    assert_same(run(block, block, x), run(twin, stock, x))


STRIDED = ["BasicBlock of stride 2", "Bottleneck of stride 2"]


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("part", ["conv1", "bn1", "relu", "conv2", "bn2", "downsample.0", "downsample.1"])
def test_forward_hooks_on_inner_modules_fire(torchvision, name, part):
    stock, fused, x = blocks(torchvision, name)
    twins(stock, fused)
    calls = []
    for block in (stock, fused):
        block.get_submodule(part).register_forward_hook(
            lambda module, inputs, output: calls.append(type(module)) or output * 1.5
        )
    actual = run(fused, fused, x)
    fired, calls[:] = calls[:], []
    assert_same(actual, run(stock, stock, x))
    assert fired == calls != []


# Not on bn2 of BasicBlock: torchvision adds to its output in place, which backward hooks do not allow.
@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("part", ["conv1", "bn1", "relu", "conv2"])
def test_backward_hooks_on_inner_modules_fire(torchvision, name, part):
    stock, fused, x = blocks(torchvision, name)
    twins(stock, fused)
    calls = []
    for block in (stock, fused):
        block.relu.inplace = False
        block.get_submodule(part).register_full_backward_hook(
            lambda module, inputs, outputs: calls.append(type(module)) or (inputs[0] * 1.5,)
        )
    actual = run(fused, fused, x)
    fired, calls[:] = calls[:], []
    assert_same(actual, run(stock, stock, x))
    assert fired == calls != []


def test_a_hook_leaves_the_rest_of_the_block_fused():
    block = Bottleneck(4, 1)
    block.bn2.register_forward_hook(lambda *_: None)
    with recording.record() as records:
        block(torch.randn(2, 4, 5, 5))
    assert [r.fused for r in records] == [True, False, True]
    assert records[1].reason == (block.bn2, "a forward hook is set")


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_block_keeps_channels_last(torchvision, name, training):
    stock, fused, x = blocks(torchvision, name)
    twins(stock, fused, "train" if training else "eval")
    fused.to(memory_format=torch.channels_last)
    actual = run(fused, fused, x.to(memory_format=torch.channels_last))
    assert actual["output"].is_contiguous(memory_format=torch.channels_last)
    assert_same(actual, run(stock, stock, x))


@pytest.mark.parametrize(("argument", "value"), [("groups", 2), ("base_width", 128)])
@pytest.mark.parametrize("kind", [BasicBlock, PlainBlock])
def test_basic_block_has_one_width(kind, argument, value):
    with pytest.raises(ValueError, match="BasicBlock only supports groups=1 and base_width=64"):
        kind(4, 4, **{argument: value})


def test_basic_block_does_not_dilate():
    with pytest.raises(NotImplementedError, match="Dilation > 1 not supported in BasicBlock"):
        BasicBlock(4, 4, dilation=2)


# ---------------------------------------------------------------------------------------------------------
# copies


def reloaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MODULES = {
    "BnReLU2d": (lambda: BnReLU2d(4), 1),
    "BnAddReLU2d": (lambda: BnAddReLU2d(4), 2),
    "ConvBn2d": (lambda: ConvBn2d(4, 4, 3, bias=False), 1),
    "ConvBnReLU2d": (lambda: ConvBnReLU2d(4, 4, 3, padding="same"), 1),
    "ConvBn2d.of": (lambda: ConvBn2d.of(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), 1),
    "BasicBlock": (lambda: BasicBlock(4, 4), 1),
    "PlainBlock": (lambda: PlainBlock(4, 4), 1),
    "Bottleneck": (lambda: Bottleneck(4, 1), 1),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), reloaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_compute_the_same(name, copied):
    make, inputs = MODULES[name]
    module = filled(make().to(DTYPE))
    twin = copied(module)
    assert type(twin) is type(module) and repr(twin) == repr(module)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}
    inputs = [randn(2, 4, 5, 5) for _ in range(inputs)]
    assert_same(run(twin, twin, *inputs), run(module, module, *inputs))


@pytest.mark.parametrize("name", MODULES)
def test_compiles_without_a_break(name):
    make, inputs = MODULES[name]
    module = filled(make().to(DTYPE))
    compiled = copy.deepcopy(module)
    torch._dynamo.reset()
    traced = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    inputs = [randn(2, 4, 5, 5) for _ in range(inputs)]
    assert_same(run(compiled, traced, *inputs), run(module, module, *inputs))


@pytest.mark.parametrize(
    "make", [lambda: BnReLU2d(4), lambda: BnAddReLU2d(4)], ids=["BnReLU2d", "BnAddReLU2d"]
)
def test_conversion_to_sync_batch_norm_does_not_drop_the_relu(make):
    with pytest.raises(TypeError, match="would drop the ReLU of Bn.*ReLU2d; build the model of"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(make()))
    assert make().num_features == 4 and "BnReLU2d(4, eps" in repr(BnReLU2d(4))


def test_what_refuses_a_batch_counts_none():
    bn, block = BnAddReLU2d(4), BasicBlock(4, 4)
    with pytest.raises(ValueError, match="residual has shape"):
        bn(torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 4))
    block.downsample = nn.Conv2d(4, 4, 1, stride=2)
    with pytest.raises(ValueError, match="residual has shape"):
        block(torch.randn(2, 4, 6, 6))
    for norm in (bn, block.bn2):
        assert norm.num_batches_tracked == 0 and not norm.running_mean.any()
    assert block.bn1.num_batches_tracked == 1 and block.bn1.running_mean.all()
