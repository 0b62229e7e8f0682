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

from fastres import _C  # noqa: F401  registers the ops

_bn_act_again = torch.ops.fastres.bn_act_again.default
_enabled = True


def set_recompute(enabled: bool) -> bool:
    """Choose whether activations are made again (the default) or kept, from the next forward pass on.

    Returns:
        What was chosen before.
    """
    global _enabled
    before, _enabled = _enabled, enabled
    return before


# ---------------------------------------------------------------------------------------------------------
# nodes that make their output again: those of bn_act and of fastres.convolution

_node_types = set()


def register_node(function: type[torch.autograd.Function]) -> None:
    """Of a function that begins with keep_for_mask, and saves what make_again unpacks."""
    _node_types.add(function._backward_cls)


def node_of(output: Tensor):
    """The autograd node whose output this is, unchanged, if make_again can make it; else None."""
    node = output.grad_fn
    return node if type(node) in _node_types and output._version == 0 else None


def keep_for_mask(node, output: Tensor, residual: Tensor | None, relu: bool) -> Tensor | None:
    """Which tensor the node keeps for the gradient of its ReLU, none where its mask can be recomputed.

    With a residual the mask is taken from the output, which is kept, or made again from the residual where
    some other layer keeps that.
    """
    node.relu, node.has_residual = relu, residual is not None
    node.keeps_output = relu and node.has_residual and not _is_kept(residual)
    node.keeps_residual = relu and node.has_residual and not node.keeps_output
    node.unpacked = node.output_again = None
    return output if node.keeps_output else residual if node.keeps_residual else None


def _is_kept(residual: Tensor) -> bool:
    node = node_of(residual) if _enabled else None
    return node is not None and node.keeps_output


def unpack(node) -> tuple[Tensor | None, ...]:
    """What the node saved, taken once in a backward pass: activation checkpointing insists on it.

    The node itself asks, and the layer that uses its output. A later pass asks autograd anew, which checks
    that nothing was changed in the meantime.
    """
    task = torch._C._current_graph_task_id()
    if node.unpacked is None or node.unpacked[0] != task:
        node.unpacked, node.output_again = (task, node.saved_tensors), None
        if task != -1:  # the node itself may not be asked in this pass
            torch.autograd.Variable._execution_engine.queue_callback(lambda: forget(node))
    return node.unpacked[1]


def forget(node) -> None:
    node.unpacked = node.output_again = None


def make_again(node) -> Tensor:
    """The output of a node, from what the node saved."""
    input, residual, weight, bias, mean, rstd = unpack(node)[:6]
    if node.output_again is not None:
        return node.output_again
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        output = _bn_act_again(
            input, residual if node.keeps_residual else None, weight, bias, mean, rstd, node.relu
        )
    if node.keeps_residual:  # the node itself asks next, for its mask
        node.output_again = output
    return output


# ---------------------------------------------------------------------------------------------------------
# layers that do not keep their input


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
    if not (_enabled and torch.is_grad_enabled()) or torch.compiler.is_dynamo_compiling():
        return None
    if torch._C._len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None:
        return None
    node = node_of(input)
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
        return make_again(packed)
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
