"""A model's forward in inference with its convolutions in sequences, each of which is one call.

Between two convolutions Python decides what runs, which takes longer than a convolution of few pixels. Here
the whole forward is traced, run once to see which convolutions are ours for an input of that kind, and
written anew with every run of them as one op. That holds until something about the model changes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import operator
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastres import _C, cases, inplace, recording, sites
from fastres.convolution import pair
from fastres.fuse import Fused, set_class, subclass
from fastres.generated import body_of, compiled
from fastres.packing import is_kept, packed
from fastres.patterns import find_chains, rewrite
from fastres.snapshot import Snapshot, can_be_taken_of
from fastres.trace import trace, traceable_parts
from fastres.vet import Untraceable
from fastres.watch import is_torch_layer, stock_class, untouched

_run = torch.ops.fastres.conv_bn_act_sequence.default
_SITES = (sites.conv_bn_act, inplace.conv_bn_act)
_MOST_KINDS = 8  # of inputs, whose forwards are kept; then a kind gets one when it comes again
_MOST_CHANGES = 16  # of the model from call to call, after which it is left alone

Forward = Callable[[nn.Module, Tensor], Any]


def run_in_sequences(model: nn.Module) -> None:
    """Have the model's forward run in sequences, or its parts' where it cannot be traced itself.

    As in fuse(), a module gets a subclass of its class, and the forward that it had runs wherever the other
    does not hold.
    """
    forwards = None if is_torch_layer(model) else Forwards(model)
    if forwards is not None and forwards.graph is not None:
        set_class(model, _class_in_sequences(model, forwards))
        forwards.watch()
    else:
        for child in model.children():
            run_in_sequences(child)


def _class_in_sequences(module: nn.Module, forwards: Forwards) -> type[nn.Module]:
    base = type(module).__dict__.get("_without_sequences", type(module))

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Another one than the module has a copy of its attributes, and this class.
        if not torch.compiler.is_dynamo_compiling() and self is forwards.model and not kwargs:
            run = forwards.of(*args) if len(args) == 1 else None
            if run is not None:
                return run(self, *args)
        return base.forward(self, *args, **kwargs)

    variants, defaults = getattr(base, "_variants", [[]]), getattr(base, "_defaults", {})
    return subclass(
        Fused,
        base,
        {"forward": forward, "_variants": variants, "_defaults": defaults, "_without_sequences": base},
    )


class Forwards:
    """A model's forward in sequences, for some kinds of inputs; each is made when its kind comes.

    Args:
        model: any module.

    Attributes:
        graph: its forward down to the layers of torch.nn, with what is fused there; None where that cannot
            be traced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graph = _whole_graph(model)
        self._by_kind: dict[tuple[Any, ...], Forward | None] = {}
        self._met: dict[tuple[Any, ...], None] = {}  # other kinds, the latest ones
        self._changes = 0
        self._at_work = threading.Lock()

    def watch(self) -> None:
        """The model is from now on not to change."""
        self._snapshot, self._by_kind = None, {}
        if not can_be_taken_of(self.model):
            return
        weights = [module.weight for module in self.model.modules() if isinstance(module, nn.Conv2d)]
        cast = [tensor for module in self.model.modules() for tensor in _to_cast(module)]
        self._snapshot = Snapshot(self.model, [*filter(is_kept, weights), *cast])

    def of(self, input: Any) -> Forward | None:
        """What runs instead of the model's forward now; None if that does."""
        if type(input) is not Tensor or self.model.training or self._changes > _MOST_CHANGES:
            return None
        if cases.is_special(input) or cases.is_traced() or sites.watched():
            return None
        if not self._at_work.acquire(blocking=False):  # in another thread
            return None
        try:
            return self._of(input)
        finally:
            self._at_work.release()

    def _of(self, input: Tensor) -> Forward | None:
        if self._snapshot is None or not self._snapshot.holds():
            # The next call takes the trouble, if by then the model is still what it is now.
            self._changes += 1
            if self._snapshot is None or not self._snapshot.structure_holds():
                self.graph = None
            self.watch()
            return None
        self._changes = 0
        if torch.is_grad_enabled() and (input.requires_grad or self._snapshot.requires_grad()):
            return None
        kind = (
            input.shape,
            input.stride(),
            input.dtype,
            input.device,
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_num_threads(),
            _C.cpu_isa(),
        )
        if kind not in self._by_kind:
            if len(self._by_kind) == _MOST_KINDS:
                if kind not in self._met:
                    _keep_latest(self._met, kind, None)
                    return None
                del self._met[kind]
            self.graph = self.graph or _whole_graph(self.model)
            if self.graph is not None:
                made, output = _made_for(self.model, self.graph, input)
                _keep_latest(self._by_kind, kind, made)
                return lambda model, input: output  # what runs twice may draw or count twice
            _keep_latest(self._by_kind, kind, None)
        return self._by_kind[kind]


