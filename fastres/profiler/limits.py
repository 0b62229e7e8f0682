"""What the machine can do at best, measured: copies from each level of memory, and products of matrices.

Kept in fastres/limits.json of the user's cache folder, by machine, number of threads and version. Each
profile measures anew and keeps the better of each: what a busy machine reached is no limit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastres import _C
from fastres.files import cache_path, replaced
from fastres.timing import Machine, clock_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SECONDS = 0.1  # that each measurement goes on
_VERSION = 2  # of what is measured


@dataclass(frozen=True)
class Level:
    """A level of memory.

    Attributes:
        bytes: that fit in, None for the last.
        speed: bytes read and written a second in a copy of half as many.
    """

    bytes: int | None
    speed: float


@dataclass(frozen=True)
class Limits:
    """Of a machine: levels of memory from the fastest on, and FLOP/s by dtype."""

    copy: dict[str, Level]
    flops: dict[str, float]

    def level(self, bytes: float) -> str:
        """The name of the fastest level that holds so much."""
        return next(n for n, level in self.copy.items() if level.bytes is None or bytes <= level.bytes)

    def bound(self, flops: float, bytes: float, dtype: str) -> float:
        """Seconds that so much work on so much data takes at least."""
        return max(flops / self.flops[dtype], bytes / self.copy[self.level(bytes)].speed)

    def as_dict(self) -> dict:
        levels = {name: {"bytes": level.bytes, "speed": level.speed} for name, level in self.copy.items()}
        return {"copy_bytes_per_second": levels, "flops_per_second": self.flops}

    def best(self, other: Limits) -> Limits:
        """Of each, the better one of two measurements of a machine."""
        copy = {
            name: Level(level.bytes, max(level.speed, other.copy[name].speed))
            for name, level in self.copy.items()
        }
        return Limits(copy, {name: max(speed, other.flops[name]) for name, speed in self.flops.items()})

    @classmethod
    def of(cls, written: dict) -> Limits:
        copy = {name: Level(**level) for name, level in written["copy_bytes_per_second"].items()}
        return cls(copy, written["flops_per_second"])


def measured(device: torch.device) -> Limits:
    """The limits of the machine at hand: the best that was measured so far, now or before."""
    machine = Machine.at_hand(device)
    parts = (machine.cpu, machine.cores, machine.isa, machine.threads, machine.gpu, machine.torch, _VERSION)
    key, path = ", ".join(map(str, parts)), cache_path("limits.json")
    limits, kept = _measure(device), {}
    try:
        kept = dict(json.loads(path.read_text()))
        limits = limits.best(Limits.of(kept[key]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing is kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as file:
            json.dump({**kept, key: limits.as_dict()}, file, indent=1)
    except OSError:
        pass  # these alone count next time
    return limits


def _measure(device: torch.device) -> Limits:
    sizes = _levels(device)
    copy = {}
    before = 2**18  # beyond what a core has of the first level
    for name, size in sizes.items():
        # The two tensors of a copy take half of the level at most: it is not theirs alone, and of a large
        # one other machines may hold more than they show. In memory, what no level holds.
        if size:
            smaller = (2 * before * 4**i for i in range(4))
            tried = [size // 2, *(bytes for bytes in smaller if bytes < size // 2)]
        else:
            tried = [max(2 * before, min(8 * before, 2**29))]
        copy[name] = Level(size, max(_copy_speed(bytes, device) for bytes in tried))
        before = size or before
    return Limits(copy, {name: _flops(dtype, device) for name, dtype in DTYPES.items()})


def _levels(device: torch.device) -> dict[str, int | None]:
    """Bytes of each level of cache that all threads have together."""
    if device.type == "cuda":
        return {"L2": torch.cuda.get_device_properties(device).L2_cache_size, "memory": None}
    sizes: dict[str, int | None] = {}
    threads = torch.get_num_threads()
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind == "Unified" and size.endswith("K"):
            shared = _count((index / "shared_cpu_list").read_text())
            sizes[f"L{level}"] = int(size[:-1]) * 1024 * max(1, threads // shared)
    return {**dict(sorted(sizes.items())), "memory": None}


def _count(cpus: str) -> int:
    """Of a list such as 0-3,8."""
    ranges = (part.partition("-")[::2] for part in cpus.strip().split(","))
    return sum(int(last or first) - int(first) + 1 for first, last in ranges)


def _copy_speed(bytes: int, device: torch.device) -> float:
    source = torch.ones(max(bytes // 8, 1), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _flops(dtype: torch.dtype, device: torch.device) -> float:
    """Of the faster one of PyTorch's matrix product and, on a CPU, our convolution."""
    best = _product_flops(2048 if device.type == "cpu" else 8192, dtype, device)
    if device.type == "cpu" and _C.convolves(str(dtype).removeprefix("torch.")):
        shape = (8, 256, 28, 28)
        image = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(256, 256, 3, 3).to(dtype)
        by = (1, 1), (1, 1), (1, 1)  # stride, padding, dilation
        flops = 2 * 8 * 28 * 28 * 256 * 256 * 9
        forward = torch.ops.fastres.conv_forward.default
        seconds = _fastest(lambda: forward(image, weight, None, None, *by, False), device)
        best = max(best, flops / seconds)
    return best


def _product_flops(largest: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of a product of square matrices: smaller ones where these are slow, as bf16 is without AVX-512."""
    size, long = 256, 0.05  # seconds
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _fastest(lambda a=a, b=b: a @ b, device)
        if size >= largest or seconds > long:
            return 2 * size**3 / seconds
        size *= 2


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call; a limit is what was reached once."""
    call()
    clock, marks, deadline = clock_of(device), [], time.perf_counter() + _SECONDS
    begin = clock.end()
    call()
    # Several in a row where they are short, so that the clock's own time does not count.
    times = 4 if clock.between(begin, clock.end()) < _SECONDS / 20 else 1
    while len(marks) < 3 or time.perf_counter() < deadline:
        begin = clock.end()
        for _ in range(times):
            call()
        marks.append((begin, clock.end()))
    return min(clock.between(*mark) for mark in marks) / times
