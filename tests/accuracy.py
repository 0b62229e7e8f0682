"""How close is close enough: at most 1.5 times as far from float64 as stock PyTorch in the same dtype."""

import torch
from torch import Tensor

FACTOR = 1.5


def rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def _errors(value: Tensor, reference: Tensor) -> tuple[float, float]:
    difference = (value.detach().double() - reference.detach()).abs()
    return rms(difference), difference.max().item()


def assert_as_accurate(name: str, fused: Tensor, stock: Tensor, reference: Tensor) -> None:
    """Root mean square and largest error of `fused` within FACTOR of those of `stock`.

    Where stock is closer to the reference than its dtype can show, what counts is the error of the
    reference itself rounded to that dtype: no result can be expected to be closer.
    """
    assert fused.dtype == stock.dtype, f"{name}: dtype {fused.dtype}, stock's is {stock.dtype}"
    assert fused.shape == stock.shape, (
        f"{name}: shape {tuple(fused.shape)}, stock's is {tuple(stock.shape)}"
    )
    assert torch.isfinite(fused).all(), f"{name}: not finite (seed {torch.initial_seed()})"
    rounded = reference.detach().to(stock.dtype)
    # Half a unit in the last place of the largest value: a lone element's rounding may go either way.
    last_place = torch.finfo(stock.dtype).eps * reference.detach().abs().max().item() / 2
    for kind, ours, theirs, floor, slack in zip(
        ("root mean square", "largest"),
        _errors(fused, reference),
        _errors(stock, reference),
        _errors(rounded, reference),
        (0.0, last_place),
        strict=True,
    ):
        bound = FACTOR * max(theirs, floor) + slack
        assert ours <= bound, (
            f"{name}: {kind} error {ours:.3e}, stock's {theirs:.3e}, bound {bound:.3e} "
            f"(seed {torch.initial_seed()})"
        )
