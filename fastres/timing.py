"""Interleaved measuring: variants take turns in one process, so that what slows one slows all.

Two variants are compared by the ratio within each round. The median of these ratios is the result and their
quartiles are its spread; a ratio of two medians would hide a drift.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

Seconds = dict[str, list[float]]  # of each variant, by round

_LEAST_ROUNDS = 3  # whose quartiles tell of their noise


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

    def includes(self, value: float) -> bool:
        """Whether it lies between the quartiles."""
        return self.low <= value <= self.high


def too_few(rounds: int) -> str:
    """What is to be said in place of faster or slower after so few rounds; "" after enough."""
    if rounds >= _LEAST_ROUNDS:
        return ""
    return f"the noise of {rounds} round{'s' if rounds > 1 else ''} is not known"


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    after_each: Callable[[], object] = lambda: None,
) -> Seconds:
    """Call the variants in turn, A B C A B C ..., and time each call.

    On a CUDA device the calls are enqueued one behind the other, each between two events and with the L2
    cache flushed before it; nothing waits for the device before the last one, so that a call pays for its
    launches only where the device runs dry.

    Args:
        variants: functions by name, warmed up.
        rounds: how often each is called.
        device: where they work.
        after_each: called after each call, outside of its time.

    Returns:
        Seconds of each call.
    """
    clock = clock_of(device)
    marks = []
    for _ in range(rounds):
        for name, call in variants.items():
            begin = clock.begin()
            call()
            marks.append((name, begin, clock.end()))
            after_each()
    seconds: Seconds = {name: [] for name in variants}
    for name, begin, end in marks:
        seconds[name].append(clock.between(begin, end))
    return seconds


def ratios(seconds: Seconds, numerator: str, denominator: str) -> list[float]:
    """numerator / denominator of each round."""
    return [a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True)]


class _WallClock:
    def begin(self) -> float:
        return time.perf_counter()

    end = begin

    def between(self, begin: float, end: float) -> float:
        return end - begin


class _CudaClock:
    """Marks in the current stream, to be told apart only once all calls are enqueued."""

    def __init__(self, device: torch.device) -> None:
        # Four times the cache, and so much that a host enqueues the timed call while this is read.
        numel = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28) // 4
        self._cold = torch.zeros(numel, device=device)

    def begin(self) -> torch.cuda.Event:
        self._cold.sum()  # read, not written: dirty lines would be written back in the timed call's time
        return self.end()

    def end(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> _WallClock | _CudaClock:
    """begin() before a call, end() after it, and between(begin, end) for the seconds that it took."""
    return _CudaClock(device) if device.type == "cuda" else _WallClock()


# ---------------------------------------------------------------------------------------------------------
# the machine


@dataclass(frozen=True)
class Machine:
    """What a time was measured on.

    Attributes:
        isa: the instruction set that fastres's CPU kernels run with.
        amx: whether the CPU shows its matrix unit, which bf16 convolutions live by.
        threads: of PyTorch's CPU ops.
        gpu: its name, "" where the device is the CPU.
        gpu_clocks: of the moment, so ask right after the work; "" where nvidia-smi does not tell.
    """

    cpu: str
    cores: int
    isa: str
    amx: bool
    threads: int
    gpu: str
    gpu_clocks: str
    torch: str
    fastres: str

    @classmethod
    def at_hand(cls, device: torch.device) -> "Machine":
        from fastres import _C

        cuda = device.type == "cuda"
        gpu_clocks = _gpu_clocks(device) if cuda else ""  # first: an idle GPU lowers them
        flags, cpu = _cpu_info()
        return cls(
            cpu=cpu,
            cores=usable_cores(),
            isa=_C.cpu_isa(),
            amx="amx_tile" in flags,
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name(device) if cuda else "",
            gpu_clocks=gpu_clocks,
            torch=torch.__version__,
            fastres=_C.build_info()["version"],
        )

    def __str__(self) -> str:
        parts = [part for part in (self.gpu, self.gpu_clocks) if part]
        parts += [
            f"{self.cpu}, {self.cores} cores, {self.threads} threads",
            f"{self.isa}, {'AMX' if self.amx else 'no AMX'}",
            f"torch {self.torch}, fastres {self.fastres}",
        ]
        return "; ".join(parts)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_info() -> tuple[set[str], str]:
    """The CPU's flags and name; no flags on a system that does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set(), platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return set(fields.get("flags", "").split()), fields.get("model name") or platform.machine()


def _gpu_clocks(device: torch.device) -> str:
    query = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        sm, most_sm, memory, most_memory = (field.strip() for field in answer.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    return f"{sm} of {most_sm} MHz, memory {memory} of {most_memory} MHz"


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Stock PyTorch at its best: warming up tries the algorithms."""
    # Not torch.backends.cudnn.benchmark, which torch.testing lets nobody set in its process.
    before = torch._C._get_cudnn_benchmark()
    torch._C._set_cudnn_benchmark(True)
    try:
        yield
    finally:
        torch._C._set_cudnn_benchmark(before)
