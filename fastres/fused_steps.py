"""Counting the steps of fused optimizers, which change weights without autograd's seeing it.

`torch.optim` with `fused=True` leaves the version of what it writes as it was.
"""

import functools

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    global _steps
    if any(group.get("fused") for group in optimizer.param_groups):
        _steps += 1


@functools.cache
def _count_from_now_on() -> None:
    register_optimizer_step_post_hook(_count)


def fused_steps() -> int:
    """So many there were since somebody first asked."""
    _count_from_now_on()
    return _steps
