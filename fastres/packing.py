"""Weights of convolutions in the order in which they are multiplied, kept for models that only infer."""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastres import _C
from fastres.fused_steps import fused_steps

_pack = torch.ops.fastres.conv_pack_weight.default


class _Packed:
    """What one weight was packed into, by what that depends on besides its values."""

    def __init__(self) -> None:
        self._state: tuple[tuple, Tensor, dict[tuple, Tensor] | None] | None = None

    def of_now(self, weight: Tensor) -> dict[tuple, Tensor] | None:
        """What it was packed into since it last changed; None where other processes may change it."""
        now, state = (weight.data_ptr(), weight.dtype, weight._version, fused_steps()), self._state
        if state is None or state[0] != now:
            # The alias keeps the memory from being another weight's at the same address.
            self._state = state = now, weight.detach(), None if weight.is_shared() else {}
        return state[2]


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by weight


def keep_packed(weight: Tensor) -> None:
    """From now on pack this weight once, and again after a change that autograd or an optimizer makes."""
    _kept.setdefault(weight, _Packed())


def is_kept(weight: Tensor) -> bool:
    """Whether it is; never one that was made in inference mode, whose changes nobody counts."""
    return weight in _kept and not weight.is_inference()


def packed(weight: Tensor, input: Tensor, stride, dilation, groups: int) -> Tensor | None:
    """`weight` as fastres::conv_bn_act_eval takes it for inputs like `input`; None if none is kept."""
    if not is_kept(weight):
        return None
    by_key = _kept[weight].of_now(weight)
    if by_key is None:
        return None
    key = input.dtype, stride, dilation, groups, _C.cpu_isa()
    found = by_key.get(key)
    if found is None:
        found = by_key[key] = _pack(weight, input, stride, dilation, groups)
    return found
