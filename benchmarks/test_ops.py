"""Each fused op, stock PyTorch's composition of the same, and a copy: `pytest benchmarks/test_ops.py`.

For numbers to report use benchmarks/bandwidth.py, which runs the sides in turn: between one benchmark of
this suite and the next, the machine may have changed.
"""

import pytest
import torch
from cases import LARGE, cases, copies, input_of

DTYPES = [torch.float32, torch.bfloat16]
OPS = [(op, way) for op in ("bn_relu", "bn_add_relu", "add_relu") for way in ("forward", "backward")]


@pytest.fixture(params=LARGE, ids=lambda size: "x".join(map(str, size)))
def size(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def input(request, size, device):
    torch.manual_seed(0)
    return input_of(16, size, request.param, channels_last=True, device=device)


@pytest.mark.parametrize("side", ["fused", "stock"])
@pytest.mark.parametrize("op, direction", OPS)
def test_op(benchmark, timed, input, op, direction, side):
    case = next(c for c in cases(input) if (c.op, c.direction) == (op, direction))
    benchmark.group = f"{op} {direction} {tuple(input.shape)} {input.dtype}"
    benchmark.extra_info["bytes"] = case.passes * input.numel() * input.element_size()
    timed(getattr(case, side))


@pytest.mark.parametrize("into", ["fresh", "warm"])
def test_copy(benchmark, timed, input, into):
    benchmark.group = f"copy {tuple(input.shape)} {input.dtype}"
    benchmark.extra_info["bytes"] = 2 * input.numel() * input.element_size()
    timed(copies(input)[into])
