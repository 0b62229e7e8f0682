"""Activations that are made again in the backward pass instead of being kept until then.

A convolution keeps its input for the gradient of its weights. Where that input is relu(batch_norm(y)), the
batch norm keeps y as well, and one pass over y makes the input again: half of what a layer keeps is spared.
Of the sums at the ends of residual blocks every second one is made again, from the sum before.
Reference: Rota Bulo, Porzi and Kontschieder 2018 (arXiv:1712.02616), section 3, "checkpointing".
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import saved_tensors_hooks

from fastres import kernels


def set_recompute(enabled: bool) -> bool:
    """Choose whether activations are made again (the default) or kept, from the next forward pass on.

    Returns:
        What was chosen before.
    """
    before, kernels.recomputes = kernels.recomputes, enabled
    return before


def call_without_keeping(function: Callable[..., Tensor], input: Tensor, *arguments) -> Tensor:
    """function(input, *arguments), whose backward makes `input` again where a batch norm of ours can."""
    node = _made_again_by(input)
    if node is None:
        return function(input, *arguments)
    return _call_keeping(node, input, function, input, *arguments)


def call_without_keeping_values(function: Callable[..., Tensor], input: Tensor, *arguments) -> Tensor:
    """function(node, input, *arguments), a node of ours, which makes `input` again itself.

    In `input`'s place the node saves a stand-in of no values, if `node` is one of ours; else it is None.
    """
    node = _made_again_by(input)
    if node is None:
        return function(None, input, *arguments)
    return _call_keeping(_STAND_IN, input, function, node, input, *arguments)


def _call_keeping(instead, input: Tensor, function: Callable[..., Tensor], *arguments) -> Tensor:
    """function(*arguments), whose autograd node keeps something `instead` of `input`."""
    pack = _Pack(input, instead)
    try:
        with saved_tensors_hooks(pack, _unpack):
            return function(*arguments)
    finally:
        pack.input = None


def _made_again_by(input: Tensor):
    if not (kernels.recomputes and torch.is_grad_enabled()) or torch.compiler.is_dynamo_compiling():
        return None
    if torch._C._len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None:
        return None
    node = kernels.node_of(input)
    return None if node is None or node.keeps_output else node


_STAND_IN = object()


class _Pack:
    """Keeps something instead of the input, and the rest as the hooks around would, or as it is."""

    def __init__(self, input: Tensor, instead) -> None:
        self.input, self.instead = input, instead
        self.around = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def __call__(self, tensor: Tensor):
        if tensor is self.input:
            return self.instead
        if self.around is not None:
            pack, unpack = self.around
            return unpack, pack(tensor)
        return _unmodified, (tensor, tensor._version)


def _unpack(packed) -> Tensor:
    if packed is _STAND_IN:
        return torch.empty(0)
    if not isinstance(packed, tuple):
        return kernels.make_again(packed)
    unpack, kept = packed
    return unpack(kept)


def _unmodified(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected "
            f"version {version} instead."
        )
    return tensor
