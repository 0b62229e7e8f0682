"""Activations that are made again in the backward pass instead of being kept until then.

A convolution keeps its input for the gradient of its weights. Where that input is relu(batch_norm(y)), the
batch norm keeps y as well, and one pass over y makes the input again: half of what a layer keeps is spared.
The sum at the end of a residual block is made again from the sum before it, and that from the one before.
Reference: Rota Bulo, Porzi and Kontschieder 2018 (arXiv:1712.02616), section 3, "checkpointing".
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.graph import saved_tensors_hooks

from fastres import _C  # noqa: F401  registers the ops

bn_act_again = torch.ops.fastres.bn_act_again.default
_enabled = True
# Of a sum that is made again, each reads two tensors and writes one.
_MOST_PASSES = 6


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
    """Of a function that begins with keep_for_mask, and saves what output_of unpacks."""
    _node_types.add(function._backward_cls)


def keep_for_mask(
    node, output: Tensor, residual: Tensor | None, relu: bool, projection: slice | None = None
) -> Tensor | None:
    """Which tensor the node keeps for the gradient of its ReLU, none where its mask can be made again.

    With a residual the mask is taken from the output. That is made again where the residual can be had from
    the node whose output it is; or from the node itself, which saves a batch norm's input, weight, bias,
    mean and rstd in the places of `projection`.
    """
    node.relu, node.has_residual, node.around = relu, residual is not None, _hooks_around()
    node.projection = projection if _enabled else None
    node.residual_node = None if residual is None else _source_of_residual(residual)
    node.makes_output_again = not node.has_residual or bool(node.residual_node or node.projection)
    node.keeps_output, node.passes = relu and not node.makes_output_again, 0
    if not node.keeps_output:
        before = node.residual_node.passes if node.residual_node else 1 if node.projection else 0
        node.passes = 1 + before
    node.unpacked = node.output_again = None
    return output if node.keeps_output else None


def _source_of_residual(residual: Tensor):
    """The node whose output this is, if it is kept or to be made again in passes that are not too many."""
    node = _node_of(residual)
    can = node is not None and (node.keeps_output or node.makes_output_again)
    return node if can and node.passes < _MOST_PASSES else None


def _node_of(output: Tensor):
    """The autograd node of ours whose output this is, unchanged, if it can be asked for that later."""
    if not _enabled or torch.compiler.is_dynamo_compiling():
        return None
    if peek_interpreter_stack() is not None:
        return None
    if torch._C._len_torch_dispatch_stack() > 0 and type(output) is not FunctionalTensor:
        return None
    node = output.grad_fn
    if type(node) not in _node_types or output._version != 0:
        return None
    # A node from outside of a checkpointed region would have its own region computed again, and kept.
    return node if node.around == _hooks_around() else None


def unpack(node) -> tuple[Tensor | None, ...]:
    """What the node saved, taken once in a backward pass: activation checkpointing insists on it.

    The node itself asks, and the layer that uses its output. A later pass asks autograd anew, which checks
    that nothing was changed in the meantime.
    """
    return _unpacked(node).saved


class _Unpacked(NamedTuple):
    task: int  # of autograd
    saved: tuple[Tensor | None, ...]
    versions: list[int | None]


def _unpacked(node) -> _Unpacked:
    task, unpacked = torch._C._current_graph_task_id(), node.unpacked
    if unpacked is None or unpacked.task != task:
        saved = _saved_tensors(node)
        unpacked = _Unpacked(task, saved, [None if t is None else t._version for t in saved])
        node.unpacked, node.output_again = unpacked, None
        if task != -1:  # the node itself may not be asked in this pass
            torch.autograd.Variable._execution_engine.queue_callback(lambda: forget(node))
    return unpacked  # which another pass may forget meanwhile


def _saved_tensors(node) -> tuple[Tensor | None, ...]:
    try:
        return node.saved_tensors
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            f"{error} Or the gradients of an earlier part of the model were computed first, and what the "
            "input of this one is made again of is freed since: retain_graph=True keeps that, "
            "fastres.recompute.set_recompute(False) the input"
        ) from error


def forget(node) -> None:
    node.unpacked = node.output_again = None


def take(node) -> tuple[Tensor | None, ...]:
    """What the node saved, for its own gradient; in second place the output if its mask is from that."""
    _, saved, versions = _unpacked(node)
    for tensor, version in zip(saved, versions, strict=True):  # which a hook may have changed since
        if tensor is not None and tensor._version != version:
            _unmodified((tensor, version))
    if node.relu and node.has_residual:
        saved = saved[0], output_of(node), *saved[2:]
    forget(node)
    return saved


def output_of(node) -> Tensor:
    """The output of a node that keeps it or makes it again, from what it saved."""
    input, output, weight, bias, mean, rstd = unpack(node)[:6]
    if node.keeps_output:
        return output
    if (again := node.output_again) is not None:  # another pass may forget it meanwhile
        return again
    residual = None if node.residual_node is None else output_of(node.residual_node)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        if node.projection is not None:
            projected, *norm = unpack(node)[node.projection]
            residual = bn_act_again(projected, None, *norm, False)
        output = bn_act_again(input, residual, weight, bias, mean, rstd, node.relu)
    if node.relu and node.has_residual:  # the node itself asks next, for its mask
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
    """The node that makes this again, if it will not keep it."""
    node = _node_of(input) if torch.is_grad_enabled() else None
    if node is None or not node.makes_output_again:
        return None
    disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    return node if disabled is None else None


def _hooks_around():
    """What packs and unpacks saved tensors now, apart from _Pack; None: nothing does."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks[0].around if hooks is not None and type(hooks[0]) is _Pack else hooks


_STAND_IN = object()


class _Pack:
    """Keeps something instead of the input, and the rest as the hooks around would, or as it is."""

    def __init__(self, input: Tensor, instead) -> None:
        self.input, self.instead = input, instead
        self.around = _hooks_around()

    def __call__(self, tensor: Tensor):
        if tensor is self.input:
            return self.instead
        if self.around is not None:
            pack, unpack = self.around
            return unpack, pack(tensor)
        # An output of the node itself would keep it, and with it all before it, for ever.
        kept = tensor if tensor.grad_fn is None else tensor.detach()
        return _unmodified, (kept, tensor._version)


def _unpack(packed) -> Tensor:
    if packed is _STAND_IN:
        return torch.empty(0)
    if not isinstance(packed, tuple):
        return output_of(packed)
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
