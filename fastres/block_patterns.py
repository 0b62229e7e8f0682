"""Finding residual blocks among the calls of a rewritten forward, to run each as one call.

A block is a run of `sites.conv_bn_act`, the last of which adds what the first one took, as it is or as a
shortcut gives it: any module, or a convolution and a batch norm. Nothing is moved: but for the shortcut's
call and those of nn.Identity, which are left out, no other lies between them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fastres import inplace, sites
from fastres.aliasing import used_once
from fastres.nodes import source_of
from fastres.trace import Trace
from fastres.watch import Guard, untouched_guard


@dataclass
class _Block:
    """Nodes that one call of `residual_block` replaces.

    Attributes:
        layers: the calls of sites, in order.
        input: what goes into the block.
        shortcut: the call of the shortcut, of a module or a site; None for the identity.
        identities: calls of nn.Identity between them.
    """

    layers: list[fx.Node]
    input: fx.Node
    shortcut: fx.Node | None
    identities: list[fx.Node]

    @property
    def nodes(self) -> list[fx.Node]:
        """In the order of the graph."""
        return sorted(filter(None, (*self.layers, self.shortcut, *self.identities)))


def join_blocks(traced: Trace) -> list[Guard]:
    """Replace the calls of each residual block of a rewritten graph by one.

    Returns:
        The guards that the graph needs then, of calls of nn.Identity that are left out.
    """
    guards = []
    for node in reversed(list(traced.graph.nodes)):
        block = _block_that_ends_in(traced, node)
        if block is not None:
            guards += [untouched_guard(traced.module, identity.target) for identity in block.identities]
            _replace(traced.graph, block)
    return guards


def _block_that_ends_in(traced: Trace, node: fx.Node) -> _Block | None:
    if node.target not in (sites.conv_bn_act, inplace.conv_bn_act) or not _is_plain(node, adds=True):
        return None
    identities: list[fx.Node] = []

    def before(value: fx.Node) -> fx.Node:
        value, calls = source_of(traced, value)
        identities.extend(calls)
        return value

    input, residual = map(before, node.args[3:])
    shortcut = residual if _is_shortcut(traced, residual) else None
    source = residual if shortcut is None else before(_input_of(shortcut))
    block = _Block([node], source, shortcut, identities)
    while input is not source:
        if not (input.target is sites.conv_bn_act and used_once(input) and _is_plain(input, adds=False)):
            return None
        block.layers.insert(0, input)
        input = before(_input_of(input))
    fits = len(block.layers) > 1 and _follow_each_other(block.nodes) and _shortcut_is_at_an_end(block)
    return block if fits else None


def _is_plain(call: fx.Node, adds: bool, relu: bool = True) -> bool:
    """Whether a site ends in a ReLU or not and in no pool, and has a sum or not."""
    ends = call.kwargs["relu"] == relu and "pool" not in call.kwargs
    return ends and (call.args[4] is not None) == adds


def _is_shortcut(traced: Trace, value: fx.Node) -> bool:
    layer = value.target is sites.conv_bn_act and _is_plain(value, adds=False, relu=False)
    return used_once(value) and (layer or traced.calls(value))


def _input_of(call: fx.Node) -> fx.Node:
    return call.args[3 if call.target is sites.conv_bn_act else 0]


def _follow_each_other(nodes: list[fx.Node]) -> bool:
    between = nodes[0].next
    for node in nodes[1:]:
        while between.op == "get_attr":
            between = between.next
        if between is not node:
            return False
        between = between.next
    return True


def _shortcut_is_at_an_end(block: _Block) -> bool:
    """Whether the shortcut's call comes before the branch, or just before its last layer."""
    calls = [node for node in block.nodes if node not in block.identities]
    return block.shortcut is None or block.shortcut in (calls[0], calls[-2])


def _replace(graph: fx.Graph, block: _Block) -> None:
    *_, last = nodes = block.nodes
    branch = [layer.args[:3] for layer in block.layers]
    options = {"shortcut_first": block.shortcut is not None and nodes[0] is block.shortcut}
    options |= {key: value for key, value in last.kwargs.items() if key == "into_residual"}
    call = (inplace if last.target is inplace.conv_bn_act else sites).residual_block
    with graph.inserting_before(last):
        if block.shortcut is None or block.shortcut.target is sites.conv_bn_act:
            shortcut = block.shortcut and block.shortcut.args[:2]
        else:
            shortcut = graph.create_node("get_attr", block.shortcut.target)
        joined = graph.call_function(call, (branch, shortcut, block.input), options)
    last.replace_all_uses_with(joined)
    for node in reversed(nodes):
        graph.erase_node(node)
