"""Which convolution a layer on the CPU gets, ours or PyTorch's: the one that was measured to be the faster.

FASTRES_TUNE in the environment says where that is known from:
    cached  (the default) from measurements that were made before; of other layers by rule
    on      a layer that was not measured is, when it is first met: some tenths of a second
    off     by rule alone

Under torch.compile the rule alone chooses. Measurements are kept in fastres/convolutions.json of the user's
cache folder, by processor, instruction set and versions. Delete that file to measure anew.
"""

import contextlib
import fcntl
import json
import os
import statistics
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from fastres import _C
from fastres.files import cache_path, replaced
from fastres.recording import telling

MODES = ("cached", "on", "off")
_SECONDS = 0.1  # that the measurement of a layer goes on for each side, at least
_FEWEST, _MOST = 3, 20  # rounds
_MOST_MISSED = 4096  # layers that are remembered not to be in the file
_NEARLY = 1.03  # a gain below that is noise, and the rule is kept


_FLAGS = ("residual", "needs_grad", "needs_input_grad", "packed")


class Layer(NamedTuple):
    """All that the speed of a convolution with its batch norm depends on."""

    training: bool
    dtype: str
    weight_dtype: str
    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    residual: bool
    needs_grad: bool
    needs_input_grad: bool
    packed: bool  # whether the weight is kept packed
    threads: int

    def __str__(self) -> str:
        def times(values) -> str:
            return "x".join(map(str, values))

        words = [
            "train" if self.training else "infer",
            self.dtype,
            f"{self.weight_dtype} weight",
            f"{times(self.input)} by {times(self.weight)}",
            f"stride {times(self.stride)}",
            f"padding {times(self.padding)}",
            f"dilation {times(self.dilation)}",
            *(name for name in _FLAGS if getattr(self, name)),
            f"{self.threads} threads",
        ]
        return ", ".join(words)


class Times(NamedTuple):
    """Seconds of a call, and of its backward pass in training."""

    ours: float
    pytorch: float


# ---------------------------------------------------------------------------------------------------------
# the mode


def _mode() -> str:
    name = os.environ.get("FASTRES_TUNE", MODES[0])
    if name in MODES:
        return name
    warnings.warn(f"FASTRES_TUNE={name} is none of {', '.join(MODES)}; taken as {MODES[0]}", stacklevel=2)
    return MODES[0]


mode = _mode()


class _Forced(threading.local):
    ours: bool | None = None  # while the thread measures a layer


_forced = _Forced()
_measuring = threading.Lock()  # times of two at once would be of neither


@contextlib.contextmanager
def forcing(ours: bool) -> Iterator[None]:
    """Have our convolution run each layer that it can run, or PyTorch's, whichever is the faster one."""
    outer, _forced.ours = _forced.ours, ours
    try:
        yield
    finally:
        _forced.ours = outer


# ---------------------------------------------------------------------------------------------------------
# what was measured


