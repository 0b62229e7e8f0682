"""Which containers among a module's children are traced together with its own forward.

A residual sum is fused with the batch norm before it, which may be the last layer of a container; and a
residual block is run as one call where all of its layers are in one trace, many of which are written as
containers of a convolution, a batch norm and a ReLU.
"""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

from torch import fx, nn

from fastres import sites
from fastres.aliasing import used_once
from fastres.nodes import BATCH_NORMS, addends, is_relu, source_of, use_of
from fastres.trace import Trace, check_class, trace
from fastres.vet import Untraceable
from fastres.watch import stock_class, untouched


def containers_to_inline(traced: Trace) -> frozenset[nn.Module]:
    """Containers of any depth that the trace calls, or that those call."""
    found: list[nn.Module] = []
    for add in traced.graph.nodes:
        user = use_of(traced, add)[0] if addends(add) else None
        if user is not None and is_relu(traced, user):
            found += _of_block(traced, add) or _around_last_batch_norm(traced, add)
    return frozenset(found)


# ---------------------------------------------------------------------------------------------------------
# those of a residual block


class Line(NamedTuple):
    """Convolutions, batch norms and ReLUs, each of which is used by the next alone.

    Attributes:
        begin: the value that the first one takes.
        end: the value that the last one gives.
        convolutions: how many there are.
        containers: the modules, of any depth, that call some of them.
    """

    begin: fx.Node
    end: fx.Node
    convolutions: int
    containers: list[nn.Module]


def line_to(traced: Trace, value: fx.Node) -> Line:
    """The longest line that ends in this value."""
    end, convolutions, containers = value, 0, []
    while used_once(value):
        if is_relu(traced, value) or traced.calls(value, nn.BatchNorm2d, nn.Identity):
            pass
        elif traced.calls(value, nn.Conv2d):
            convolutions += 1
        elif (inner := _line_through(traced, value)) is not None:
            convolutions += inner.convolutions
            containers += inner.containers
        else:
            break
        (value,) = value.all_input_nodes
    return Line(value, end, convolutions, containers)


def _line_through(traced: Trace, call: fx.Node) -> Line | None:
    """The line that is all of a container."""
    inner, result = _inside(traced, call)
    line = None if result is None else line_to(inner, result)
    if line is None or line.begin.op != "placeholder":
        return None
    return line._replace(containers=[traced.callee(call), *line.containers])


def lines_of_block(traced: Trace, add: fx.Node) -> tuple[Line, Line] | None:
    """Shortcut and branch of the residual block that ends in this sum, if one does."""
    lines = [line_to(traced, addend) for addend in addends(add)]
    shortcut, branch = sorted(lines, key=attrgetter("convolutions"))
    one = shortcut.begin is branch.begin and shortcut.convolutions <= 1 and branch.convolutions >= 2
    return (shortcut, branch) if one else None


def _of_block(traced: Trace, add: fx.Node) -> list[nn.Module]:
    """The containers in a residual block; its shortcut is none where a site calls that as it is."""
    lines = lines_of_block(traced, add)
    if lines is None:
        return []
    shortcut, branch = lines
    if traced.calls(shortcut.end) and sites.projection_of(traced.callee(shortcut.end)) is not None:
        return branch.containers
    return [*branch.containers, *shortcut.containers]


# ---------------------------------------------------------------------------------------------------------
# those around the batch norm before a sum


def _around_last_batch_norm(traced: Trace, add: fx.Node) -> list[nn.Module]:
    """Those that end in a batch norm, if neither addend does in this trace."""
    calls = sorted(filter(None, (_call_behind(traced, addend) for addend in addends(add))), reverse=True)
    if any(traced.calls(call, *BATCH_NORMS) for call in calls):
        return []
    return next(filter(None, (_path_to_batch_norm(traced, call) for call in calls)), [])


def _call_behind(traced: Trace, value: fx.Node) -> fx.Node | None:
    """The call that made a value which is used once, looked up through nn.Identity."""
    source, _ = source_of(traced, value)
    return source if used_once(source) else None


def _path_to_batch_norm(traced: Trace, call: fx.Node) -> list[nn.Module]:
    """The called container and those in it around its last batch norm; nothing if it ends otherwise."""
    inner, result = _inside(traced, call)
    result = None if result is None else _call_behind(inner, result)
    if result is None:
        return []
    if inner.calls(result, *BATCH_NORMS):
        return [traced.callee(call)]
    path = _path_to_batch_norm(inner, result)
    return [traced.callee(call), *path] if path else []


def _inside(traced: Trace, call: fx.Node) -> tuple[Trace, fx.Node] | tuple[None, None]:
    """The trace of a called container, and the value that it returns; None if that cannot be had."""
    if not traced.calls(call):
        return None, None
    container = traced.callee(call)
    try:
        check_class(container)
        inner = trace(container, training=traced.training)
    except Untraceable:
        return None, None
    (result,) = next(node for node in inner.graph.nodes if node.op == "output").args
    if not isinstance(result, fx.Node) or not untouched(container, stock_class(container)):
        return None, None
    return inner, result
