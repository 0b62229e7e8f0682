"""Models: torchvision's ResNets, key by key and number by number, and the paper's own networks."""

import copy
import io
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from steps import DTYPE, MODES, assert_same, filled, randn, run, set_mode
from torch import nn
from torch.nn import functional as F

from fastres import models, recording
from fastres.models.cifar import ZeroPadShortcut
from fastres.nn import BasicBlock, Bottleneck, PlainBlock

# torchvision's published numbers.
PARAMETERS = {
    "resnet18": 11689512,
    "resnet34": 21797672,
    "resnet50": 25557032,
    "resnet101": 44549160,
    "resnet152": 60192808,
    "resnext50_32x4d": 25028904,
    "resnext101_32x8d": 88791336,
    "resnext101_64x4d": 83455272,
    "wide_resnet50_2": 68883240,
    "wide_resnet101_2": 126886696,
}
# He et al. 2015, table 6, in millions.
MILLIONS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}


def count(model):
    return sum(p.numel() for p in model.parameters())


def layout(model):
    return [(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items()]


def pair(torchvision, name, mode="train", **arguments):
    """torchvision's model and ours with the same state, in float64."""
    stock = filled(torchvision.models.get_model(name, num_classes=10, **arguments).to(DTYPE))
    fused = models.get_model(name, num_classes=10, **arguments).to(DTYPE)
    fused.load_state_dict(stock.state_dict())
    return set_mode(stock, mode), set_mode(fused, mode)


def small(torchvision, block, mode="train", **arguments):
    """As pair(), of one block a stage."""
    stock = torchvision.models.ResNet(
        getattr(torchvision.models.resnet, block), (1, 1, 1, 1), 10, **arguments
    )
    fused = models.ResNet(
        {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[block], (1, 1, 1, 1), 10, **arguments
    )
    filled(stock)
    assert layout(fused) == layout(stock)
    fused.load_state_dict(stock.state_dict())
    return set_mode(stock.to(DTYPE), mode), set_mode(fused.to(DTYPE), mode)


def stock_forward(model, x):
    """What the paper's network for 32x32 images computes, in plain PyTorch on the model's modules."""
    x = F.relu(model.bn1(model.conv1(x)))
    for block in (*model.layer1, *model.layer2, *model.layer3):
        y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        if not isinstance(block, PlainBlock):
            if y.shape != x.shape:  # option A
                x = x[:, :, ::2, ::2]
                x = torch.cat([x, torch.zeros_like(x)], 1)
            y = y + x
        x = F.relu(y)
    return model.fc(x.mean((2, 3)))


def stock_plain(model, x):
    x = F.max_pool2d(F.relu(model.bn1(model.conv1(x))), 3, 2, 1)
    for block in (*model.layer1, *model.layer2, *model.layer3, *model.layer4):
        x = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    return model.fc(x.mean((2, 3)))


# ---------------------------------------------------------------------------------------------------------
# parameters


@pytest.mark.parametrize("name", PARAMETERS)
def test_state_dict_is_torchvisions(torchvision, name):
    with torch.device("meta"):
        stock, fused = torchvision.models.get_model(name), models.get_model(name)
    assert layout(fused) == layout(stock)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert count(fused) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_a_seed_draws_torchvisions_weights(torchvision, name, zero_init_residual):
    drawn = []
    for module in (torchvision.models, models):
        torch.manual_seed(5)
        drawn.append(module.get_model(name, zero_init_residual=zero_init_residual).state_dict())
    for key, value in drawn[0].items():
        assert torch.equal(drawn[1][key], value), key


@pytest.mark.parametrize("depth", MILLIONS)
def test_parameters_of_the_networks_for_32x32(depth):
    with torch.device("meta"):
        residual, plain = models.get_model(f"cifar_resnet{depth}"), models.get_model(f"cifar_plain{depth}")
    assert round(count(residual) / 1e6, 1 if depth == 110 else 2) == MILLIONS[depth]
    assert layout(plain) == layout(residual)  # option A's shortcuts have no parameters
    weighted = [m for m in residual.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == depth


@pytest.mark.parametrize("depth", [18, 34])
def test_plain_twins_lack_the_projections_only(depth):
    with torch.device("meta"):
        residual, plain = models.get_model(f"resnet{depth}"), models.get_model(f"plain{depth}")
    assert layout(plain) == [entry for entry in layout(residual) if "downsample" not in entry[0]]
    projections = sum(i * o + 2 * o for i, o in ((64, 128), (128, 256), (256, 512)))
    assert count(plain) == PARAMETERS[f"resnet{depth}"] - projections


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_zero_init_residual_begins_with_the_shortcuts(block):
    class Own(block):
        pass

    for kind in (block, Own):
        model = models.ResNet(kind, (1, 2, 1, 1), zero_init_residual=True)
        for module in model.modules():
            if isinstance(module, block):
                last = module.bn3 if block is Bottleneck else module.bn2
                assert not last.weight.any() and module.bn1.weight.all()


def test_zero_init_residual_leaves_plain_blocks_alone():
    model = models.plain18(zero_init_residual=True)
    assert all(m.weight.all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


# ---------------------------------------------------------------------------------------------------------
# the same values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_is_torchvisions(torchvision, name, mode):
    stock, fused = pair(torchvision, name, mode)
    x = randn(2, 3, 64, 64)
    with recording.record() as records:
        actual = run(fused, fused, x)
    assert all(r.fused for r in records)
    assert_same(actual, run(stock, stock, x))


@pytest.mark.parametrize(
    ("groups", "width_per_group"),
    [(32, 4), (32, 8), (64, 4), (1, 128)],
    ids=["resnext 32x4d", "resnext 32x8d", "resnext 64x4d", "wide"],
)
def test_the_widths_of_every_family_are_torchvisions(torchvision, groups, width_per_group):
    stock, fused = small(torchvision, "Bottleneck", groups=groups, width_per_group=width_per_group)
    x = randn(2, 3, 64, 64)
    assert_same(run(fused, fused, x, steps=1), run(stock, stock, x, steps=1))


BN = {
    "momentum=None": {"momentum": None},
    "track_running_stats=False": {"track_running_stats": False},
    "eps, momentum": {"eps": 0.1, "momentum": 0.7},
}


@pytest.mark.parametrize("bn", BN)
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_resnet_with_every_kind_of_batch_norm(torchvision, block, bn, mode):
    stock, fused = small(torchvision, block, mode, norm_layer=partial(nn.BatchNorm2d, **BN[bn]))
    x = randn(2, 3, 64, 64)
    assert_same(run(fused, fused, x), run(stock, stock, x))


@pytest.mark.parametrize(
    "norm_layer", [partial(nn.GroupNorm, 8), nn.Identity], ids=["GroupNorm", "Identity"]
)
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_another_norm_layer_runs_as_it_is(torchvision, block, norm_layer):
    stock, fused = small(torchvision, block, norm_layer=norm_layer)
    x = randn(2, 3, 32, 32)
    with recording.record() as records:
        actual = run(fused, fused, x)
    assert not any(r.fused for r in records)
    assert_same(actual, run(stock, stock, x))


def test_sync_batch_norm_is_left(torchvision):
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(small(torchvision, "Bottleneck", "eval")[1])
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(small(torchvision, "Bottleneck", "eval")[0])
    fused.load_state_dict(stock.state_dict())
    x = randn(2, 3, 32, 32)
    with recording.record() as records:
        actual = run(fused, fused, x)
    assert {r.reason[1] for r in records} == {"SyncBatchNorm instead of nn.BatchNorm2d"}
    assert_same(actual, run(stock, stock, x))


@pytest.mark.parametrize("dilate", [(False, False, True), (False, True, True), (True, True, True)])
def test_replace_stride_with_dilation(torchvision, dilate):
    stock, fused = small(torchvision, "Bottleneck", replace_stride_with_dilation=dilate)
    assert repr(fused.layer4[0].conv2) == repr(stock.layer4[0].conv2)
    x = randn(2, 3, 32, 32)
    assert_same(run(fused, fused, x), run(stock, stock, x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_plain20", "plain18"])
def test_the_papers_networks_are_their_composition(name, training):
    model = filled(models.get_model(name).to(DTYPE)).train(training)
    twin = copy.deepcopy(model)
    forward = stock_plain if name == "plain18" else stock_forward
    x = randn(2, 3, 64, 64) if name == "plain18" else randn(2, 3, 32, 32)
    assert_same(run(model, model, x), run(twin, partial(forward, twin), x))


def test_option_a_takes_every_other_pixel_and_appends_zeros():
    x = torch.arange(2 * 3 * 5 * 6.0).view(2, 3, 5, 6)
    output = ZeroPadShortcut(3, 7, stride=2)(x)
    assert output.shape == (2, 7, 3, 3)
    assert torch.equal(output[:, :3], x[:, :, [0, 2, 4]][..., [0, 2, 4]])
    assert not output[:, 3:].any()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20", "cifar_plain20"])
def test_channels_last_stays(name, training):
    contiguous = models.get_model(name).to(DTYPE).train(training)
    model = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)
    seen = []
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            block.register_forward_hook(lambda block, inputs, output: seen.append((inputs[0], output)))
    x = randn(2, 3, 64, 64)
    output = model(x.to(memory_format=torch.channels_last))
    for tensor in (t for inputs_and_output in seen for t in inputs_and_output):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, contiguous(x), rtol=1e-9, atol=1e-9)


def test_a_hook_on_an_inner_module_fires_and_is_respected(torchvision):
    stock, fused = pair(torchvision, "resnet18")
    calls = []
    for model in (stock, fused):
        for part in ("bn1", "layer1.1.bn2", "layer3.0.downsample.0", "layer4.0.relu"):
            model.get_submodule(part).register_forward_hook(
                lambda module, inputs, output, part=part: calls.append(part) or output * 1.5
            )
    x = randn(2, 3, 64, 64)
    actual = run(fused, fused, x, steps=1)
    fired, calls[:] = calls[:], []
    assert_same(actual, run(stock, stock, x, steps=1))
    assert fired == calls and set(fired) == {
        "bn1",
        "layer1.1.bn2",
        "layer3.0.downsample.0",
        "layer4.0.relu",
    }


def test_symbolic_trace_sees_the_modules(torchvision):
    model = models.resnet18(num_classes=10).to(DTYPE).eval()
    traced = torch.fx.symbolic_trace(model)
    modules = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {"conv1", "layer2.0.downsample.1", "layer4.1.bn2", "fc"} <= modules
    x = randn(2, 3, 32, 32)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------
# training


def curve(model, forward, images, labels, lr):
    # A learning rate at which the loss falls: where it jumps about, rounding errors grow with every step.
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(20):
        batch = slice(8 * (step % 4), 8 * (step % 4) + 8)
        loss = F.cross_entropy(forward(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=DTYPE)


def assert_same_curve(fused, stock):
    assert stock[-4:].mean() < stock[:4].mean(), "the model did not learn: the comparison says little"
    torch.testing.assert_close(fused, stock, rtol=1e-6, atol=1e-6)


def test_20_steps_of_cifar_resnet20_follow_stocks_loss_curve():
    model = models.cifar_resnet20().to(DTYPE)
    twin = copy.deepcopy(model)
    images, labels = randn(32, 3, 16, 16), torch.randint(10, (32,))
    assert_same_curve(
        curve(model, model, images, labels, 0.05),
        curve(twin, partial(stock_forward, twin), images, labels, 0.05),
    )


def test_20_steps_of_resnet18_follow_torchvisions_loss_curve(torchvision):
    trained = []
    images, labels = randn(32, 3, 32, 32), torch.randint(10, (32,))
    for module in (models, torchvision.models):
        torch.manual_seed(5)
        model = module.resnet18(num_classes=10).to(DTYPE)
        trained.append(curve(model, model, images, labels, 0.005))
    assert_same_curve(*trained)


def gradient_of_conv1(model):
    F.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.randint(10, (8,))).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    return model.conv1.weight.grad.norm().item()


def test_the_gradient_reaches_the_first_of_110_layers():
    deep, shallow = gradient_of_conv1(models.cifar_resnet110()), gradient_of_conv1(models.cifar_resnet20())
    assert shallow < deep < 100 * shallow


def test_without_shortcuts_the_gradient_explodes_with_depth():
    # It does not vanish (He et al. 2015, section 4.1): batch norm makes it grow by a factor a layer
    # (Yang et al. 2019, arXiv:1902.08129), which the shortcuts prevent.
    plain, residual = (
        gradient_of_conv1(models.cifar_plain110()),
        gradient_of_conv1(models.cifar_resnet110()),
    )
    assert plain > 1000 * residual


# ---------------------------------------------------------------------------------------------------------
# torch.compile, copies, weights


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_cifar_resnet20_compiles_without_a_break(training):
    model = filled(models.cifar_resnet20().to(DTYPE)).train(training)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    traced = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = randn(2, 3, 16, 16)
    assert_same(run(compiled, traced, x), run(model, model, x))


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), reloaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "cifar_plain20"])
def test_copies_compute_the_same(name, copied):
    model = models.get_model(name).to(DTYPE).eval()
    twin = copied(model)
    assert repr(twin) == repr(model)
    x = randn(1, 3, 32, 32)
    assert torch.equal(twin(x), model(x))


def test_weights_may_be_a_state_dict_a_file_or_torchvisions_enum(torchvision, tmp_path):
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    torch.save(state, tmp_path / "resnet18.pt")
    asked = {}
    member = SimpleNamespace(
        meta={"categories": list("abcdefg")},
        get_state_dict=lambda **arguments: asked.update(arguments) or state,
    )
    for weights, arguments in (
        (state, {"num_classes": 7}),
        (tmp_path / "resnet18.pt", {"num_classes": 7}),
        (str(tmp_path / "resnet18.pt"), {"num_classes": 7}),
        (member, {"progress": False}),
    ):
        loaded = models.resnet18(weights=weights, **arguments).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert asked == {"progress": False, "check_hash": True}


# ---------------------------------------------------------------------------------------------------------
# names and bad arguments


def test_every_name_is_listed_and_built():
    names = models.list_models()
    assert set(names) == {
        *PARAMETERS,
        "plain18",
        "plain34",
        *(f"cifar_{kind}{depth}" for kind in ("resnet", "plain") for depth in MILLIONS),
    }
    for name in names:
        with torch.device("meta"):
            assert models.get_model(name).fc.out_features == (10 if "cifar" in name else 1000)
        assert getattr(models, name).__name__ == name and getattr(models, name).__doc__


def test_cifar_takes_its_number_of_classes_and_channels():
    assert models.cifar_resnet20(num_classes=3, in_channels=1)(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="Unknown model resnet19"):
        models.get_model("resnet19")
    with pytest.raises(ValueError, match=r"None or a 3-element tuple, got \(True, False\)"):
        models.resnet50(replace_stride_with_dilation=(True, False))
    with pytest.raises(NotImplementedError, match="Dilation > 1 not supported in BasicBlock"):
        models.resnet18(replace_stride_with_dilation=(False, False, True))
    with pytest.raises(ValueError, match="BasicBlock only supports groups=1 and base_width=64"):
        models.resnet18(groups=2)
    with pytest.raises(ValueError, match=r"depth is 21, expected 6n \+ 2"):
        models.CifarResNet(BasicBlock, 21)
    with pytest.raises(ValueError, match="depth is 2, expected"):
        models.CifarResNet(BasicBlock, 2)
    with pytest.raises(TypeError, match="positional"):
        models.resnet18(None)


def test_a_name_of_weights_is_told_what_is_taken():
    with pytest.raises(
        FileNotFoundError, match="weights='DEFAULT' is no file; fastres has none of its own"
    ):
        models.resnet18(weights="DEFAULT")


@pytest.mark.parametrize(
    ("name", "argument"),
    [("wide_resnet50_2", {"width_per_group": 64}), ("resnext50_32x4d", {"groups": 1})],
)
def test_what_makes_a_model_that_model_cannot_be_changed(name, argument):
    with pytest.raises(ValueError, match=f"^{name} has "):
        getattr(models, name)(**argument)


def test_weights_of_no_known_kind():
    with pytest.raises(TypeError, match="weights=5: expected None, a state_dict"):
        models.resnet18(weights=5)
