"""Convolutions in sequences: in which forwards they are found, and that no change of a model is missed."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import library, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import fastres
from fastres import _C, sequences, sites

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _C.convolves("float32"), reason="there are no convolutions for this processor"),
]
_COLUMNS = 9


@pytest.fixture
def ran(monkeypatch):
    """How many convolutions each sequence that ran had."""
    counts, run = [], sequences._run
    monkeypatch.setattr(sequences, "_run", lambda *args: counts.append(len(args[3])) or run(*args))
    return counts


def randomized(model):
    """With statistics and factors that are not their initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval().requires_grad_(False)


def images(batch=2, side=32, channels=3):
    return torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)


def without_sequences(model, input):
    """What it gives where each layer is called by itself, which `sites.record` asks for."""
    with torch.no_grad(), sites.record():
        return model(input)


def optimized(model, input=None):
    """The model in sequences, after the call that makes them."""
    model = fastres.optimize_for_inference(randomized(model))
    if input is not None:
        with torch.no_grad():
            model(input)
    return model


def check(model, input, ran, expected):
    """The same bits as without, by so many convolutions in sequences."""
    ran.clear()
    with torch.no_grad():
        output = model(input)
    assert ran == expected
    torch.testing.assert_close(output, without_sequences(model, input), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------
# whose forwards
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet18", [19]), ("resnet50", [52]), ("cifar_resnet20", [5, 6]), ("plain18", [16])],
)
def test_own_models(name, expected, ran):
    """All but the convolution of images, and in the small model those of fewer than 32 channels."""
    input = images(4, 64)
    check(optimized(getattr(fastres.models, name)(), input), input, ran, expected)


def test_torchvision(torchvision, ran):
    input = images(2, 64)
    check(optimized(torchvision.models.resnet50(), input), input, ran, [52])
    check(optimized(torchvision.models.wide_resnet50_2(), input), input, ran, [52])


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet50d", [1, 13, 13, 19, 7]), ("seresnet18", [2, 2, 2, 3, 2, 3, 2, 3])]
)
def test_timm(timm, name, expected, ran):
    """Average pools in shortcuts, or gates, are calls between two sequences.

    A convolution in a container, whose batch norm is behind that, is one step here, and two calls without.
    """
    input = images(2, 64)
    model = optimized(timm.create_model(name), input)
    assert ran_of(model, input, ran) == expected
    torch.testing.assert_close(model(input), without_sequences(model, input), rtol=1e-4, atol=1e-5)


def ran_of(model, input, ran):
    ran.clear()
    with torch.no_grad():
        model(input)
    return list(ran)


def test_transformers(transformers, ran):
    """The model's own forward takes any keyword; those of its stages do not."""
    config = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[128, 256], layer_type="bottleneck")
    model = optimized(transformers.ResNetForImageClassification(config), images(2, 64))
    stages = ran_of(model, images(2, 64), ran)
    assert len(stages) == 2 and sum(stages) == 8
    output, expected = model(images(2, 64)), without_sequences(model, images(2, 64))
    assert output.logits.shape == expected.logits.shape == (2, config.num_labels)


class Uses(nn.Module):
    """A residual block whose values are also used elsewhere, in the way that `use` tells."""

    def __init__(self, use, channels=32):
        super().__init__()
        self.use = use
        for i in range(1, 5):
            setattr(self, f"conv{i}", nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(channels))

    def forward(self, x):
        first = F.relu(self.bn1(self.conv1(x)))
        second = F.relu(self.bn2(self.conv2(first)) + x)
        if self.use == "gate":
            second = second * torch.sigmoid(second.mean((2, 3), keepdim=True))
        third = F.relu(self.bn3(self.conv3(second)) + first)
        fourth = self.bn4(self.conv4(third))
        fourth += second if self.use == "in place" else third
        fourth = F.relu(fourth)
        if self.use == "features":
            return first, third, fourth
        return (fourth, fourth + x) if self.use == "last" else fourth


