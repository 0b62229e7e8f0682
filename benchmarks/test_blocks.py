"""Each kind of residual block, forward and backward, fused and stock: `pytest benchmarks/test_blocks.py`.

The sides take turns on fastres's own clock, which `fastres bench` and `fastres profile` measure with too;
pytest-benchmark is told these times, so that its table and its JSON hold the same numbers.
"""

import pytest
import torch

from fastres import nn, recording, sites
from fastres.timing import interleave, ratios

# Block, channels of the input, planes, stride and side of the input: one of each stage of ResNet-18 and 50.
BLOCKS = [
    (nn.BasicBlock, 64, 64, 1, 56),
    (nn.BasicBlock, 64, 128, 2, 56),
    (nn.BasicBlock, 256, 256, 1, 14),
    (nn.Bottleneck, 256, 64, 1, 56),
    (nn.Bottleneck, 256, 128, 2, 56),
    (nn.Bottleneck, 1024, 256, 1, 14),
    (nn.Bottleneck, 2048, 512, 1, 7),
]
BATCH = {"cpu": 16, "cuda": 128}
ROUNDS = 9


class Replay:
    """A clock that moves by what was measured before, from one call of `step` to the next."""

    def __init__(self) -> None:
        self._now, self._seconds = 0.0, iter(())

    def __call__(self) -> float:
        return self._now

    def of(self, seconds: list[float]):
        self._seconds = iter(seconds)
        return self.step

    def step(self) -> None:
        self._now += next(self._seconds)


clock = Replay()


def measured(block: type, inplanes: int, planes: int, stride: int, side: int, dtype, device):
    torch.manual_seed(0)
    outplanes = planes * block.expansion
    shortcut = None
    if stride != 1 or inplanes != outplanes:
        shortcut = nn.ConvBn2d(inplanes, outplanes, 1, stride, bias=False)
    layout = {"memory_format": torch.channels_last}
    model = block(inplanes, planes, stride, shortcut).to(device, **layout)
    input = torch.randn(BATCH[device.type], inplanes, side, side, device=device).to(dtype, **layout)
    input.requires_grad_()
    grad = None

    def fused():
        nonlocal grad
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(input)
        grad = torch.randn_like(output) if grad is None else grad
        torch.autograd.backward(output, grad, inputs=[input, *model.parameters()])

    def stock():
        with sites.stock():
            fused()

    with recording.record() as records:
        fused()
    assert records and all(record.fused for record in records)
    stock()
    return interleave({"fused": fused, "stock": stock}, ROUNDS, device)


@pytest.fixture(scope="module")
def times(device):
    """Measured once for both sides of a block."""
    cache = {}

    def of(case, dtype):
        if (case, dtype) not in cache:
            cache[case, dtype] = measured(*case, dtype, device)
        return cache[case, dtype]

    return of


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("side", ["fused", "stock"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: "-".join([case[0].__name__, *map(str, case[1:])]))
def test_block(benchmark, times, case, dtype, side):
    seconds = times(case, dtype)
    benchmark.group = f"{case[0].__name__} {case[1:]} {str(dtype)[6:]}"
    benchmark.extra_info["stock / fused"] = ratios(seconds, "stock", "fused")
    benchmark.pedantic(clock.of(seconds[side]), rounds=ROUNDS)
