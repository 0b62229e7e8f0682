"""Who shares memory with whom in a traced forward, and who writes to it.

It errs on one side only: memory that might be shared counts as shared. A module that is no layer of
torch.nn counts as writing to its arguments, whatever it does today: it may be another one tomorrow.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastres.trace import Trace, trace
from fastres.vet import Untraceable, differentiable
from fastres.watch import is_torch_layer, stock_class

# Their result is memory of its own, whatever their arguments are.
_FRESH_MODULES = (
    nn.Conv2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.Linear,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.Sigmoid,
)
_FRESH_FUNCTIONS = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.matmul,
    torch.add,
    torch.mul,
    torch.cat,
    torch.relu,
    torch.sigmoid,
    torch.conv2d,
    F.linear,
}
_WRITING_OPERATORS = {
    getattr(operator, name)
    for name in "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor setitem".split()
}


def used_once(node: fx.Node) -> bool:
    """Whether exactly one argument of exactly one node is this value."""
    uses: list[fx.Node] = []
    for user in node.users:
        fx.node.map_arg((user.args, user.kwargs), uses.append)
    return uses.count(node) == 1


class Memory:
    """The memory behind the values of one trace."""

    def __init__(self, traced: Trace, seen: dict[nn.Module, bool | None] | None = None) -> None:
        self.traced = traced
        self._returns_input = {} if seen is None else seen

    def roots(self, value: fx.Node) -> set[fx.Node]:
        """The values whose memory this one may be a part of."""
        sources = self._sources(value)
        return set().union(*map(self.roots, sources)) if sources else {value}

    def outside(self, value: fx.Node) -> bool:
        """Whether code outside this forward may hold the memory, as that of an argument or a parameter."""
        return any(self._sources(root) is None for root in self.roots(value))

    def overlap(self, value: fx.Node, other: fx.Node) -> bool:
        return bool(self.roots(value) & self.roots(other)) or (self.outside(value) and self.outside(other))

    def makers(self, value: fx.Node) -> set[fx.Node] | None:
        """The calls of modules that made the value, if its one user may write to it, or not, and nobody can
        tell; None if somebody can.
        """
        sources = self._sources(value)
        if sources is None or not used_once(value):
            return None
        found = {value} if value.op == "call_module" else set()
        for source in sources:
            before = self.makers(source)
            if before is None:
                return None
            found |= before
        return found

    def written(self, node: fx.Node) -> list[fx.Node]:
        """The values that the node may write to."""
        if node.op == "call_module":
            module = self.traced.callee(node)
            return (
                node.all_input_nodes
                if not is_torch_layer(module) or getattr(module, "inplace", False)
                else []
            )
        if node.op == "call_method":
            return node.all_input_nodes[:1] if node.target.endswith("_") else []
        if node.op != "call_function":
            return []
        if node.target in _WRITING_OPERATORS:
            return node.all_input_nodes[:1]
        options = (*node.args, *node.kwargs.values())  # among them `inplace`, or batch_norm's `training`
        if not _is_known(node.target) or "out" in node.kwargs or any(option is True for option in options):
            return node.all_input_nodes
        return node.all_input_nodes[:1] if node.target.__name__.endswith("_") else []

    def _sources(self, node: fx.Node) -> list[fx.Node] | None:
        """The node's arguments that its value may share memory with; None: it may share with anything."""
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "call_module":
            module = self.traced.callee(node)
            if stock_class(module) in _FRESH_MODULES or (
                stock_class(module) is nn.ReLU and not module.inplace
            ):
                return []
            if not is_torch_layer(module):
                returns_input = self._may_return_input(module)
                if not returns_input:
                    return None if returns_input is None else []
        elif node.op == "call_function":
            if node.target in _FRESH_FUNCTIONS and "out" not in node.kwargs:
                return []
            if not _is_known(node.target):
                return None
        return node.all_input_nodes

    def _may_return_input(self, module: nn.Module) -> bool | None:
        """None where the module's forward cannot be seen, or returns memory that it keeps."""
        if module not in self._returns_input:
            self._returns_input[module] = None  # holds while a module that contains itself is looked at
            try:
                inner = Memory(trace(module, training=self.traced.training), self._returns_input)
            except Untraceable:
                return None
            (output,) = (node for node in inner.traced.graph.nodes if node.op == "output")
            roots = set().union(*map(inner.roots, output.all_input_nodes))
            outside = {root for root in roots if inner.outside(root)}
            if all(root.op == "placeholder" for root in outside):
                self._returns_input[module] = bool(outside)
        return self._returns_input[module]


def _is_known(function: object) -> bool:
    return function in differentiable() or getattr(function, "__module__", None) in (
        "_operator",
        "builtins",
        "math",
    )
