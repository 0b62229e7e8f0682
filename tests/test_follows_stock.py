"""ResNet-50 trained in bf16: the loss follows stock PyTorch's as closely as roundings let any two runs do.

Roundings are sampled by training stock PyTorch from weights that differ by less than bf16 resolves: each is
multiplied by 1 +- 2^-9, so that the numbers of all layers round otherwise and nothing else is changed. What
counts is how far a run is from those of stock PyTorch on average.
"""

import contextlib
import math

import pytest
import torch
from torch.nn import functional as F

from fastres import models, sites

STEPS, BATCH, CLASSES = 30, 16, 10
SAMPLES = 4
# Of so many runs of one kind and another of the same kind, that one is every so often the farthest.
FACTOR = 1.25


def batches():
    """Images of which each class has a pattern of its own, under noise."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator)
    for _ in range(STEPS):
        labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        images = F.interpolate(patterns[labels], scale_factor=8) + torch.randn(
            BATCH, 3, 64, 64, generator=generator
        )
        yield images.to(memory_format=torch.channels_last), labels


def losses(stock: bool, seed: int | None) -> torch.Tensor:
    """Of each step; `seed` of the roundings, None: those of the weights as they are."""
    torch.manual_seed(0)
    model = models.resnet50(num_classes=CLASSES).to(memory_format=torch.channels_last)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter *= 1 + signs * 2**-9
    optimizer = torch.optim.SGD(model.parameters(), 2e-3, momentum=0.9, weight_decay=1e-4)
    values = []
    for images, labels in batches():
        with sites.stock() if stock else contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


def mean_distance(run: torch.Tensor, others: list[torch.Tensor]) -> float:
    return sum(distance(run, other) for other in others) / len(others)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="without AVX-512, PyTorch's convolutions in bf16 take minutes a step",
)
def test_the_loss_of_a_bf16_training():
    stock = [losses(True, seed) for seed in (None, *range(1, SAMPLES))]
    assert stock[0][-5:].mean() < 0.7 * math.log(CLASSES), (
        "it does not learn, so that there is nothing to follow"
    )
    far = [mean_distance(run, [other for other in stock if other is not run]) for run in stock]
    assert mean_distance(losses(False, None), stock) <= FACTOR * max(far), far
