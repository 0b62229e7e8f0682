"""Sites of few values, at which nothing runs fused: remembered, and left to their modules at once.

Whether a site runs fused is asked at each call, which takes some 60 us; a layer of few values takes little
more. What is remembered is about speed alone: what the modules compute is right in any case.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastres import cases, kernels
from fastres.recording import Record, listening, telling

# By a module's id() and the kind of a call: whether such calls are left to the modules.
_known: dict[int, dict[tuple, bool]] = {}
_MOST_KINDS = 64  # of a module's


def kind_of(module: nn.Module, input: Tensor) -> tuple | None:
    """What a call is known by; None where it is to be asked as if nothing were known.

    Args:
        module: one of the site's, by which the others are known.
        input: the site's, no subclass of Tensor.
    """
    if listening() is not None or torch.compiler.is_dynamo_compiling():
        return None
    return input.shape, input.stride(), input.dtype, module.training, torch.is_grad_enabled()


def are_left(module: nn.Module, kind: tuple | None) -> bool | None:
    """Whether calls of this kind are left to the modules; None if that is not known."""
    kinds = _known.get(id(module))
    return None if kinds is None else kinds.get(kind)


def learn(module: nn.Module, kind: tuple, op: Callable[..., Tensor], *arguments) -> Tensor:
    """op(*arguments), which tells whether the next call of this kind is left to the modules."""
    record = Record((module,), "", True, None)
    with telling(record):
        output = op(*arguments)
    fused = record.fused or record.own_convolution
    few = output.is_cpu and output.numel() <= kernels.few_values
    kinds = _known.get(id(module))
    if kinds is None:
        kinds = _known[id(module)] = {}
        weakref.finalize(module, _known.pop, id(module), None).atexit = False
    elif len(kinds) >= _MOST_KINDS:
        kinds.clear()
    kinds[kind] = few and not (fused or cases.is_traced() or cases.is_special(output))
    return output
