"""Weights of convolutions in the order in which they are multiplied, kept for models that only infer."""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastres import _C

_pack = torch.ops.fastres.conv_pack_weight.default

# By weight: what it was packed into, by what that depends on.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def keep_packed(weight: Tensor) -> None:
    """From now on pack this weight once, and again only after a change that autograd sees."""
    _kept.setdefault(weight, {})


def is_kept(weight: Tensor) -> bool:
    return weight in _kept


def packed(weight: Tensor, input: Tensor, stride, dilation) -> Tensor | None:
    """`weight` as fastres::conv_bn_act_eval takes it for inputs like `input`; None if none is kept."""
    kept = _kept.get(weight)
    if kept is None:
        return None
    version = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    key = input.dtype, stride, dilation, _C.cpu_isa()
    found = kept.get(key)
    if found is None or found[0] != version:
        found = kept[key] = version, _pack(weight, input, stride, dilation)
    return found[1]
