"""What the nodes of a trace compute, and where their values go."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastres.aliasing import used_once
from fastres.trace import Trace

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_NO_TENSOR = (
    "size",
    "stride",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "item",
    "tolist",
    "element_size",
    "type",
)
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


def is_relu(traced: Trace, node: fx.Node) -> bool:
    """Whether the node is a ReLU of one value, as a module, a function or a method."""
    if node.op == "call_module":
        return traced.calls(node, nn.ReLU)
    if node.op not in ("call_function", "call_method") or node.target not in _RELUS:
        return False
    others = (*node.args[1:], *(value for key, value in node.kwargs.items() if key != "input"))
    return all(isinstance(value, bool) for value in others) and len(node.all_input_nodes) == 1


def addends(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors whose sum the node is, if it is one; in place, it is written to the first."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return None
    values = (*node.args, *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs))
    options = {key: value for key, value in node.kwargs.items() if key not in ("input", "other")}
    if options not in ({}, {"alpha": 1}) or len(values) != 2:
        return None
    return values if all(isinstance(value, fx.Node) and _is_tensor(value) for value in values) else None


def _is_tensor(node: fx.Node) -> bool:
    """Whether the value is a tensor for certain, and not for example a size."""
    if node.op == "call_function" and node.target.__module__ in ("builtins", "_operator"):
        return node.target not in (getattr, operator.getitem) and any(map(_is_tensor, node.all_input_nodes))
    return node.op != "call_method" or not node.target.startswith(_NO_TENSOR + ("is_", "get_"))


def use_of(traced: Trace, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The use of a value that is used once, and the calls of nn.Identity on the way to it."""
    identities: list[fx.Node] = []
    while used_once(node):
        user = next(iter(node.users))
        if not traced.calls(user, nn.Identity):
            return user, identities
        identities.append(user)
        node = user
    return None, identities


def source_of(traced: Trace, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The value behind calls of nn.Identity that are used once, and these calls."""
    identities: list[fx.Node] = []
    while traced.calls(node, nn.Identity) and used_once(node):
        identities.append(node)
        node = node.args[0]
    return node, identities
