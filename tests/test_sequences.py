"""Convolutions in sequences: in which forwards they are found, and what the model still is."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from accuracy import assert_as_accurate
from sequencing import Uses, check, images, optimized, ran_of, small, without_sequences
from torch import nn
from torch.nn import functional as F

import fastres
from fastres import _C

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _C.convolves("float32"), reason="there are no convolutions for this processor"),
]


# ---------------------------------------------------------------------------------------------------------
# whose forwards
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet18", [19]), ("resnet50", [52]), ("cifar_resnet20", [6, 5]), ("plain18", [16])],
)
def test_own_models(name, expected, ran):
    """All but the one before a maximum over windows, and in the small model those of few channels."""
    input = images(4, 64)
    check(optimized(getattr(fastres.models, name)(), input), input, ran, expected)


def test_torchvision(torchvision, ran):
    input = images(2, 64)
    check(optimized(torchvision.models.resnet50(), input), input, ran, [52])
    check(optimized(torchvision.models.wide_resnet50_2(), input), input, ran, [52])


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet50d", [2, 13, 13, 19, 7]), ("seresnet18", [2, 2, 2, 3, 2, 3, 2, 3])]
)
def test_timm(timm, name, expected, ran):
    """Average pools in shortcuts, or gates, are calls between two sequences.

    A convolution in a container, whose batch norm is behind that, is one step here, and two calls without.
    """
    input = images(8, 64)
    stock = timm.create_model(name)
    model = optimized(stock, input)
    assert ran_of(model, input, ran) == expected
    with torch.no_grad():
        reference = copy.deepcopy(stock).double()(input.double())
        assert_as_accurate("logits", model(input), stock(input), reference)


def test_transformers(transformers, ran):
    """The model's own forward takes any keyword; those of its stages do not."""
    config = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[128, 256], layer_type="bottleneck")
    model = optimized(transformers.ResNetForImageClassification(config), images(2, 64))
    stages = ran_of(model, images(2, 64), ran)
    assert stages == [1, 4, 4]  # and before them the convolution of images
    output, expected = model(images(2, 64)), without_sequences(model, images(2, 64))
    assert output.logits.shape == expected.logits.shape == (2, config.num_labels)


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
