"""Interleaved measuring: variants take turns in one process, so that what slows one slows all.

Two variants are compared by the ratio within each round. The median of these ratios is the result and their
quartiles are its spread; a ratio of two medians would hide a drift.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

Seconds = dict[str, list[float]]  # of each variant, by round


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) == 1:
            return cls(*values * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    after_each: Callable[[], object] = lambda: None,
) -> Seconds:
    """Call the variants in turn, A B C A B C ..., and time each call.

    On a CUDA device the calls are enqueued one behind the other with events between them; nothing waits for
    the device before the last one, so that a call pays for its launches only where the device runs dry.

    Args:
        variants: functions by name, warmed up.
        rounds: how often each is called.
        device: where they work.
        after_each: called after each call, outside of its time.

    Returns:
        Seconds of each call.
    """
    clock = _CudaClock() if device.type == "cuda" else _WallClock()
    marks = []
    for _ in range(rounds):
        for name, call in variants.items():
            begin = clock.now()
            call()
            marks.append((name, begin, clock.now()))
            after_each()
    seconds: Seconds = {name: [] for name in variants}
    for name, begin, end in marks:
        seconds[name].append(clock.between(begin, end))
    return seconds


def ratios(seconds: Seconds, numerator: str, denominator: str) -> list[float]:
    """numerator / denominator of each round."""
    return [a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True)]


class _WallClock:
    def now(self) -> float:
        return time.perf_counter()

    def between(self, begin: float, end: float) -> float:
        return end - begin


class _CudaClock:
    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


# ---------------------------------------------------------------------------------------------------------
# the machine


@dataclass(frozen=True)
class Machine:
    """What a time was measured on.

    Attributes:
        isa: the instruction set that fastres's CPU kernels run with.
        amx: whether the CPU shows its matrix unit, which oneDNN's bf16 convolutions live by.
        threads: of PyTorch's CPU ops.
        gpu: its name, "" where the device is the CPU.
    """

    cpu: str
    cores: int
    isa: str
    amx: bool
    threads: int
    gpu: str
    torch: str
    fastres: str

    @classmethod
    def at_hand(cls, device: torch.device) -> "Machine":
        from fastres import _C

        flags, cpu = _cpu_info()
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(
            cpu=cpu,
            cores=usable,
            isa=_C.cpu_isa(),
            amx="amx_tile" in flags,
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
            torch=torch.__version__,
            fastres=_C.build_info()["version"],
        )

    def __str__(self) -> str:
        parts = [self.gpu] if self.gpu else []
        parts += [
            f"{self.cpu}, {self.cores} cores, {self.threads} threads",
            f"{self.isa}, {'AMX' if self.amx else 'no AMX'}",
            f"torch {self.torch}, fastres {self.fastres}",
        ]
        return "; ".join(parts)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def _cpu_info() -> tuple[set[str], str]:
    """The CPU's flags and name; no flags on a system that does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set(), platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return set(fields.get("flags", "").split()), fields.get("model name") or platform.machine()
