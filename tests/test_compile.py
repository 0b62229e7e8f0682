"""torch.compile of fused models: our convolutions in one graph, with the same results and memory."""

import contextlib
import copy

import pytest
import torch
from layers import PRECISIONS, assert_accurate, channels_last
from saving import kept
from torch import nn

import fastres
from fastres import _C, packing, sites

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _C.convolves("float32"), reason="this processor keeps PyTorch's convolutions"),
]
CONVOLUTIONS = 10  # of blocks()


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def blocks():
    """Residual blocks with and without a projection, whose sums are made again from one another."""
    torch.manual_seed(0)
    downsample = fastres.nn.ConvBn2d(32, 64, 1, stride=2, bias=False)
    return nn.Sequential(
        fastres.nn.BasicBlock(32, 32),
        fastres.nn.BasicBlock(32, 32),
        fastres.nn.BasicBlock(32, 64, stride=2, downsample=downsample),
        fastres.nn.Bottleneck(64, 16, base_width=128),
    ).to(memory_format=torch.channels_last)


def images(batch=4):
    return channels_last(torch.randn(batch, 32, 18, 22))


def ops_in(graph) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_graph_has_our_convolutions(training):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(blocks().train(training), fullgraph=True, backend=backend)
    with torch.set_grad_enabled(training):
        compiled(images())
    (graph,) = graphs
    ops = " ".join(ops_in(graph))
    assert ops.count("conv_bn_act_forward" if training else "conv_bn_act_infer") == CONVOLUTIONS
    assert "conv2d" not in ops


def run(model, call, input, precision):
    """Output, statistics, and all gradients."""
    model.zero_grad()
    leaf = input.clone().requires_grad_()
    with precision.context():
        output = call(leaf)
    generator = torch.Generator().manual_seed(0)
    output.backward(channels_last(torch.randn(output.shape, generator=generator).to(output.dtype)))
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {"output": output, "gradient of input": leaf.grad, **gradients, **buffers}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "precision",
    [PRECISIONS[name] for name in ("float32", "bfloat16-autocast")],
    ids=["float32", "bfloat16-autocast"],
)
def test_results_are_those_of_the_uncompiled_model(precision, backend):
    plain, input = blocks(), images().to(precision.activations)
    model, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with sites.stock():
        references = run(exact, exact, input.double(), PRECISIONS["float32"])
    ours, theirs = run(model, compiled, input, precision), run(plain, plain, input, precision)
    assert torch.equal(ours["output"], theirs["output"])
    for name, value in ours.items():
        if "num_batches" in name or "running" in name:
            assert torch.equal(value, theirs[name]), name
        else:
            assert_accurate(name, value, theirs[name], references[name])


def test_what_is_kept_is_what_the_uncompiled_model_keeps():
    model, input = blocks(), images()

    def kept_by(call, context) -> int:
        with context:
            call(input).sum().backward()  # what is compiled for the first call is no part of the second
            with kept(apart_from=model.parameters()) as bytes:
                output = call(input)
        assert output.requires_grad
        return bytes()

    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    fused, stock = kept_by(model, contextlib.nullcontext()), kept_by(model, sites.stock())
    assert fused < 0.75 * stock
    assert kept_by(compiled, contextlib.nullcontext()) <= 1.02 * fused


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_packed_weights_are_found_when_the_graph_runs(backend, monkeypatch):
    packs, pack = [], packing._pack
    monkeypatch.setattr(packing, "_pack", lambda weight, *rest: packs.append(weight) or pack(weight, *rest))
    model = fastres.optimize_for_inference(blocks())
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            input = images()
            assert torch.equal(compiled(input), model(input))
    assert len(packs) == CONVOLUTIONS
    with torch.no_grad():
        model[0].conv1.weight.mul_(0.5)
        assert torch.equal(compiled(input), model(input))
    assert len(packs) == CONVOLUTIONS + 1


def test_batches_of_any_size():
    model = blocks()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 3, 9):
        input = images(batch)
        before = copy.deepcopy(model.state_dict())
        output = compiled(input)
        output.square().mean().backward()
        model.load_state_dict(before)
        assert torch.equal(output, model(input)), batch


def test_the_graph_follows_the_optimizer():
    model, input = blocks(), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = compiled(input).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]
