"""What only a GPU shows: streams, graphs, devices, and tensors of more than 2^31 elements."""

import contextlib

import pytest
import torch

from fastres import _C, ops
from fastres.kernels import CUDA
from fastres.max_pool import MaxPool, bn_relu_max_pool

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (CUDA and torch.cuda.is_available()), reason="no CUDA device, or no kernels"),
]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
POOL = MaxPool((3, 3), (2, 2), (1, 1), ceil_mode=False)


@pytest.fixture(params=[0, 1], ids=["two_launches", "on_chip"], autouse=True)
def each_way(request):
    _C.use_on_chip(request.param)
    yield
    _C.use_on_chip(0)


class Block:
    """Batch norms as in a residual block, with the tensors that they update."""

    def __init__(self, device="cuda", layout=torch.channels_last, dtype=torch.bfloat16):
        self.layout = layout
        shape = (8, 64, 28, 28)
        generator = torch.Generator().manual_seed(0)

        def randn(*size):
            return torch.randn(size, generator=generator).to(device)

        self.residual, self.grad = (
            randn(*shape).to(dtype).contiguous(memory_format=layout) for _ in range(2)
        )
        self.weight, self.bias, mean = (randn(shape[1]) for _ in range(3))
        self.running = mean, randn(shape[1]).abs() + 0.5

    def input(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(self.residual.shape, generator=generator)
        return values.to(self.residual).contiguous(memory_format=self.layout)

    def __call__(self, input):
        """All that is computed, and the running statistics as they are afterwards."""
        input = input.detach().requires_grad_()
        residual, weight, bias = (
            t.detach().requires_grad_() for t in (self.residual, self.weight, self.bias)
        )
        first = ops.bn_relu(input, *self.running, weight, bias, True)
        last = ops.add_relu(ops.bn_add_relu(first, residual, *self.running, weight, bias, True), residual)
        grads = torch.autograd.grad(last, (input, residual, weight, bias), self.grad)
        return [last.detach(), *grads, *(t.clone() for t in self.running)]


def assert_same_bits(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_streams_at_once(layout):
    expected = [Block(layout=layout)(Block(layout=layout).input(seed)) for seed in (1, 2)]
    blocks = [Block(layout=layout) for _ in range(2)]
    inputs = [block.input(seed) for block, seed in zip(blocks, (1, 2), strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for block, input, stream in zip(blocks, inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # so that what is enqueued elsewhere is done too early
            found.append(block(input.mul(1)))
    torch.cuda.synchronize()
    for ours, serial in zip(found, expected, strict=True):
        assert_same_bits(ours, serial)


@pytest.mark.parametrize("overlap", [False, True], ids=["in_turn", "overlapping"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_replay_equals_eager(layout, overlap):
    """On inputs other than the one that was captured."""
    captured, eager = Block(layout=layout), Block(layout=layout)
    input = captured.input(0)
    _C.overlap_launches(overlap)
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                captured(input)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = captured(input)
    finally:
        _C.overlap_launches(False)
    for _ in range(2):
        eager(eager.input(0))
    for seed in (1, 2):
        input.copy_(eager.input(seed))
        graph.replay()
        assert_same_bits(results, eager(eager.input(seed)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current():
    expected = [t.cpu() for t in Block("cuda:0")(Block("cuda:0").input(1))]
    other = Block("cuda:1")
    with torch.cuda.device(0):
        found = other(other.input(1))
        assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in found)
    assert_same_bits([t.cpu() for t in found], expected)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_are_all_there():
    block = Block()
    with deterministic():
        first = block(block.input(1))
        input = block.input(1).requires_grad_()
        pooled = bn_relu_max_pool(POOL, input, *block.running, block.weight, block.bias, True, 0.1, 1e-5)
        pooled.sum().backward()
    assert all(t.isfinite().all() for t in (*first, input.grad))


# A tensor, two outputs, a gradient and what autograd holds beside them, of bf16.
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 60e9, reason="takes 40 GB of GPU memory"
)
@pytest.mark.parametrize(
    "shape, layout",
    [((2**21 + 5, 1024, 1, 1), torch.channels_last), ((3, 8, 3, 2**25), torch.contiguous_format)],
    ids=["channels_last", "contiguous"],
)
def test_more_than_2_to_the_31_elements(shape, layout, device="cuda"):
    channels = shape[1]
    input = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=layout).normal_()
    mean, var = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.5
    weight = torch.randn(channels, device=device)

    def run(input, residual):
        input = input.detach().requires_grad_()
        output = ops.bn_add_relu(input, residual, mean, var, weight, None, False)
        return output.detach(), *torch.autograd.grad(output, input, residual)

    whole = run(input, input)
    end = input[-1:].contiguous(memory_format=layout)
    for ours, expected in zip(whole, run(end, end), strict=True):
        assert torch.equal(ours[-1:], expected)
    whole = ours = None
    found = torch.zeros_like(mean), torch.ones_like(var)
    with torch.no_grad():
        output = ops.bn_relu(input, *found, None, None, True, 1.0)
    exact = input.mean((0, 2, 3), dtype=torch.float64)
    torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=1e-6)
    expected = torch.relu(
        (end.double() - exact.view(1, -1, 1, 1)) / found[1].double().view(1, -1, 1, 1).sqrt()
    )
    torch.testing.assert_close(output[-1:].double(), expected, rtol=2**-7, atol=1e-3)
