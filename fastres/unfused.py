"""Sites of few values, at which nothing runs fused: remembered, and left to their modules at once.

Whether a site runs fused is asked at each call, which takes up to 60 us; a layer of few values takes little
more. What is remembered is about speed alone: the modules compute what the site would.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastres import cases, choice, kernels
from fastres.recording import Record, listening, telling

# By the id() of a convolution and of its batch norm, and by the kind of a call: whether they are left to
# the modules.
_known: dict[tuple[int, int], dict[tuple, bool]] = {}
_MOST_KINDS = 64  # of two modules


def kind_of(conv: nn.Module, bn: nn.Module, input: Tensor) -> tuple | None:
    """What a call is known by; None where it is to be asked as if nothing were known.

    Args:
        conv, bn: of the site.
        input: the site's, no subclass of Tensor.
    """
    if torch.compiler.is_dynamo_compiling() or listening() is not None:
        return None
    if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d:
        return None
    weight, bias = map(conv._parameters.get, ("weight", "bias"))
    if weight is None or (bn.training and bias is not None):  # which a site leaves out
        return None
    of_tensors = choice.kind_of(input), weight.dtype, weight.requires_grad
    return *of_tensors, bn.training, torch.is_grad_enabled(), choice.state()


def are_left(conv: nn.Module, bn: nn.Module, kind: tuple | None) -> bool | None:
    """Whether calls of this kind are left to the modules; None if that is not known."""
    if kind is None:
        return None
    kinds = _known.get((id(conv), id(bn)))
    return None if kinds is None else kinds.get(kind)


def learn(conv: nn.Module, bn: nn.Module, kind: tuple, op: Callable[..., Tensor], *arguments) -> Tensor:
    """op(*arguments), which tells whether the next call of this kind is left to the modules."""
    record = Record((conv, bn), "", True, None)
    with telling(record):
        output = op(*arguments)
    fused = record.fused or record.own_convolution
    few = output.is_cpu and output.numel() <= kernels.few_values
    _kinds(conv, bn)[kind] = few and not (fused or cases.is_traced() or cases.is_special(output))
    return output


def _kinds(conv: nn.Module, bn: nn.Module) -> dict[tuple, bool]:
    """Where to put what is learned of two modules, which ends with either."""
    key = id(conv), id(bn)
    kinds = _known.get(key)
    if kinds is None:
        kinds = _known[key] = {}
        for module in (conv, bn):
            weakref.finalize(module, _known.pop, key, None).atexit = False
    elif len(kinds) >= _MOST_KINDS:
        kinds.clear()
    return kinds
