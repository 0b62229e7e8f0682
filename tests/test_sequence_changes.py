"""Convolutions in sequences: no change of the model, of its input or of the mode is missed."""

import copy
import weakref

import pytest
import torch
from sequencing import Uses, check, images, optimized, ran_of, randomized, small, without_sequences
from torch import nn
from torch.autograd import forward_ad

import fastres
from fastres import _C, models, sequences, sites

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _C.convolves("float32"), reason="there are no convolutions for this processor"),
]


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


def _step_of_a_fused_optimizer(model):
    """Which no version tells of."""
    weight = model.layer2[1].conv1.weight
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()


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
        _step_of_a_fused_optimizer,
    ],
)
def test_a_change_is_seen(change, ran):
    """At once, and by the sequences that are made behind it."""
    torch.manual_seed(0)
    stock = randomized(small()).requires_grad_(False)
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
    for _ in range(2):
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


def test_of_many_kinds_those_that_come_again(ran):
    """The first ones get sequences, and later ones when they come a second time; nothing piles up."""
    model = optimized(small())
    sources = torch.fx.graph_module._loader.eval_cache
    kinds = [images(1, side) for side in range(33, 63)]
    known = len(sources)
    for input in kinds:
        model(input)
    for _ in range(2):
        made = [bool(ran_of(model, input, ran)) for input in kinds]
        assert made[: sequences._MOST_KINDS] == [True] * sequences._MOST_KINDS
        assert not any(made[sequences._MOST_KINDS :])
    model(kinds[-1])
    assert [bool(ran_of(model, kinds[-1], ran)) for _ in range(3)] == [True] * 3
    assert len(sources) == known


@pytest.mark.skipif(not _C.convolves("bfloat16"), reason="the processor has no bf16 convolutions of ours")
def test_autocast(ran):
    input = images(2, 64)
    model = optimized(small(), input)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(input)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            check(model, input, ran, [19])
        check(model, input, ran, [19])


def _halved(fc):
    with torch.no_grad():
        fc.weight.mul_(0.5)


def _moved(fc):
    fc.bias.data = fc.bias.data + 1


def _replaced(fc):
    fc.weight = nn.Parameter(fc.weight.detach() + 0.1)


def _hooked(fc):
    fc.register_forward_hook(lambda module, args, output: output + 1)


@pytest.mark.skipif(not _C.convolves("bfloat16"), reason="the processor has no bf16 convolutions of ours")
@pytest.mark.parametrize("change", [_halved, _moved, _replaced, _hooked])
def test_a_linear_layer_is_cast_once(change, monkeypatch):
    """And again after each change."""
    input, model, casts = images(2, 64), small(), []
    cast = sequences._cast_linear
    monkeypatch.setattr(sequences, "_cast_linear", lambda *args: casts.append(args) or cast(*args))

    def check():
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                assert torch.equal(model(input), without_sequences(model, input))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model = optimized(model, input)
        check()
        assert len(casts) == 1
        before = model(input)
        change(model.fc)
        check()
        assert len(casts) == (1 if change is _hooked else 2) and not torch.equal(model(input), before)


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
    assert ran == []
    torch.testing.assert_close(torch.jit.trace(model, input)(input), plain, rtol=1e-3, atol=1e-4)


def test_compiled(ran):
    input = images(2, 64)
    model = optimized(small(), input)
    ran.clear()
    with torch.no_grad():
        output = torch.compile(model, fullgraph=True, backend="aot_eager")(input)
    torch.testing.assert_close(output, without_sequences(model, input), rtol=1e-4, atol=1e-5)
    assert ran == []


def test_memory_that_other_processes_write():
    input = images()
    model = optimized(models.resnet18(num_classes=10), input)
    model.share_memory()
    with torch.no_grad():
        for _ in range(3):
            model(input)
        for parameter in model.parameters():
            array = parameter.numpy()
            array *= 0.9  # counted by nobody, as if another process did it
        with sites.stock():
            expected = model(input)
        torch.testing.assert_close(model(input), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [lambda: torch.jit.script(nn.Linear(512, 7)), lambda: nn.LazyLinear(7)],
    ids=["scripted", "lazy"],
)
def test_parts_that_cannot_be_watched(make):
    input = images()
    model = optimized(models.resnet18(num_classes=10), input)
    model.fc = make()
    with torch.no_grad():
        first = model(input)
        with sites.stock():
            torch.testing.assert_close(first, model(input), rtol=1e-4, atol=1e-4)
        for _ in range(3):
            torch.testing.assert_close(model(input), first, rtol=1e-4, atol=1e-4)
