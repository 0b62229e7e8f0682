"""One step under torch.profiler: the kernels of each part, the memory over time, a trace to look at."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastres.memory import from_malloc
from fastres.profiler.walk import Part, Switch, SwitchAt

_MARK = "fastres part "
_LEAST_SHARE = 0.05  # of a part's time that an op must take to be named
_TRACK = 990_000  # the blocks' own line in the trace


class NoRoomError(OSError):
    """There is no place for a temporary file; the message says where."""


@dataclass
class Trace:
    """One step.

    Attributes:
        events: of the Chrome trace format, with a line on which the parts stand.
        ops: names of the ops that take a part's time, the longest first, by part and direction.
        memory: (milliseconds, bytes) from the step's begin, whenever an allocation changed them.
        backward: milliseconds at which the backward pass began, None if there was none.
    """

    events: list[dict]
    ops: dict[tuple[str, str], list[str]]
    memory: list[tuple[float, int]]
    backward: float | None


def trace(
    step: Callable[[Switch, SwitchAt], object], device: torch.device, label: Callable[[Part], str]
) -> Trace:
    """Run a step and look at it.

    Args:
        step: runs one, and calls what it gets whenever another part begins to work, or began.
        label: the name of a part in the trace.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it tells on stderr that it starts and stops
    from torch.profiler import ProfilerActivity, profile, record_function

    marks: list[tuple[Part, str]] = []
    delays: list[float] = []  # of the marks, in seconds

    def switch_at(part: Part, direction: str, at: float | None = None) -> None:
        with record_function(f"{_MARK}{len(marks)}"):
            delays.append(0.0 if at is None else time.perf_counter() - at)
            marks.append((part, direction))

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    # PyTorch's profiler knows nothing of memory that fastres keeps.
    with from_malloc(), profile(activities=activities, profile_memory=True) as profiler:
        step(switch_at, switch_at)
        if cuda:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        try:
            events = json.loads(path.read_text())["traceEvents"]
        except (OSError, ValueError) as error:  # it says nothing where it cannot write
            raise NoRoomError(
                f"no room for a temporary trace in {folder}; set TMPDIR to another place"
            ) from error
    return _read(events, marks, delays, device, label)


def _read(events, marks, delays, device, label) -> Trace:
    found = {e["name"]: e["ts"] for e in events if str(e.get("name", "")).startswith(_MARK)}
    begins = [found[f"{_MARK}{index}"] - delay * 1e6 for index, delay in enumerate(delays)]
    kept = [e for e in events if not str(e.get("name", "")).startswith(_MARK)]
    process = next((e["pid"] for e in kept if e.get("cat") == "cpu_op"), 0)
    track = [{"ph": "M", "name": "thread_name", "pid": process, "tid": _TRACK, "args": {"name": "blocks"}}]
    for (part, direction), begin, end in zip(marks, begins, [*begins[1:], None], strict=True):
        if end is not None and end > begin:
            place = {"ph": "X", "cat": "blocks", "pid": process, "tid": _TRACK, "ts": begin}
            track.append({**place, "dur": end - begin, "name": label(part), "args": {"pass": direction}})
    backward = next((t for t, (_, d) in zip(begins, marks, strict=True) if d == "backward"), None)
    return Trace(
        [*track, *kept],
        _ops(kept, marks, begins, label),
        _memory(kept, begins[0], begins[-1], device),
        None if backward is None else (backward - begins[0]) / 1e3,
    )


def _ops(events, marks, begins, label) -> dict[tuple[str, str], list[str]]:
    """By the outermost ops that are no views and no bookkeeping: what a part is seen to call."""
    ops = sorted(
        (e for e in events if e.get("cat") == "cpu_op" and "::" in e["name"] and "dur" in e),
        key=lambda e: (e["ts"], -e["dur"]),
    )
    times: dict[tuple[str, str], Counter] = defaultdict(Counter)
    end, mark = 0.0, 0
    for op in ops:
        if op["name"].startswith("autograd::") or op["ts"] < end:
            continue
        while mark + 1 < len(begins) and begins[mark + 1] <= op["ts"]:
            mark += 1
        if op["ts"] < begins[0]:
            continue
        # A backward node's own event holds the ops that it calls.
        end = op["ts"] + op["dur"]
        # A sequence's op is of several parts.
        for at in range(mark, len(marks)):
            if begins[at] >= end:
                break
            part, direction = marks[at]
            after = min([end, *begins[at + 1 : at + 2]])
            times[label(part), direction][op["name"]] += after - max(begins[at], op["ts"])
    return {
        place: [name for name, time in counts.most_common() if time >= _LEAST_SHARE * counts.total()]
        for place, counts in times.items()
    }


def _memory(events, begin, end, device) -> list[tuple[float, int]]:
    """Bytes above those at the step's begin."""
    kind = 1 if device.type == "cuda" else 0  # of c10::DeviceType
    now, points = 0, [(0.0, 0)]
    changes = sorted(
        (e["ts"], e["args"]["Bytes"])
        for e in events
        if e.get("name") == "[memory]" and e["args"].get("Device Type") == kind
    )
    for at, bytes in changes:
        if begin <= at <= end:
            now += bytes
            points.append(((at - begin) / 1e3, now))
    return points
