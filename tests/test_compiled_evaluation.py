"""torch.compile and torch.export of models in evaluation: what the ops tell a compiler of themselves."""

import copy

import pytest
import torch
from layers import channels_last
from sequencing import randomized
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastres
from fastres import models


def stem_and_block():
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return randomized(nn.Sequential(*layers, fastres.nn.BasicBlock(32, 32)))


MAKES = {
    "fuse": lambda: fastres.fuse(stem_and_block()),
    "optimized": lambda: fastres.optimize_for_inference(stem_and_block()),
    "models": lambda: randomized(models.resnet18(num_classes=10)),
}


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("memory", [channels_last, torch.Tensor.contiguous], ids=["nhwc", "nchw"])
def test_one_graph_for_images_of_any_size(make, memory):
    model, counter = make(), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch, side in ((2, 64), (3, 80), (5, 96)):
            images = memory(torch.randn(batch, 3, side, side))
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_strict_export_takes_any_size_and_writes_nothing(make):
    model, images = make(), channels_last(torch.randn(2, 3, 64, 64))
    dim = torch.export.Dim
    sizes = {0: dim("batch", min=2), 2: dim("height", min=40), 3: dim("width", min=40)}
    with torch.no_grad():
        exported = torch.export.export(model, (images,), dynamic_shapes=(sizes,), strict=True)
        exported = exported.run_decompositions()
        others = channels_last(torch.randn(3, 3, 48, 80))
        torch.testing.assert_close(exported.module()(others), model(others), rtol=1e-4, atol=1e-4)
    assert not exported.graph_signature.buffers_to_mutate


@pytest.mark.parametrize("make", [MAKES["fuse"], MAKES["models"]], ids=["fuse", "models"])
@pytest.mark.parametrize("memory", [channels_last, torch.Tensor.contiguous], ids=["nhwc", "nchw"])
def test_running_statistics_are_not_written(make, memory):
    model = make()
    compiled, images = torch.compile(model, backend="aot_eager"), memory(torch.randn(4, 3, 64, 64))
    before = [buffer._version for buffer in model.buffers()]
    loss = model(images).sum() + compiled(images).sum()
    loss.backward()  # which finds what was saved unmodified
    assert [buffer._version for buffer in model.buffers()] == before


def test_compiled_blocks_of_an_optimized_model():
    model = randomized(models.resnet18(num_classes=10))
    model.layer2[0] = torch.compile(model.layer2[0], backend="eager", fullgraph=True)
    expected = copy.deepcopy(model)
    optimized = fastres.optimize_for_inference(model)
    optimized.layer3[1] = torch.compile(optimized.layer3[1], backend="eager", fullgraph=True)
    images = channels_last(torch.randn(2, 3, 64, 64))
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(optimized(images), expected(images), rtol=1e-4, atol=1e-4)
    assert fastres.explain(optimized, images).rows
