"""The CUDA kernels that take the maximum behind a batch norm, run on the host, against those without it.

These are held against float64 in test_emu_batch_norm.py; the maximum between them is PyTorch's.
"""

import emu
import pytest
import torch
from test_emu_batch_norm import DTYPES, FIRST_SEED, random, shifted_storage
from torch.nn import functional as F

from fastres.max_pool import MaxPool

# kernel, stride, padding, ceil_mode
POOLS = [
    MaxPool((3, 3), (2, 2), (1, 1), False),  # ResNet's
    MaxPool((3, 3), (1, 2), (0, 1), True),
    MaxPool((2, 2), (2, 2), (0, 0), True),
    MaxPool((5, 4), (2, 1), (2, 2), True),
    MaxPool((2, 3), (3, 4), (1, 1), False),  # a stride that skips pixels
]
# Vectors of 16 bytes fit, or do not; more channels than a tile's; several groups.
SHAPES = [(2, 64, 9, 12), (3, 5, 7, 5), (1, 520, 6, 7), (2, 8, 40, 36)]
CASES = [*((shape, True) for shape in SHAPES), (SHAPES[0], False)]


def max_pool(pool, values, **options):
    return F.max_pool2d(values, *pool[:3], 1, pool.ceil_mode, **options)


def pixels_of(index, output, pool, width):
    """Which pixel of the input each index means, counted as PyTorch does."""
    batch, channels, rows, columns = output.shape
    tap = index.view(batch, rows, columns, channels).permute(0, 3, 1, 2).long()
    row = torch.arange(rows)[:, None] * pool.stride[0] - pool.padding[0] + tap // pool.kernel_size[1]
    column = torch.arange(columns) * pool.stride[1] - pool.padding[1] + tap % pool.kernel_size[1]
    return row * width + column


def tensors(shape, dtype):
    generator = torch.Generator().manual_seed(FIRST_SEED)
    input = random(shape, dtype, torch.channels_last, generator)
    vectors = [torch.randn(shape[1], generator=generator) for _ in range(3)]
    return input, *vectors, torch.rand(shape[1], generator=generator) + 0.5


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize(
    "shape, aligned", [*((shape, True) for shape in SHAPES), (SHAPES[0], False)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_kernels_apart(shape, dtype, pool, training, aligned):
    input, weight, bias, mean, var = tensors(shape, dtype)
    input = input if aligned else shifted_storage(input)
    running, running_apart = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    output, index, *saved = emu.bn_max_pool(pool, input, weight, bias, *running, training=training)
    values, *saved_apart = emu.batch_norm(input, weight, bias, *running_apart, relu=True, training=training)
    for ours, apart in zip((*saved, *running), (*saved_apart, *running_apart), strict=True):
        assert torch.equal(ours, apart)
    expected, pixels = max_pool(pool, values, return_indices=True)
    assert torch.equal(output, expected)
    assert torch.equal(pixels_of(index, output, pool, shape[3]), pixels)

    generator = torch.Generator().manual_seed(FIRST_SEED + 1)
    grad = random(output.shape, dtype, torch.channels_last, generator)
    ours = emu.bn_max_pool_backward(pool, grad, input, index, weight, bias, *saved, training=training)
    # In float32 and then rounded once, as the kernel sums the gradients of windows that share a pixel.
    values = values.float().requires_grad_()
    (before,) = torch.autograd.grad(max_pool(pool, values), values, grad.float())
    before = before.to(dtype).contiguous(memory_format=torch.channels_last)
    apart = emu.batch_norm_backward(before, input, None, weight, bias, *saved, relu=True, training=training)
    for mine, theirs in zip(ours, (apart[0], *apart[2:]), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("pool", POOLS[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_infinities_and_nan(dtype, pool):
    shape = (2, 16, 8, 9)
    generator = torch.Generator().manual_seed(FIRST_SEED)
    input = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    input.flatten()[::7] = special[torch.randint(3, input.flatten()[::7].shape, generator=generator)]
    input = input.contiguous(memory_format=torch.channels_last)
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    output, index, *_ = emu.bn_max_pool(pool, input, None, None, mean, var, training=False, eps=0.0)
    expected, pixels = max_pool(pool, torch.relu(input), return_indices=True)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(pixels_of(index, output, pool, shape[3]), pixels)


def test_float64_is_refused():
    input = torch.randn(1, 4, 4, 4).double().contiguous(memory_format=torch.channels_last)
    statistics = torch.zeros(4), torch.ones(4)
    with pytest.raises(RuntimeError, match="no CUDA kernel takes float64"):
        emu.bn_max_pool(POOLS[0], input, None, None, *statistics, training=False)