# ---------------------------------------------------------------------------------------------------------
# Making a forward
# ---------------------------------------------------------------------------------------------------------


def _made_for(model: nn.Module, whole: fx.Graph, input: Tensor) -> tuple[Forward | None, Any]:
    """A forward for inputs like this one, None where no convolution of ours runs; and what it gives."""
    graph = copy.deepcopy(whole)
    with recording.record() as records:
        watching = _Watching(model, graph, records)
        output = watching.run(input)
    if not watching.steps:
        return None, output
    _put_sequences(graph, watching.steps)
    if torch.is_autocast_enabled("cpu"):
        _put_casts(graph, model, torch.get_autocast_dtype("cpu"))
    body, names = body_of(graph, model)
    return compiled(body, dict(names), stock_class(model)), output


def _keep_latest(kinds: dict, kind: tuple[Any, ...], value: Any) -> None:
    if len(kinds) == _MOST_KINDS:
        kinds.pop(next(iter(kinds)))
    kinds[kind] = value


def _whole_graph(model: nn.Module) -> fx.Graph | None:
    inlined = frozenset(traceable_parts(model, training=False)) - {model}
    try:
        whole = trace(model, training=False, inline=inlined)
    except Untraceable:
        return None
    chains = find_chains(whole)
    guards = rewrite(whole, chains, inlined)
    inputs = [node for node in whole.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or not any(chain.conv for chain in chains):
        return None
    if not all(guard.holds(model) for guard in (*whole.guards, *guards)):
        return None
    for node in whole.graph.nodes:
        if whole.calls(node, nn.Identity) and untouched(whole.callee(node), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            whole.graph.erase_node(node)
    return whole.graph


class _Step(NamedTuple):
    """A convolution that ran by our kernels, with what follows it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    relu: bool
    geometry: tuple[tuple[int, int], ...]  # stride, padding, dilation
    packed: Tensor
    dtype: torch.dtype
    record: recording.Record


class _Watching(fx.Interpreter):
    """Runs a graph that fuse() made, and notes which of its calls a sequence can make."""

    def __init__(self, model: nn.Module, graph: fx.Graph, records: list[recording.Record]) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False  # errors are the model's own
        self.steps: dict[fx.Node, _Step] = {}
        self._records = records

    def run_node(self, node: fx.Node) -> Any:
        before = len(self._records)
        output = super().run_node(node)
        if node.target in _SITES and len(self._records) == before + 1:
            step = self._step(node, self._records[before], output)
            if step is not None:
                self.steps[node] = step
        return output

    def _step(self, node: fx.Node, record: recording.Record, output: Tensor) -> _Step | None:
        (conv, bn, *_), _ = self.fetch_args_kwargs_from_env(node)
        relu = node.kwargs["relu"]
        whole = "conv_bn" + ("_add" if len(_values(node)) > 1 else "") + ("_relu" if relu else "")
        if not (record.fused and record.own_convolution and record.ran == whole) or "pool" in node.kwargs:
            return None
        if bn.training or bn.running_mean is None or bn.running_var is None:
            return None
        geometry = pair(conv.stride, 1), pair(conv.padding, 0), pair(conv.dilation, 1)
        kept = packed(conv.weight, output, geometry[0], geometry[2], conv.groups)
        return None if kept is None else _Step(conv, bn, relu, geometry, kept, output.dtype, record)


def _values(node: fx.Node) -> list[fx.Node]:
    """Of a site: its input, and what is added."""
    return [value for value in node.args[3:] if value is not None]


def _put_sequences(graph: fx.Graph, steps: dict[fx.Node, _Step]) -> None:
    """Replace the calls of steps that follow each other by one call."""
    for number, nodes in enumerate(_sequences(graph, steps)):
        inputs = list(dict.fromkeys(v for node in nodes for v in _values(node) if v not in nodes))
        outputs = [node for node in nodes if node.users.keys() - set(nodes)]
        call = _sequence(nodes, [steps[node] for node in nodes], inputs, outputs)
        call.__name__ = f"sequence_{number}"
        with graph.inserting_after(nodes[-1]):
            results = graph.call_function(call, tuple(inputs))
        with graph.inserting_after(results):
            for i, node in enumerate(outputs):
                node.replace_all_uses_with(graph.call_function(operator.getitem, (results, i)))
        for node in reversed(nodes):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _put_casts(graph: fx.Graph, model: nn.Module, dtype: torch.dtype) -> None:
    """Have linear layers take their parameters as autocast would cast them at each call."""
    for number, node in enumerate(list(graph.nodes)):
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if module is None or not _to_cast(module) or len(node.args) != 1 or node.kwargs:
            continue
        call = _cast_linear(module, dtype)
        call.__name__ = f"linear_{number}"
        with graph.inserting_after(node):
            node.replace_all_uses_with(graph.call_function(call, node.args))
        graph.erase_node(node)


def _to_cast(module: nn.Module) -> list[Tensor]:
    """The parameters of a linear layer, if autocast casts them and their changes are counted."""
    if not untouched(module, nn.Linear):
        return []
    parameters = [tensor for tensor in (module.weight, module.bias) if tensor is not None]
    fit = all(
        type(t) is nn.Parameter and t.dtype == torch.float32 and not (t.is_inference() or t.is_shared())
        for t in parameters
    )
    return parameters if fit else []


def _cast_linear(module: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        weight = module.weight.to(dtype)
        bias = None if module.bias is None else module.bias.to(dtype)

    def linear(input: Tensor) -> Tensor:
        listener = recording.listening_to_sequences()
        if listener is None:
            return F.linear(input, weight, bias)
        begin = time.perf_counter()
        output = F.linear(input, weight, bias)
        record = recording.Record((module,), type(module).__name__, fused=False, reason=None)
        listener([record], [begin, begin, time.perf_counter()])
        return output

    return linear


def _sequences(graph: fx.Graph, steps: dict[fx.Node, _Step]) -> list[list[fx.Node]]:
    calls = [node for node in graph.nodes if node.op != "get_attr"]
    runs = itertools.groupby(calls, key=lambda node: node in steps and steps[node].dtype)
    return [list(nodes) for dtype, nodes in runs if dtype]


def _sequence(
    nodes: list[fx.Node], steps: list[_Step], inputs: list[fx.Node], outputs: list[fx.Node]
) -> Callable[..., list[Tensor]]:
    """One call of these steps."""
    values, dtype = [*inputs, *nodes], steps[0].dtype
    rows, tensors, eps = [], [], []
    for node, step in zip(nodes, steps, strict=True):
        conv, bn = step.conv, step.bn
        input, residual = [*map(values.index, _values(node)), -1][:2]
        rows += [input, residual, *itertools.chain.from_iterable(step.geometry), int(step.relu)]
        tensors += [conv.weight, step.packed, conv.bias]
        tensors += [bn.running_mean, bn.running_var, bn.weight, bn.bias]
        eps.append(bn.eps)
    wanted = list(map(values.index, outputs))
    records = [step.record for step in steps]

    def sequence(*inputs: Tensor) -> list[Tensor]:
        # As they came in the run that was watched, but for the layout of what is cut out of something else.
        inputs = [input.to(dtype).contiguous(memory_format=torch.channels_last) for input in inputs]
        listener = recording.listening_to_sequences()
        with torch._C._AutoDispatchBelowAutograd():
            if listener is None:
                return _run(inputs, tensors, rows, eps, wanted)
            *results, times = _run(inputs, tensors, rows, eps, wanted, timed=True)
        listener([dataclasses.replace(record) for record in records], times.tolist())
        return results

    return sequence
