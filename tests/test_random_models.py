"""Models drawn at random give what stock gives: outputs, gradients, statistics, or its error."""

import copy

import pytest
import torch
from layers import channels_last
from random_models import CHANNELS, random_model

import fastres
from fastres import recording

SEEDS = range(80)
# Where a value before a ReLU is a rounding error away from 0, its gradient is anyone's.
_TRIES = 3


def results(model, seed, dtype=torch.float32):
    """Of two steps in training, between which weights change, one in evaluation, one partly frozen."""
    draw = torch.Generator().manual_seed(seed)
    found = []

    def step(frozen=()):
        for parameter in frozen:
            parameter.requires_grad_(False)
        leaf = channels_last(torch.randn(2, CHANNELS, 6, 5, generator=draw)).to(dtype).requires_grad_()
        output = model(leaf.clone())
        loss = (output * torch.arange(output.numel()).view_as(output).cos()).sum()
        wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
        if loss.requires_grad:
            found.extend(torch.autograd.grad(loss, wanted, allow_unused=True))
        found.extend([output.detach(), *(buffer.clone() for buffer in model.buffers())])

    try:
        step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.1
        step()
        step(frozen=list(model.parameters())[::3])
        model.eval()
        step()
        with torch.no_grad():
            found.append(model(channels_last(torch.randn(1, CHANNELS, 7, 5, generator=draw)).to(dtype)))
    except RuntimeError as error:
        found.append(type(error))
    return found


def agree(fused, stock, exact):
    assert len(fused) == len(stock)
    for ours, theirs, true in zip(fused, stock, exact, strict=True):
        if not isinstance(theirs, torch.Tensor):
            assert ours == theirs
            continue
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        bound = 8 * (theirs - true).abs().max() + 2e-5 * true.abs().max() + 1e-6
        if not (ours - true).abs().max() <= bound:
            return False
    return True


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_model_does_what_it_did(seed, one_thread):
    model = random_model(seed)
    print(model.source)  # of one that fails

    def once(data):
        fused = fastres.fuse(copy.deepcopy(model))
        exact = copy.deepcopy(model).double()
        return agree(
            results(fused, data), results(copy.deepcopy(model), data), results(exact, data, torch.float64)
        )

    assert any(once(seed + 1000 * i) for i in range(_TRIES))


@pytest.mark.parametrize("seed", SEEDS[::2])
def test_a_random_model_in_inference(seed, one_thread):
    model = random_model(seed).eval()
    print(model.source)
    optimized = fastres.optimize_for_inference(copy.deepcopy(model))

    def outputs(model, dtype):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # the second call of a kind may run in sequences
            return [
                model(channels_last(torch.randn(2, CHANNELS, 6, 5, generator=draw)).to(dtype))
                for _ in range(3)
            ]

    stock, exact = outputs(model, torch.float32), outputs(copy.deepcopy(model).double(), torch.float64)
    assert agree(outputs(optimized, torch.float32), stock, exact)


def test_most_of_their_layers_are_fused():
    ran = []
    for seed in SEEDS:
        model = fastres.fuse(random_model(seed))
        with recording.record() as records, torch.no_grad():
            model(channels_last(torch.randn(2, CHANNELS, 6, 5)))
        ran += [record.ran for record in records if record.fused]
    assert len(ran) > 2 * len(SEEDS)
    assert {"conv_bn", "conv_bn_relu", "conv_bn_add_relu", "conv_bn_add"} <= set(ran)
