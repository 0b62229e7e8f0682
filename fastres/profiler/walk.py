"""Which part of a model is at work, at each moment of a training step.

A step is cut into pieces: the calls of sites (fastres.sites) and of modules, and the time in between, which
counts for the module whose forward is then running. Watching one changes nothing of what it runs: calls are
seen from around nn.Module.__call__, as a hook would make a site run unfused. In the backward pass an
autograd node belongs to the piece that was at work when it was made, which its sequence number tells; the
layers that are one node tell of themselves. A piece is at work from where one of its nodes or layers begins
until that of another piece does; the sums of gradients that autograd makes in between count for the piece
whose gradient was added.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from torch.autograd.graph import Node

from fastres import recording
from fastres.watch import is_torch_layer

# A piece's index, or the name of what is no part of the model, such as "optimizer".
Part = int | str
Switch = Callable[[Part, str], object]


@dataclass(frozen=True)
class Piece:
    """One call in the model's forward.

    Attributes:
        modules: those that the site runs; or the one module that was called.
        record: the site's, None for a module's call.
        parent: index of the piece of the module in whose forward this was called, -1 for the model.
    """

    modules: tuple[nn.Module, ...]
    record: recording.Record | None
    parent: int


class Walk:
    """One step of a model, piece by piece.

    Args:
        model: whose forward is watched.
        switch: called with the part that begins to work and "forward" or "backward", whenever it changes.
    """

    def __init__(self, model: nn.Module, switch: Switch) -> None:
        self.pieces: list[Piece] = []
        self._modules = set(model.modules())
        self._switch = switch
        self._stack: list[int] = [-1]  # of modules whose forward is running
        self._numbers: list[int] = []  # autograd's next sequence number, when ...
        self._parts: list[Part] = []  # ... this part began to work

    def enter(self, part: Part, phase: str = "forward") -> None:
        """From now on this part is at work."""
        if phase == "forward":
            self._numbers.append(torch.autograd._get_sequence_nr())
            self._parts.append(part)
        self._switch(part, phase)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Watch the calls of modules and of sites in this context."""
        call = nn.Module.__call__

        def watched_call(module: nn.Module, *args, **kwargs):
            if module not in self._modules or self._is_of_the_site(module):
                return call(module, *args, **kwargs)
            self._stack.append(self._begin((module,), None))
            try:
                return call(module, *args, **kwargs)
            finally:
                self._stack.pop()
                self._site = ()
                self.enter(self._stack[-1] if self._stack[-1] >= 0 else "between blocks")

        self._site: tuple[nn.Module, ...] = ()
        with recording.listen(self._begin_site), mock.patch.object(nn.Module, "__call__", watched_call):
            yield

    def _is_of_the_site(self, module: nn.Module) -> bool:
        """Run unfused, a site calls its modules."""
        return any(module is other for other in self._site)

    def _begin_site(self, record: recording.Record) -> None:
        piece = self._begin(record.modules, record)
        record.at_backward = lambda: self._switch(piece, "backward")
        self._site = record.modules

    def _begin(self, modules: tuple[nn.Module, ...], record: recording.Record | None) -> int:
        self._site = ()
        self.pieces.append(Piece(modules, record, self._stack[-1]))
        self.enter(len(self.pieces) - 1)
        return len(self.pieces) - 1

    def watch_backward(self, root: Node) -> None:
        """Have the autograd nodes below `root` tell when they begin to work."""
        todo, seen = [root], {root}
        while todo:
            node = todo.pop()
            for below, _ in node.next_functions:
                if below is not None and below not in seen:
                    seen.add(below)
                    todo.append(below)
            if node.name() == "torch::autograd::AccumulateGrad":
                continue  # works right after the node whose gradient it takes, and counts for its piece
            part = self._made_by(node)
            node.register_prehook(lambda _grads, part=part: self._switch(part, "backward"))

    def _made_by(self, node: Node) -> Part:
        return self._parts[max(bisect_right(self._numbers, node._sequence_nr()) - 1, 0)]


def is_layer(piece: Piece, has_children: bool) -> bool:
    """Whether the piece does work of its own, and is not just the module around other pieces."""
    return piece.record is not None or not has_children or is_torch_layer(piece.modules[0])
