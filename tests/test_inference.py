"""optimize_for_inference: what it keeps, when it makes that anew, and that results are stock PyTorch's."""

import copy
import gc
import pickle

import pytest
import torch
from accuracy import assert_as_accurate
from sequencing import images, randomized
from torch import nn

import fastres
from fastres import _C, packing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def packs(monkeypatch):
    """Each weight that is packed."""
    made, pack = [], packing._pack
    monkeypatch.setattr(packing, "_pack", lambda weight, *rest: made.append(weight) or pack(weight, *rest))
    return made


def stock_model():
    torch.manual_seed(0)
    return randomized(fastres.unfuse(fastres.models.resnet18(num_classes=10)))


def stock_output(model, input):
    with torch.no_grad(), fastres.sites.stock():
        return model(input)


def check(model, stock, inputs):
    """Over several inputs: ten logits are few."""
    with torch.no_grad():
        double = copy.deepcopy(stock).double()
        references = torch.cat([stock_output(double, input.double()) for input in inputs])
        theirs = torch.cat([stock_output(stock, input) for input in inputs])
        assert_as_accurate("logits", torch.cat([model(input) for input in inputs]), theirs, references)


def test_results_are_as_accurate_as_stock_and_weights_are_packed_once(packs):
    stock = stock_model()
    model = fastres.optimize_for_inference(stock)
    for batch, side in ((1, 64), (1, 128), (8, 64), (2, 97)):
        check(model, stock, [images(batch, side) for _ in range(8)])
    assert len(packs) == len({id(weight) for weight in packs}) == 20


@pytest.mark.parametrize("cast", ["autocast", "module"])
def test_bfloat16(cast, packs):
    stock = stock_model()
    model = fastres.optimize_for_inference(stock)
    input = images(2, 64)
    reference = stock_output(copy.deepcopy(stock).double(), input.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        if cast == "module":
            stock, model, input = stock.bfloat16(), model.bfloat16(), input.bfloat16()
            reference = stock_output(copy.deepcopy(stock).double(), input.double())
        assert_as_accurate("logits", model(input), stock_output(stock, input), reference)
        model(input)
    assert len(packs) == (20 if fastres._C.convolves("bfloat16") else 0)


def _load(model, other):
    model.load_state_dict(other.state_dict())


def _copy(model, other):
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs)


def _exchange(model, other):
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.data = theirs.detach().clone()


@pytest.mark.parametrize("change", [_load, _copy, _exchange])
def test_changed_weights_are_packed_anew(change):
    stock, other, input = stock_model(), stock_model(), images(8, 64)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    model = fastres.optimize_for_inference(stock)
    check(model, stock, [input])
    change(model, other)
    check(model, other, [input])


def test_changed_statistics_and_factors_are_seen():
    stock = stock_model()
    model = fastres.optimize_for_inference(stock)
    check(model, stock, [images(8, 64)])
    for changed in (model, stock):
        for module in changed.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name in ("running_mean", "running_var", "weight", "bias"):
                    getattr(module, name).data.mul_(1.2)  # which autograd does not see
    check(model, stock, [images(8, 64)])


def test_what_it_does_to_a_model():
    stock = stock_model().train()
    model = fastres.optimize_for_inference(stock)
    assert stock.training and all(p.requires_grad for p in stock.parameters())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(images(2, 64)).requires_grad
    ours, theirs = model.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert fastres.optimize_for_inference(stock, inplace=True) is stock
    assert not stock.training
    with pytest.raises(TypeError, match="expected torch.nn.Module"):
        fastres.optimize_for_inference(stock.state_dict())


def test_a_model_of_images_and_volumes():
    """Whose weights of five dimensions have no channels_last memory."""
    flat = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
    deep = nn.Sequential(nn.Unflatten(0, (1, -1)), nn.Conv3d(2, 64, 3), nn.BatchNorm3d(64), nn.ReLU())
    stock = nn.Sequential(flat, deep).eval()
    model = fastres.optimize_for_inference(stock)
    assert model[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1][1].weight.is_contiguous()
    input = torch.randn(2, 64, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(input), stock(input), rtol=1e-4, atol=1e-5)


def test_training_goes_on_as_without():
    stock, input = stock_model(), images(2, 64)
    model = fastres.optimize_for_inference(stock)
    model(input)
    grads = []
    for trained in (model, fastres.fuse(stock)):
        trained.train().requires_grad_(True).zero_grad()
        trained(input).sum().backward()
        grads.append([parameter.grad for parameter in trained.parameters()])
    assert all(map(torch.equal, *grads))


def test_a_weight_of_two_convolutions_of_other_groups():
    first, second = nn.Conv2d(32, 128, 3, bias=False), nn.Conv2d(128, 128, 3, groups=4, bias=False)
    second.weight = first.weight
    model = randomized(nn.Sequential(first, nn.BatchNorm2d(128), nn.ReLU(), second, nn.BatchNorm2d(128)))
    input = images(4, 20, channels=32)
    optimized = fastres.optimize_for_inference(model)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(optimized(input), model(input), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_give_the_same_results(duplicate, packs):
    model, input = fastres.optimize_for_inference(stock_model()), images(2, 64)
    output = model(input)
    kept = len(packs)
    again = duplicate(model)
    assert_as_accurate("logits", again(input), output, stock_output(stock_model().double(), input.double()))
    assert len(packs) == kept


def test_what_is_packed_dies_with_its_model():
    gc.collect()
    before = len(packing._kept)
    model = fastres.optimize_for_inference(stock_model())
    model(images(2, 64))
    assert len(packing._kept) == before + 20
    del model
    gc.collect()
    assert len(packing._kept) == before


def test_inference_mode(packs):
    """A model that is made outside of it is packed once."""
    stock = stock_model()
    model, input = fastres.optimize_for_inference(stock), images(2, 64)
    with torch.inference_mode():
        model(input)
    assert len(packs) == 20
    check(model, stock, [images(8, 64)])
    assert len(packs) == 20


def test_a_model_made_in_inference_mode():
    """Nobody counts the changes of its weights: they are packed at each call."""
    with torch.inference_mode():
        model, other, input = fastres.optimize_for_inference(stock_model()), stock_model(), images(8, 64)
        for parameter in other.parameters():
            parameter.mul_(1.1)
        model(input)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(input), stock_output(other, input), rtol=1e-3, atol=1e-3)


def test_changed_dtypes_and_back():
    """The memory of the weights before must not pass for that of the weights behind."""
    for _ in range(4):
        stock = stock_model()
        model, input = fastres.optimize_for_inference(stock), images(8, 64)
        with torch.no_grad():
            model(input)
            for changed in (model, stock):
                changed.bfloat16().float()
            torch.testing.assert_close(model(input), stock_output(stock, input), rtol=1e-4, atol=1e-4)


def test_a_client(torchvision, packs):
    """Its grouped convolutions are packed as the others are."""
    torch.manual_seed(0)
    stock = torchvision.models.resnext50_32x4d(num_classes=10).eval()
    check(fastres.optimize_for_inference(stock), stock, [images(4, 64)])
    convolutions = [m for m in stock.modules() if isinstance(m, nn.Conv2d)]
    ours = [c for c in convolutions if _C.convolves("float32", c.in_channels, c.out_channels, c.groups)]
    assert len(packs) == len(ours) > 36
