"""Finding conv -> batch norm -> (+ residual) -> ReLU in a traced forward, to run it as one call.

A max pool that follows a chain at once, and alone, goes into its call.

A chain is taken only where nobody can tell the difference: every value inside it has one use; an in-place
operation in it (`out += identity`, `relu_`) writes to memory that nothing else holds; and where other
calls lie between its first and its last node, such as the shortcut's, they write to nothing that the part
which moves past them reads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from fastres import inplace, sites
from fastres.aliasing import Memory, used_once
from fastres.inlining import lines_of_block
from fastres.nodes import BATCH_NORMS, addends, is_relu, use_of
from fastres.trace import Trace, trace, traceable_parts
from fastres.watch import Guard, Reason, module_code, untouched_guard


@dataclass
class Chain:
    """Nodes that one call of `fastres.sites` replaces.

    Attributes:
        call: conv_bn_act, bn_act or add_act.
        conv, bn, act: the nodes that call these modules. `act` may call a function.
        add: the residual sum.
        input: what goes into the first module (for add_act, the sum's first addend).
        residual: what is added.
        identities: calls of nn.Identity that are left out.
        moved: whether other calls lie between its first and its last node.
        makers: of what the sum is written to in place, where that is no node of the chain.
    """

    call: Callable[..., torch.Tensor]
    input: fx.Node
    residual: fx.Node | None = None
    conv: fx.Node | None = None
    bn: fx.Node | None = None
    add: fx.Node | None = None
    act: fx.Node | None = None
    identities: tuple[fx.Node, ...] = ()
    moved: bool = False
    makers: frozenset[fx.Node] = frozenset()

    @property
    def nodes(self) -> list[fx.Node]:
        """In the order of the graph."""
        return sorted(filter(None, (self.conv, self.bn, self.add, self.act, *self.identities)))


def find_chains(traced: Trace) -> list[Chain]:
    """The chains of a traced forward that may be fused, none overlapping another."""
    memory = Memory(traced)
    nodes = list(traced.graph.nodes)
    # From the last to the first: of two batch norms that are added, the later one moves past fewer calls.
    # But the one of a shortcut comes after that of the branch, which makes a residual block.
    norms = [node for node in reversed(nodes) if traced.calls(node, *BATCH_NORMS)]
    norms.sort(key=lambda node: _ends_shortcut(traced, node))
    proposals = [_around_batch_norm(traced, node) for node in norms]
    proposals += [_around_sum(traced, node) for node in nodes if addends(node)]
    taken: set[fx.Node] = set()
    chains = []
    for proposal in proposals:
        for chain in proposal:
            if taken.isdisjoint(chain.nodes) and _unobservable(traced, chain, memory):
                taken.update(chain.nodes)
                chains.append(chain)
                break
    return chains


def _ends_shortcut(traced: Trace, bn: fx.Node) -> bool:
    """Whether what the batch norm gives is a residual block's projection."""
    add, identities = use_of(traced, bn)
    lines = lines_of_block(traced, add) if add is not None and addends(add) else None
    if lines is None:
        return False
    shortcut, _ = lines
    return shortcut.convolutions == 1 and shortcut.end is (identities[-1] if identities else bn)


def _around_batch_norm(traced: Trace, bn: fx.Node) -> Iterator[Chain]:
    """What a batch norm might be fused with, the most first."""
    conv = bn.args[0]
    if not (traced.calls(conv, nn.Conv2d) and used_once(conv) and traced.calls(bn, nn.BatchNorm2d)):
        conv = None
    # Without its convolution where that is shared with another chain.
    for first in (conv, bn) if conv else (bn,):
        modules = {"conv": conv if first is conv else None, "bn": bn, "input": first.args[0]}
        modules["call"] = sites.conv_bn_act if first is conv else sites.bn_act
        user, identities = use_of(traced, bn)
        if user is not None and addends(user):
            value = identities[-1] if identities else bn
            (residual,) = (addend for addend in addends(user) if addend is not value)
            modules_and_sum = modules | {"add": user, "residual": residual}
            act, more = use_of(traced, user)
            if act is not None and is_relu(traced, act):
                yield Chain(act=act, identities=(*identities, *more), **modules_and_sum)
            if first is conv:
                yield Chain(identities=tuple(identities), **modules_and_sum)
        elif user is not None and is_relu(traced, user):
            yield Chain(act=user, identities=tuple(identities), **modules)
        if first is conv:
            yield Chain(**modules)


def _around_sum(traced: Trace, add: fx.Node) -> Iterator[Chain]:
    act, identities = use_of(traced, add)
    if act is not None and is_relu(traced, act):
        first, second = addends(add)
        yield Chain(sites.add_act, first, second, add=add, act=act, identities=tuple(identities))


def _unobservable(traced: Trace, chain: Chain, memory: Memory) -> bool:
    """Whether one call at the end of the chain changes nothing but the time it takes.

    Sets `moved` and `makers`.
    """
    nodes = chain.nodes
    makers = [memory.makers(t) for t in memory.written(chain.add) if t not in nodes] if chain.add else []
    if None in makers:
        return False  # such as `x += ...` on an argument: the caller would see it
    chain.makers = frozenset().union(*makers)
    between = [
        node
        for node in traced.graph.nodes
        if nodes[0] < node < nodes[-1] and node not in nodes and node.op not in ("placeholder", "get_attr")
    ]
    chain.moved = bool(between)
    for node in between:
        if (
            chain.bn and node.op == "call_module"
        ):  # running statistics are updated in the order of the calls
            bn = traced.callee(chain.bn)
            if any(module is bn for module in traced.callee(node).modules()):
                return False
        for value in memory.written(node):
            if memory.overlap(value, chain.input):
                return False
            if chain.residual and chain.add < node and memory.overlap(value, chain.residual):
                return False
    return True


def makers_stay(traced: Trace, chains: list[Chain], inlined: frozenset[nn.Module]) -> list[Guard]:
    """Guards that what sums in place are written to is made as it was when the chains were found.

    A module that then comes to return its argument, or what a hook keeps, would have it written to.

    Raises:
        Untraceable: where one of the modules cannot be looked into.
    """
    guards: dict[str, Guard] = {}
    looked_into: set[nn.Module] = set()
    paths = {node.target for chain in chains for node in chain.makers}
    for path in sorted(paths):
        maker = traced.module.get_submodule(path)
        looked_into.update(traceable_parts(maker, training=traced.training))
        for name, part in maker.named_modules(prefix=path):
            needed = [untouched_guard(traced.module, name)]
            if isinstance(inplace := getattr(part, "inplace", None), bool):
                code = f"{module_code(name)}.inplace is {inplace}"
                needed.append(Guard(code, f"self.{name}.inplace is not what it was when fuse() ran"))
            guards.update((guard.code, guard) for guard in needed)
    if looked_into:
        deeper = trace(traced.module, training=traced.training, inline=inlined | looked_into)
        guards.update((guard.code, guard) for guard in deeper.guards)
    return list(guards.values())


def rewrite(traced: Trace, chains: list[Chain], inlined: frozenset[nn.Module]) -> list[Guard]:
    """Replace each chain of the graph by its call.

    Returns:
        The guards that the new graph needs besides those of the trace.
    """
    guards: dict[str, Guard] = {}
    replaced: dict[fx.Node, fx.Node] = {}

    def need_untouched(path: str) -> None:
        guard = untouched_guard(traced.module, path)
        guards.setdefault(guard.code, guard)

    def need_fusible(paths: list[str]) -> None:
        code = f"_why_not({', '.join(map(module_code, paths))}) is None"

        def why(module: nn.Module) -> Reason:
            return sites.why_not(*map(module.get_submodule, paths))

        guards.setdefault(code, Guard(code, why, (("_why_not", sites.why_not),)))

    for path, child in traced.module.named_modules():
        if child in inlined:
            need_untouched(path)
    for chain in chains:
        for node in chain.identities:
            need_untouched(node.target)
        if chain.moved and chain.bn:
            # Hooks would fire in another order; a module of another kind might write to its input.
            need_fusible([node.target for node in (chain.conv, chain.bn) if node])
        _replace(traced.graph, chain, replaced)
    for node in list(traced.graph.nodes):
        if traced.calls(node, nn.MaxPool2d) and node.args[0] in replaced.values():
            _take_pool(traced.graph, node, node.args[0])
    return list(guards.values())


def _take_pool(graph: fx.Graph, node: fx.Node, chain: fx.Node) -> None:
    """Leave a pool to the call of the chain before it; or let it keep less, where others use that too."""
    together = chain.target is sites.conv_bn_act and list(chain.users) == [node] and chain.next is node
    with graph.inserting_before(chain if together else node):
        pool = graph.create_node("get_attr", node.target)
    if together:
        chain.kwargs = {**chain.kwargs, "pool": pool}
    else:
        with graph.inserting_before(node):
            chain = graph.call_function(sites.max_pool, (pool, *node.args))
    node.replace_all_uses_with(chain)
    graph.erase_node(node)


def _replace(graph: fx.Graph, chain: Chain, replaced: dict[fx.Node, fx.Node]) -> None:
    """Put a call in the place of the chain; `replaced` maps the last nodes of chains to their calls."""
    *_, last = nodes = chain.nodes
    with graph.inserting_before(last):
        modules = [graph.create_node("get_attr", node.target) for node in (chain.conv, chain.bn) if node]
        act = chain.act if chain.act and chain.act.op == "call_module" else None
        act = act and graph.create_node("get_attr", act.target)
        values = [replaced.get(value, value) for value in (chain.input, chain.residual)]
        call, options = chain.call, {} if chain.call is sites.add_act else {"relu": chain.act is not None}
        if chain.add and chain.add.target in (operator.iadd, "add_"):
            call = getattr(inplace, call.__name__)
            if chain.bn:
                options["into_residual"] = addends(chain.add)[0] is chain.residual
        replaced[last] = graph.call_function(call, (*modules, act, *values), options)
    last.replace_all_uses_with(replaced[last])
    for node in reversed(nodes):
        graph.erase_node(node)
