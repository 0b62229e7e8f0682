"""explain(): which fused operations a model runs, and why the rest runs unfused.

One forward is run and watched: `fastres.sites` reports each decision that it takes, and a wrapper around
nn.Module.__call__ sees in which block that was, and which batch norms and ReLUs were called as they are.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from fastres import recording
from fastres.aliasing import used_once
from fastres.fuse import Variant, is_fused, variants_of, why_stock
from fastres.nodes import BATCH_NORMS
from fastres.vet import Untraceable
from fastres.watch import Reason, is_torch_layer


@dataclass(frozen=True)
class Row:
    """One block of the model: a module whose forward calls batch norms or ReLUs.

    Attributes:
        name: its qualified name; the class's name for the model itself.
        status: "fused", "partly" or "stock".
        ran: the fused operations that ran, in order.
        stock: qualified names of the batch norms and ReLUs that ran unfused.
        reasons: why, in words.
        convolutions: how many of the fused operations began with fastres's own, and with PyTorch's.
        own_in_channels_last: how many of the block's would be fastres's own in channels_last memory.
    """

    name: str
    status: str
    ran: tuple[str, ...]
    stock: tuple[str, ...]
    reasons: tuple[str, ...]
    convolutions: tuple[int, int] = (0, 0)
    own_in_channels_last: int = 0

    @property
    def fused(self) -> bool:
        return self.status == "fused"

    def __str__(self) -> str:
        ran = ", ".join(f"{count} x {op}" if count > 1 else op for op, count in Counter(self.ran).items())
        return f"{self.name}: " + ", ".join(filter(None, (self.status, ran, "; ".join(self.reasons))))


@dataclass(frozen=True)
class Explanation:
    """What explain() found: a row for each block, in the order of the calls. Its str is a table."""

    rows: tuple[Row, ...]

    @property
    def summary(self) -> str:
        """One line: how many blocks are fused."""
        if not self.rows:
            return (
                "no block was found: fused are nn.Conv2d, nn.BatchNorm2d and nn.ReLU modules as a forward "
                "calls them one after the other, F.relu and sums, but not F.conv2d and F.batch_norm"
            )
        count = Counter(row.status for row in self.rows)
        text = f"{count['fused']} of {len(self.rows)} blocks fused"
        return text + "".join(
            f", {count[status]} {status}" for status in ("partly", "stock") if count[status]
        )

    @property
    def convolutions(self) -> str:
        """One line: whose convolutions begin the fused operations; "" where there are none."""
        ours, theirs = (sum(row.convolutions[side] for row in self.rows) for side in (0, 1))
        more = sum(row.own_in_channels_last for row in self.rows)
        if ours + theirs == 0:
            return ""
        text = f"{ours} of {ours + theirs} fused convolutions are fastres's own"
        if more:
            text += f"; {more} would be in channels_last memory: "
            text += "model.to(memory_format=torch.channels_last), and its input likewise"
        return text

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [" " * (width - len(row.name)) + str(row) for row in self.rows]
        return "\n".join(filter(None, [*lines, self.summary, self.convolutions]))

    __repr__ = __str__


def explain(model: nn.Module, input: Any) -> Explanation:
    """Tell block by block which fused operations run the model, what runs unfused, and why.

    One forward is run in the model's present mode, under the present grad mode and autocast. Buffers,
    attributes and random number generators are afterwards what they were; hooks of your own do run.

    Args:
        model: any module, fused or not.
        input: what the model takes: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Returns:
        The rows; `print` shows them as a table.

    Raises:
        TypeError: if `model` is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastres.explain: model has type {type(model).__name__}, expected torch.nn.Module")
    # torch.compile's wrapper runs a graph, in which no module is called.
    model = getattr(model, "_orig_mod", model)
    names = {module: name for name, module in model.named_modules()}
    names[model] = type(model).__name__
    input = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, input)
    arguments = input if isinstance(input, tuple) else () if isinstance(input, dict) else (input,)
    keywords = input if isinstance(input, dict) else {}
    with _nothing_changed(model), _watched(names) as blocks:
        model(*arguments, **keywords)
    return Explanation(
        tuple(_row(block, names) for block in blocks.values() if block.records or block.called)
    )


# ---------------------------------------------------------------------------------------------------------
# Running the model
# ---------------------------------------------------------------------------------------------------------


@contextmanager
def _nothing_changed(model: nn.Module) -> Iterator[None]:
    """Run with copies of the buffers, and put back every attribute and random number generator."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    copies: dict[int, Tensor] = {}  # a buffer that two modules share stays shared
    devices = {tensor.device.index for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(devices)))
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"]
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        try:
            for module in modules:
                buffers = {
                    name: buffer
                    if buffer is None
                    else copies.setdefault(id(buffer), buffer.detach().clone())
                    for name, buffer in module._buffers.items()
                }
                vars(module).update(_buffers=buffers, _compiled_call_impl=None)
            yield
        finally:
            for module, before in zip(modules, attributes, strict=True):
                vars(module).clear()
                vars(module).update(before)


class _Block:
    """What happened in the calls of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.records: list[recording.Record] = []
        self.called: dict[nn.Module, None] = {}  # batch norms and ReLUs that ran as they are, in order
        self.went_stock: Reason | None = None  # why the original forward ran, where the module is fused


