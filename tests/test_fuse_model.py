"""A fused model is the model that it was: class, keys, copies, unfuse(), torch.compile."""

import copy
import io
import pickle
from importlib import import_module

import pytest
import torch
from fusing import DTYPE, close, fused_names, images, ran, same, step
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from user_blocks import Body, InPlaceSum, OneLine, Registered, Shortcut, Training, conv

from fastres.fuse import fuse, is_fused, unfuse

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
    # At 32 pixels the last batch norms would see two values a channel, and make much of any rounding.
    same(stock, fused, images(size=64), modes=(True,))
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


def test_a_trace_of_a_fused_model_is_that_of_the_stock_one(tmp_path):
    """Who has PyTorch alone can run it; torch.jit.trace runs the model twice, to compare."""
    layers = (conv(4, 4), nn.BatchNorm2d(4), nn.ReLU())
    stock, input = nn.Sequential(OneLine(), nn.Sequential(*layers)).to(DTYPE).eval(), images(4)
    trace = torch.jit.trace(fuse(stock), input)
    assert "fastres::" not in str(trace.inlined_graph)
    trace.save(tmp_path / "trace.pt")
    assert torch.equal(torch.jit.load(tmp_path / "trace.pt")(input), stock(input))


def test_a_script_is_made_of_the_unfused_model():
    stock, input = nn.Sequential(OneLine(), nn.ReLU()).to(DTYPE).eval(), images(4)
    fused = fuse(stock)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script\(fastres\.unfuse\(model\)\)"):
        torch.jit.script(fused)
    assert torch.equal(torch.jit.script(unfuse(fused))(input), stock(input))
    assert fused_names(fused) == ["0"]


class Named(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(conv(4, 4), nn.BatchNorm2d(4)))

    def forward(self, x):
        return F.relu(getattr(self, self.name)(x) + x)


@pytest.mark.parametrize(("name", "inlined"), [("block1-0", True), ("0", True), ("class", False)])
def test_a_container_may_have_any_name(name, inlined):
    stock = Named(name).to(DTYPE)
    fused = fuse(stock)
    assert fused_names(fused) == (["", name] if inlined else [name])
    assert not inlined or ran(fused, images(4)) == ran(fuse(Shortcut().to(DTYPE)), images(4))[-1:]
    same(stock, fused, images(4))


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
    assert b"user_blocks" in pickle.dumps(fuse(block))
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
