"""Which part of a model is at work, at each moment of a training step.

A step is cut into pieces: the calls of sites (fastres.sites) and of modules, and the time in between, which
counts for the module whose forward is then running. Watching one changes nothing of what it runs: calls are
seen from around nn.Module.__call__, as a hook would make a site run unfused. In the backward pass an
autograd node belongs to the piece that was at work when it was made, which its sequence number tells; the
layers that are one node tell of themselves. Sites that run in one call (fastres.sequences) tell afterwards
when each of them began. A piece is at work from where one of its nodes or layers begins
until that of another piece does; the sums of gradients that autograd makes in between count for the piece
whose gradient was added.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
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
SwitchAt = Callable[[Part, str, float], object]


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
        known: the pieces of an earlier walk, of which these are taken to be.
        switch_at: called in the place of `switch` for layers of sequences, and with the time, by
            time.perf_counter(), at which they began. Without it all of them run one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        switch: Switch,
        known: list[Piece] | None = None,
        switch_at: SwitchAt | None = None,
    ) -> None:
        self.pieces: list[Piece] = known or []
        self.strange = False  # whether anything ran that is not known
        self._expected: dict[tuple[nn.Module, ...], deque[int]] | None = None
        if known is not None:
            self._expected = defaultdict(deque)
            for index, piece in enumerate(known):
                self._expected[piece.modules].append(index)
        self._modules = set(model.modules())
        self._switch, self._switch_at = switch, switch_at
        self._stack: list[int] = [-1]  # of modules whose forward is running
        self._numbers: list[int] = []  # autograd's next sequence number, when ...
        self._parts: list[Part] = []  # ... this part began to work

    def enter(self, part: Part, phase: str = "forward", at: float | None = None) -> None:
        """From now on, or from some time before, this part is at work."""
        if phase == "forward":
            self._numbers.append(torch.autograd._get_sequence_nr())
            self._parts.append(part)
        if at is None:
            self._switch(part, phase)
        else:
            self._switch_at(part, phase, at)

    def is_as_known(self) -> bool:
        """Whether each known site ran, and nothing that is not known."""
        left = [index for indices in self._expected.values() for index in indices]
        return not self.strange and all(self.pieces[index].record is None for index in left)

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
                self._enter_piece(self._stack[-1])

        self._site: tuple[nn.Module, ...] = ()
        of_sequence = None if self._switch_at is None else self._note_sequence
        listening = recording.listen(self._begin_site, of_sequence)
        with listening, mock.patch.object(nn.Module, "__call__", watched_call):
            yield

    def _is_of_the_site(self, module: nn.Module) -> bool:
        """Run unfused, a site calls its modules."""
        return any(module is other for other in self._site)

    def _begin_site(self, record: recording.Record) -> None:
        piece = self._begin(record.modules, record)
        record.at_backward = lambda: self._switch(piece, "backward")
        self._site = record.modules

    def _note_sequence(self, records: list[recording.Record], times: list[float]) -> None:
        called, *begun, ended = times
        self._enter_piece(self._stack[-1], called)
        for record, at in zip(records, begun, strict=True):
            self._begin(record.modules, record, at)
        self._enter_piece(self._stack[-1], ended)

    def _begin(
        self, modules: tuple[nn.Module, ...], record: recording.Record | None, at: float | None = None
    ) -> int:
        self._site = ()
        if self._expected is None:
            index = len(self.pieces)
            self.pieces.append(Piece(modules, record, self._stack[-1]))
        elif self._expected[modules]:
            index = self._expected[modules].popleft()
        else:
            index, self.strange = -1, True
        self._enter_piece(index, at)
        return index

    def _enter_piece(self, index: int, at: float | None = None) -> None:
        self.enter(index if index >= 0 else "between blocks", at=at)

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