@pytest.mark.parametrize(
    ("use", "expected"),
    [("nothing", [4]), ("in place", [4]), ("last", [4]), ("features", [4]), ("gate", [2, 2])],
)
def test_values_that_are_used_elsewhere(use, expected, ran):
    model, input = Uses(use), images(channels=32)
    model = optimized(model, input)
    ran.clear()
    with torch.no_grad():
        outputs = model(input)
    assert ran == expected
    torch.testing.assert_close(outputs, without_sequences(model, input), rtol=0, atol=0)


def test_memory_between_the_steps_is_shared_by_no_two_values_that_live(ran):
    """Random graphs: each step takes any two values of the same shape that were made before."""

    class Graph(nn.Module):
        def __init__(self, seed):
            super().__init__()
            random = torch.Generator().manual_seed(seed)
            self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(12))
            self.bns = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(12))
            self.takes = tuple(
                tuple(torch.randint(max(0, i - 4), i + 1, (2,), generator=random).tolist())
                for i in range(12)
            )

        def forward(self, x):
            values = [x]
            for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
                source, residual = self.takes[i]
                values.append(F.relu(bn(conv(values[source])) + values[residual]))
            return values[-1]

    for seed in range(10):
        input = images(1, 9, channels=32)
        model = optimized(Graph(seed), input)
        check(model, input, ran, ran_of(model, input, ran))
        assert sum(ran) > 6


# ---------------------------------------------------------------------------------------------------------
# what ends a sequence
# ---------------------------------------------------------------------------------------------------------


def small():
    return fastres.unfuse(fastres.models.resnet18(num_classes=10))


def _hook_on_a_layer(model):
    model.layer2[1].bn1.register_forward_hook(lambda module, args, output: output + 1)


def _hook_on_a_block(model):
    model.layer2[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _global_hook(model):
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 1.01)
    weakref.finalize(model, handle.remove)
    return handle


def _layer(model):
    model.layer2[1].relu = nn.Sigmoid()


def _block(model):
    model.layer3[1] = nn.Identity()


def _parameter(model):
    model.layer2[1].conv1.weight = nn.Parameter(model.layer2[1].conv1.weight * 2)


def _in_place(model):
    with torch.no_grad():
        model.layer2[1].conv1.weight.mul_(2)


def _memory(model):
    model.layer2[1].conv1.weight.data = model.layer2[1].conv1.weight * 2


def _memory_of_a_norm(model):
    model.layer2[1].bn1.weight.data = model.layer2[1].bn1.weight * 2


def _values_of_a_norm(model):
    model.layer2[1].bn1.weight.data.mul_(2)


def _statistics(model):
    model.layer2[1].bn1.running_mean = model.layer2[1].bn1.running_mean + 1


def _eps(model):
    model.layer2[1].bn1.eps = 0.5


def _stride(model):
    model.layer4[0].conv1.stride = model.layer4[0].downsample[0].stride = (1, 1)


def _mode(model):
    model.layer2.train()


def _forward_of_the_instance(model):
    model.layer2[1].forward = lambda x: x * 2


def _loaded(model):
    model.load_state_dict(randomized(small()).state_dict())


def _other_dtype(model):
    model.double()


@pytest.mark.parametrize(
    "change",
    [
        _hook_on_a_layer,
        _hook_on_a_block,
        _global_hook,
        _layer,
        _block,
        _parameter,
        _in_place,
        _memory,
        _memory_of_a_norm,
        _values_of_a_norm,
        _statistics,
        _eps,
        _stride,
        _mode,
        _forward_of_the_instance,
        _loaded,
        _other_dtype,
    ],
)
def test_a_change_is_seen(change, ran):
    """At once, and by the sequences that are made behind it."""
    torch.manual_seed(0)
    stock = randomized(small())
    input = images(2, 64)
    model = optimized(stock, input)
    check(model, input, ran, [19])
    before = without_sequences(model, input)
    handles = []
    for changed in (model, stock):
        torch.manual_seed(1)
        handles.append(change(changed))
        if change is _global_hook:
            break
    try:
        if change is _other_dtype:
            input = input.double()
        for _ in range(4):
            with torch.no_grad():
                ours = model(input)
                theirs = copy.deepcopy(stock)(input)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert ours.dtype != before.dtype or not torch.allclose(ours, before)
    finally:
        for handle in filter(None, handles):
            handle.remove()


