"""Comparing a model with its fused self."""

import copy
import random

import torch

from fastres import recording
from fastres.fuse import is_fused

DTYPE = torch.float64


def close(actual, expected, what, scale=0.0):
    """To 1e-10 of the largest value; `scale` is the largest of what is computed together with it."""
    scale = max(scale, expected.abs().max().item())
    torch.testing.assert_close(
        actual, expected, rtol=1e-10, atol=1e-10 * scale, msg=lambda text: f"{what}: {text}"
    )


def logits(output):
    return getattr(output, "logits", output)


def step(model, *inputs):
    """Output, inputs after the call, gradients and buffers of one forward and backward; the seed is set."""
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    # Not leaves, so that a model may write to them.
    arguments = [x * 1 for x in inputs]
    torch.manual_seed(1)
    random.seed(1)
    model.zero_grad()
    output = logits(model(*arguments))
    if output.requires_grad:
        output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients |= {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return output.detach(), [a.detach() for a in arguments], gradients, dict(model.named_buffers())


def same(stock, fused, *inputs, modes=(True, False)):
    """Assert that both compute the same, in train and in eval."""
    for mode in modes:
        stock.train(mode)
        fused.train(mode)
        expected, actual = step(stock, *inputs), step(fused, *inputs)
        close(actual[0], expected[0], f"output, train({mode})")
        for i, (a, e) in enumerate(zip(actual[1], expected[1], strict=True)):
            close(a, e, f"input {i} after the call, train({mode})")
        for kind in (2, 3):
            assert actual[kind].keys() == expected[kind].keys()
            scale = max((g.abs().max().item() for g in expected[2].values() if g is not None), default=0.0)
            for name, value in expected[kind].items():
                if value is None:
                    assert actual[kind][name] is None, name
                else:
                    close(actual[kind][name], value, f"{name}, train({mode})", scale if kind == 2 else 0.0)


def images(channels=3, size=32, batch=2):
    return torch.randn(batch, channels, size, size, dtype=DTYPE)


def ran(model, *inputs):
    """The fused operations that a forward of the model (a copy of it: the statistics stay) runs."""
    model = copy.deepcopy(model)
    with recording.record() as records:
        model(*inputs)
    return [record.ran for record in records if record.fused]


def fused_names(model):
    return [name for name, module in model.named_modules() if is_fused(module)]
