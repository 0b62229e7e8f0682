"""What sites and ops tell of a call, to whoever listens in the thread that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident

import torch
from torch import nn

__all__ = [
    "Reason",
    "Record",
    "begin",
    "current",
    "listen",
    "listening",
    "listening_to_sequences",
    "record",
    "telling",
]

# The module that is in the way, None where it is none of the site's; and what is so about it, in words that
# "on <the module's name>" can follow: (bn2, "a forward hook is set").
Reason = tuple[nn.Module | None, str]


@dataclass(eq=False)
class Record:
    """What one call of a site did; complete once it is over.

    Attributes:
        modules: those that the site runs, without the ones that are None.
        ran: the site's fused op, such as "conv_bn_add_relu"; the same name where it did not run fused.
        fused: whether it did.
        reason: why not, if not.
        own_convolution: whether its convolution was fastres's, not PyTorch's.
        own_in_channels_last: whether it would have been, had its input been in channels_last memory.
        at_backward: called as the gradients of a layer begin that is in one autograd node with others; the
            listener sets it.
    """

    modules: tuple[nn.Module, ...]
    ran: str
    fused: bool
    reason: Reason | None
    own_convolution: bool = False
    own_in_channels_last: bool = False
    at_backward: Callable[[], object] | None = None

    def composed(self, reason: str) -> None:
        """Note that no kernel ran the fused op."""
        self.fused, self.reason = False, (None, reason)

    def pool_apart(self) -> None:
        """Note that the maximum over windows is no part of the fused op."""
        self.ran = self.ran.removesuffix("_max_pool")

    def convolved(self) -> None:
        """Note that the convolution was fastres's own."""
        self.own_convolution = True


Listener = Callable[[Record], object]
# Called with the records of layers that ran one after the other in one call, and with the times, by
# time.perf_counter(), of the call, of each layer's begin and of the last one's end.
SequenceListener = Callable[[list[Record], list[float]], object]

# By thread. Mostly there is nothing in them, which is all that a call then asks.
_listeners: dict[int, Listener] = {}
_sequence_listeners: dict[int, SequenceListener] = {}
_records: dict[int, Record] = {}


def listening() -> Listener | None:
    """Who listens to this thread's sites; nobody to those that are being compiled."""
    if torch.compiler.is_dynamo_compiling():
        return None
    return _listeners.get(get_ident()) if _listeners else None


def listening_to_sequences() -> SequenceListener | None:
    """Who listens to this thread's sequences; without one, sites that are listened to run one by one."""
    return _sequence_listeners.get(get_ident()) if _sequence_listeners else None


def current() -> Record | None:
    """What the ops that run now are to tell how they do; None where nobody asks."""
    return _records.get(get_ident()) if _records else None


def begin(record: Record, listener: Listener) -> None:
    """Tell the listener that a site begins; the ops that follow are its own."""
    _records[get_ident()] = record
    listener(record)


@contextmanager
def telling(record: Record | None) -> Iterator[None]:
    """Have the ops in this context tell that record, or none."""
    thread = get_ident()
    outer = _records.get(thread)
    _put(_records, thread, record)
    try:
        yield
    finally:
        _put(_records, thread, outer)


@contextmanager
def listen(listener: Listener, of_sequence: SequenceListener | None = None) -> Iterator[None]:
    """Have `listener` called as each site begins, in this context.

    Args:
        of_sequence: called after a sequence; without it, sites that could run in one run one by one.
    """
    thread = get_ident()
    outer = _listeners.get(thread), _sequence_listeners.get(thread)
    _listeners[thread] = listener
    _put(_sequence_listeners, thread, of_sequence)
    try:
        yield
    finally:
        _put(_listeners, thread, outer[0])
        _put(_sequence_listeners, thread, outer[1])
        _put(_records, thread, None)


@contextmanager
def record() -> Iterator[list[Record]]:
    """Collect a Record of every site that is called in this context."""
    records: list[Record] = []
    with listen(records.append):
        yield records


def _put(by_thread: dict, thread: int, value) -> None:
    if value is None:
        by_thread.pop(thread, None)
    else:
        by_thread[thread] = value