def test_a_forward_that_a_class_gets(ran):
    class Block(Uses):
        pass

    input = images(channels=32)
    model = optimized(Block("nothing"), input)
    check(model, input, ran, [4])
    Block.forward = lambda self, x: x
    with torch.no_grad():
        assert model(input) is input


def test_hooks_that_go_again(ran):
    input = images(2, 64)
    model = optimized(small(), input)
    handle = model.layer2[1].bn1.register_forward_hook(lambda *_: None)
    for _ in range(3):
        model(input)
    check(model, input, ran, ran_of(model, input, ran))
    assert ran == [7, 11]
    handle.remove()
    model(input)
    check(model, input, ran, [19])


def test_a_model_that_changes_at_every_call_is_left_alone(ran):
    input = images(2, 64)
    model = optimized(small(), input)
    for i in range(20):
        model.layer1[0].bn1.eps = 1e-5 * (1 + i)
        model(input)
    model(input)
    check(model, input, ran, [])


def test_gradients(ran):
    """Of the input, and of parameters that ask for one again."""
    input = images(2, 64)
    model = optimized(small(), input)
    grads = []
    for wanted in (model, fastres.fuse(model)):
        leaf = input.clone().requires_grad_()
        wanted(leaf).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    model.fc.requires_grad_(True)
    ran.clear()
    model(input).sum().backward()
    assert model.fc.weight.grad is not None and ran == []
    check(model, input, ran, [19])


def test_kinds_of_inputs(ran):
    """Each has its own sequences; other layouts and dtypes run as they do without."""
    model = optimized(small())
    for _ in range(2):
        for input in (images(2, 64), images(1, 64), images(2, 96), images(2, 64).contiguous()):
            torch.testing.assert_close(
                model(input), without_sequences(model, input), rtol=0, atol=0, check_stride=True
            )
    assert ran and len(ran) % 2 == 0
    for side in range(40, 60):
        model(images(1, side))


@pytest.mark.skipif(not _C.convolves("bfloat16"), reason="the processor has no bf16 convolutions of ours")
def test_autocast(ran):
    input = images(2, 64)
    model = optimized(small(), input)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            check(model, input, ran, [19])
        check(model, input, ran, [19])


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_instruction_sets(isa, ran):
    used = _C.cpu_isa()
    input = images(2, 64)
    model = optimized(small(), input)
    try:
        _C.select_cpu_isa(isa)
        model(input)
        check(model, input, ran, [19] if _C.convolves("float32") else [])
    finally:
        _C.select_cpu_isa(used)