@contextmanager
def _watched(names: dict[nn.Module, str]) -> Iterator[dict[nn.Module, _Block]]:
    """Note what happens inside each module that is called, until the context ends."""
    call = nn.Module.__call__
    blocks: dict[nn.Module, _Block] = {}
    running: list[_Block] = []
    seen = 0

    def note_records() -> None:
        nonlocal seen
        if running:
            running[-1].records += records[seen:]
        seen = len(records)

    def watched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module not in names:
            return call(module, *args, **kwargs)
        if is_torch_layer(module):
            if running and isinstance(module, (_BatchNorm, nn.ReLU)):
                running[-1].called[module] = None
            return call(module, *args, **kwargs)
        note_records()
        block = blocks.setdefault(module, _Block(module))
        if is_fused(module) and block.went_stock is None:
            block.went_stock = why_stock(module, *args, **kwargs)
        running.append(block)
        try:
            return call(module, *args, **kwargs)
        finally:
            note_records()
            running.pop()

    with recording.record() as records, mock.patch.object(nn.Module, "__call__", watched_call):
        yield blocks


# ---------------------------------------------------------------------------------------------------------
# Telling what happened
# ---------------------------------------------------------------------------------------------------------


def _row(block: _Block, names: dict[nn.Module, str]) -> Row:
    def local(modules: Iterable[nn.Module]) -> list[str]:
        return [names[module].rpartition(".")[2] for module in modules]

    ran = tuple(record.ran for record in block.records if record.fused)
    stock: dict[nn.Module, None] = {}
    reasons: dict[str, list[str]] = {}  # and the modules that it is the reason for
    for record in block.records:
        if not record.fused:
            modules = [module for module in record.modules if isinstance(module, (_BatchNorm, nn.ReLU))]
            stock.update(dict.fromkeys(modules))
            reasons.setdefault(_in_words(record.reason, block, names), []).extend(local(modules))
    for module in block.called:
        if module not in stock:
            stock[module] = None
            reasons.setdefault(_why_called(block, module, names), []).extend(local([module]))
    if len(reasons) > 1 or ran:
        words = [f"{', '.join(dict.fromkeys(modules))}: {reason}" for reason, modules in reasons.items()]
    else:
        words = list(reasons)
    status = "fused" if not reasons else "partly" if ran else "stock"
    convolving = [r for r in block.records if r.fused and r.ran.startswith("conv")]
    ours = sum(record.own_convolution for record in convolving)
    return Row(
        names[block.module],
        status,
        ran,
        tuple(names[module] for module in stock),
        tuple(words),
        (ours, len(convolving) - ours),
        sum(record.own_in_channels_last for record in block.records),
    )


def _why_called(block: _Block, module: nn.Module, names: dict[nn.Module, str]) -> str:
    """Why the block called a batch norm or ReLU itself."""
    for norm in (module, block.module):
        if isinstance(norm, _BatchNorm) and type(norm) not in BATCH_NORMS:
            return f"{type(norm).__name__} is not fused, only nn.BatchNorm1d, 2d and 3d are"
    if block.went_stock is not None:
        return _in_words(block.went_stock, block, names)
    _, variant = next(variants_of(block.module))
    if isinstance(variant, Untraceable):
        return f"forward could not be traced: {variant}"
    callees = [variant.traced.callee(node) for chain in variant.chains for node in chain.nodes]
    if any(callee is module for callee in callees) and not is_fused(block.module):
        return "not fused; call fastres.fuse(model)"
    return _why_left_out(variant, module)


def _why_left_out(variant: Variant, module: nn.Module) -> str:
    """Why a batch norm or ReLU that the traced forward calls is in no chain."""
    calls = [node for node in variant.traced.graph.nodes if variant.traced.callee(node) is module]
    if isinstance(module, nn.ReLU):
        return "it does not follow a batch norm or a residual sum whose result is used by it alone"
    if any(not used_once(node) for node in calls):
        return "its result is used more than once"
    return "neither a ReLU follows it nor an nn.Conv2d precedes it in the same forward"


def _in_words(reason: Reason, block: _Block, names: dict[nn.Module, str]) -> str:
    """The reason with the modules' qualified names in it."""
    if isinstance(reason, tuple):
        module, text = reason
        return f"{text} on {names[module]}" if module in names else text
    root = next(iter(names))
    name = "" if block.module is root else names[block.module]
    return re.sub(r"\bself\b", name or "the model", re.sub(r"\bself\.", f"{name}." if name else "", reason))