class Table:
    """Measured layers, in memory and in a file that other processes write as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # By machine: the instruction set may be changed. None: a layer that the file lacks.
        self._layers: dict[str, dict[Layer, Times | None]] = {}
        self._written: dict[str, dict[str, Times]] = {}
        self.added = 0

    def get(self, layer: Layer) -> Times | None:
        machine = _machine()
        self._load(machine)
        known = self._layers.setdefault(machine, {})
        if layer not in known and self._written[machine]:
            found = self._written[machine].get(str(layer))
            if found is not None or len(known) < _MOST_MISSED:
                known[layer] = None if found is None else Times(*found)
        return known.get(layer)

    def is_empty(self) -> bool:
        """Of this machine, as far as this process knows."""
        machine = _machine()
        self._load(machine)
        return not self._written[machine] and not self._layers.get(machine)

    def _load(self, machine: str) -> None:
        if machine not in self._written:
            self._written[machine] = self._read().get(machine, {})

    def add(self, layer: Layer, times: Times) -> None:
        """In memory, and in the file together with what others wrote since."""
        machine = _machine()
        self._layers.setdefault(machine, {})[layer] = times
        self.added += 1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_name(f".{self.path.name}.lock"), "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                written = self._read()
                written.setdefault(machine, {})[str(layer)] = times
                with replaced(self.path) as file:
                    json.dump(written, file, indent=1)
        except OSError as error:
            warnings.warn(f"fastres: what was measured is not kept: {error}", stacklevel=2)

    def _read(self) -> dict[str, dict[str, Times]]:
        try:
            written = json.loads(self.path.read_text())
            return {
                machine: {layer: Times(*map(float, times)) for layer, times in layers.items()}
                for machine, layers in written.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            warnings.warn(f"fastres: {self.path} cannot be read and is made anew: {error}", stacklevel=2)
            return {}


def _machine() -> str:
    global _cpu
    if _cpu is None:
        from fastres.timing import Machine  # which asks the system, once

        machine = Machine.at_hand(torch.device("cpu"))
        _cpu = f"{machine.cpu}, torch {machine.torch}, fastres {machine.fastres}"
    return f"{_cpu}, {_C.cpu_isa()}"


_cpu: str | None = None


table = Table(cache_path("convolutions.json"))


# ---------------------------------------------------------------------------------------------------------
# choosing


def knows() -> bool:
    """Whether there is anything to choose by but the rule."""
    return _forced.ours is not None or mode == "on" or (mode == "cached" and not table.is_empty())


def state() -> tuple:
    """Of which takes_ours is a function."""
    return _forced.ours, mode, id(table), table.added


def takes_ours(layer: Layer, by_rule: bool) -> bool:
    """Whether our convolution is to run a layer that it can run; `by_rule` where nothing was measured."""
    if _forced.ours is not None:
        return _forced.ours
    times = table.get(layer)
    if times is None and mode == "on":
        with _measuring:
            times = table.get(layer) or _measured(layer)
    if times is None:
        return by_rule
    slower, faster = max(times), min(times)
    return by_rule if slower < _NEARLY * faster else times.ours < times.pytorch


def _measured(layer: Layer) -> Times | None:
    """None where that failed, for want of memory for example."""
    try:
        times = measure(layer)
    except (RuntimeError, MemoryError) as error:
        warnings.warn(f"fastres: {layer} could not be measured: {error}", stacklevel=2)
        return None
    table.add(layer, times)
    return times


def measure(layer: Layer) -> Times:
    """Medians of calls that take turns, unseen by whoever watches the calls around them."""
    with telling(None), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return _medians(layer)


def _medians(layer: Layer) -> Times:
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode(False), torch.set_grad_enabled(layer.needs_grad):
        calls = [_call(layer, ours) for ours in (True, False)]
        for call in calls:
            call()
        while len(seconds[0]) < _MOST:
            for call, own in zip(calls, seconds, strict=True):
                begin = time.perf_counter()
                call()
                own.append(time.perf_counter() - begin)
            if len(seconds[0]) >= _FEWEST and min(map(sum, seconds)) > _SECONDS:
                break
    return Times(*map(statistics.median, seconds))


def _call(layer: Layer, ours: bool):
    """A function that runs the layer, and its backward pass where there is one."""
    from fastres.ops import conv_bn_act  # which asks takes_ours
    from fastres.packing import keep_packed

    generator = torch.Generator().manual_seed(0)
    dtype, weight_dtype = (getattr(torch, name) for name in (layer.dtype, layer.weight_dtype))

    def randn(size, dtype):
        values = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    input, weight = randn(layer.input, dtype), randn(layer.weight, weight_dtype)
    channels = layer.weight[0]
    mean, bias = torch.zeros(2, channels, dtype=torch.float32, device="cpu")
    var, factor = torch.ones(2, channels, dtype=torch.float32, device="cpu")
    geometry = (layer.stride, layer.padding, layer.dilation, layer.input[1] // layer.weight[1])
    with torch.no_grad():
        size = torch.nn.functional.conv2d(input[:1].float(), weight.float(), None, *geometry).shape
    residual = randn((layer.input[0], *size[1:]), dtype) if layer.residual else None
    grad = randn((layer.input[0], *size[1:]), dtype)
    learned = [weight, factor, bias]
    learned += [input] if layer.needs_input_grad else []
    learned += [residual] if layer.residual else []
    for tensor in learned:
        tensor.requires_grad_(layer.needs_grad)
    if layer.packed:
        keep_packed(weight)
    arguments = (input, weight, mean, var, factor, bias, residual, None)
    arguments += (*geometry, layer.training, 0.1, 1e-5, True, None)

    def call() -> None:
        autocast = torch.autocast("cpu", dtype, enabled=dtype != weight_dtype)
        with forcing(ours), autocast:
            output = conv_bn_act(*arguments)
        if layer.needs_grad:
            torch.autograd.grad(output, learned, grad)

    return call