def test_who_is_to_see_each_layer(ran):
    """Transforms, traces and contexts of ours."""
    input = images(2, 64)
    model = optimized(small(), input)
    ran.clear()
    plain = without_sequences(model, input)
    with sites.stock():
        torch.testing.assert_close(model(input), plain, rtol=1e-3, atol=1e-4)
    assert "19 x conv_bn" not in str(fastres.explain(model, input)) and ran == []
    torch.testing.assert_close(torch.func.vmap(model)(input[None])[0], plain, rtol=1e-3, atol=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(input, torch.ones_like(input))
        assert forward_ad.unpack_dual(model(dual)).tangent is not None
    torch.testing.assert_close(
        torch.jit.trace(model, input, check_trace=False)(input), plain, rtol=1e-3, atol=1e-4
    )
    assert ran == []


def test_compiled(ran):
    input = images(2, 64)
    model = optimized(small(), input)
    ran.clear()
    with torch.no_grad():
        output = torch.compile(model, fullgraph=True, backend="aot_eager")(input)
    torch.testing.assert_close(output, without_sequences(model, input), rtol=1e-4, atol=1e-5)
    assert ran == []


# ---------------------------------------------------------------------------------------------------------
# what the model is
# ---------------------------------------------------------------------------------------------------------


def test_classes_copies_and_the_way_back(ran):
    input = images(2, 64)
    stock = small()
    model = optimized(stock, input)
    assert isinstance(model, type(stock)) and type(model).__name__ == type(stock).__name__
    assert type(model).__mro__.count(object) == 1 and repr(model) == repr(stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert type(fastres.unfuse(model)) is type(stock)
    assert fastres.optimize_for_inference(model, inplace=True) is model
    output = model(input)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        fastres.fuse(model),
        copy.copy(model),
    ):
        ran.clear()
        torch.testing.assert_close(again(input), output, rtol=1e-4, atol=1e-5)
        again(input)
        assert ran == []
    check(model, input, ran, [19])
    with pytest.raises(TypeError, match="missing|argument"):
        model()
    with pytest.raises(TypeError, match="argument"):
        model(input, input)
    with pytest.raises(RuntimeError, match="channels"):
        model(images(2, 64, channels=4))


def test_it_dies_with_its_model():
    input = images(2, 64)
    model = optimized(small(), input)
    model(input)
    cls, layer = weakref.ref(type(model)), weakref.ref(model.layer1[0].conv1)
    del model
    gc.collect()
    assert cls() is None and layer() is None


# ---------------------------------------------------------------------------------------------------------
# the op
# ---------------------------------------------------------------------------------------------------------


def arguments(count=3, channels=32):
    """Of conv_bn_act_sequence: each step takes the value before, and adds the first."""
    input = images(2, 7, channels)
    tensors, steps = [], []
    for i in range(count):
        weight = torch.randn(channels, channels, 3, 3) / 17
        pack = torch.ops.fastres.conv_pack_weight(weight, input, [1, 1], [1, 1], 1)
        tensors += [weight, pack, None, torch.randn(channels), torch.rand(channels) + 0.5, None, None]
        steps += [i, 0, 1, 1, 1, 1, 1, 1, 1]
    return [[input], tensors, steps, [1e-5] * count, [count - 1, count]]


def test_opcheck():
    library.opcheck(
        torch.ops.fastres.conv_bn_act_sequence.default,
        arguments(),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[0].clear(), "inputs is empty"),
        (lambda a: a[3].clear(), "nine integers for each of eps"),
        (lambda a: a[4].append(0), "that no step makes"),
        (lambda a: a[4].append(4), "that no step makes"),
        (lambda a: a[2].pop(), "nine integers for each of eps"),
        (lambda a: a[1].pop(), "seven for each of eps"),
        (lambda a: a[2].__setitem__(_COLUMNS, 3), "not there yet"),
        (lambda a: a[2].__setitem__(1, -2), "not there yet"),
        (lambda a: a[2].__setitem__(4, 0), "another shape than what it is added to"),
        (lambda a: a[2].__setitem__(2, 0), "stride takes two integers of at least 1"),
        (lambda a: a[1].__setitem__(1, None), "are needed"),
        (lambda a: a[1].__setitem__(3, None), "are needed"),
        (lambda a: a[1].__setitem__(3, torch.zeros(31)), "one value a channel"),
        (
            lambda a: a[1].__setitem__(1, torch.zeros(5, dtype=torch.uint8)),
            "not what conv_pack_weight makes",
        ),
        (lambda a: a[0].append(a[0][0].contiguous()), "inputs is not channels last"),
        (lambda a: a[0].append(a[0][0].double()), "inputs is not of dtype float32"),
        (lambda a: a[0].__setitem__(0, images(2, 7, 16)), "input channels"),
    ],
)
def test_bad_arguments(change, message):
    given = arguments()
    change(given)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastres.conv_bn_act_sequence(*given)
