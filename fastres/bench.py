"""`fastres bench`: one step of a model with fused layers against the same model with stock layers.

Each variant has its own copy of the model from the same seed and sees the same batch. They take turns
(fastres.timing); what is printed is the median over the rounds of stock's time / fused's time.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastres import _C, options, recording, sites
from fastres.breakdown import PARTS, time_by_part
from fastres.cuda_graph import CudaGraphs, GraphedStep
from fastres.errors import SettingsError, told_as
from fastres.files import replaced
from fastres.fuse import fuse
from fastres.inference import optimize_for_inference
from fastres.models import by_name
from fastres.progress import shown
from fastres.saved import Saved
from fastres.timing import (
    Machine,
    Seconds,
    Spread,
    cudnn_benchmark,
    interleave,
    ratios,
    too_few,
)

# torch.compile's mode; none where stock layers run as they are.
_STOCK_VARIANTS = {
    "eager": None,
    "compile": "default",
    "compile-reduce-overhead": "reduce-overhead",
    "compile-max-autotune": "max-autotune",
}
# Of these, the ones that replay CUDA graphs.
_GRAPHED = {"compile-reduce-overhead", "compile-max-autotune"}
# Calls: the first compiles and makes the optimizer's state, the second runs in the memory so gained. Before
# a graph is captured there are more of them.
_WARM_UP = 2
_WARM_UP_OF_GRAPHS = GraphedStep.WARM_UP + 2


class BenchError(SettingsError):
    """The measurement that was asked for cannot be made; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="resnet50", help=by_name.HELP)
    add("--batch", type=int, default=16, help="images a step (default: %(default)s)")
    add("--image-size", type=int, default=224, help="side of the images (default: %(default)s)")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    add(
        "--mode",
        choices=["train", "infer"],
        default="train",
        help="train: forward, loss, backward, SGD with momentum; infer: forward, by optimize_for_inference "
        "but with --contiguous (default: %(default)s)",
    )
    add(
        "--against",
        default="eager",
        help=f"one or more of {', '.join(_STOCK_VARIANTS)}, with commas (default: %(default)s)",
    )
    add("--cuda-graph", action="store_true", help="capture fused's step on a CUDA device and replay it")
    add("--contiguous", action="store_true", help="memory in NCHW order instead of channels_last")
    add("--repeat", type=int, default=10, help="rounds (default: %(default)s)")
    add("--threads", type=int, help="threads of PyTorch's CPU ops (default here: PyTorch's own choice)")
    add(
        "--breakdown", action="store_true", help="also where the time goes, and the memory of saved tensors"
    )
    add("--json", type=Path, metavar="FILE", help="write every time, with the settings and the machine")


def run(arguments: argparse.Namespace) -> int:
    threads = torch.get_num_threads()
    try:
        against = check(arguments)
        with shown("steps", steps(arguments, against)) as advance:
            result = measure(arguments, against, advance)
        _print(result)
        if arguments.json is not None:
            _write(result, arguments.json)
    except SettingsError as error:
        print(f"fastres bench: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def steps(arguments: argparse.Namespace, against: list[str]) -> int:
    """How often `measure` calls `advance`."""
    rest = arguments.repeat + (2 if arguments.breakdown else 0)
    return sum(_warm_up(name, arguments) + rest for name in ("fused", *against))


def _warm_up(name: str, arguments: argparse.Namespace) -> int:
    graphed = arguments.cuda_graph if name == "fused" else arguments.device == "cuda" and name in _GRAPHED
    return _WARM_UP_OF_GRAPHS if graphed else _WARM_UP


def measure(
    arguments: argparse.Namespace, against: list[str], advance: Callable[[], object] = lambda: None
) -> dict:
    """What is written as JSON. It sets the number of threads, if one is asked for.

    Args:
        arguments: of `fastres bench`, checked.
        against: what `check` returned.
        advance: called after each of `steps(arguments, against)` steps.

    Raises:
        BenchError: the model cannot run these settings.
    """
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    breakdown = {}
    with cudnn_benchmark():
        variants = {name: Variant(name, arguments) for name in ("fused", *against)}
        for variant in variants.values():
            variant.warm_up(advance)
        seconds = interleave({n: v.step for n, v in variants.items()}, arguments.repeat, device, advance)
        machine = Machine.at_hand(device)  # now, while the GPU still has its clocks
        if arguments.breakdown:
            for name, variant in variants.items():
                breakdown[name] = {"seconds": time_by_part(variant.step, device)}
                advance()
                if arguments.mode == "train":
                    with _errors(name):
                        breakdown[name]["saved_bytes"] = variant.saved_bytes()
                advance()
    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    return _result(settings, machine, seconds, breakdown, variants)


_SETTINGS = (
    "model", "batch", "image_size", "dtype", "device", "mode", "cuda_graph", "contiguous", "repeat"
)  # fmt: skip


def _result(
    settings: dict, machine: Machine, seconds: Seconds, breakdown: dict, variants: dict[str, "Variant"]
) -> dict:
    """What is written as JSON, and what is printed of it."""
    spreads = {name: asdict(Spread.of(times)) for name, times in seconds.items()}
    stock = {name: ratios(seconds, name, "fused") for name in seconds if name != "fused"}
    return {
        "settings": settings,
        "machine": machine.as_dict(),
        "variants": {
            name: {
                "images_per_second": settings["batch"] / spreads[name]["median"],
                "seconds": spreads[name],
                "seconds_by_round": seconds[name],
                **({"peak_bytes": variants[name].peak_bytes} if variants[name].peak_bytes else {}),
                **({"breakdown": breakdown[name]} if breakdown else {}),
            }
            for name in seconds
        },
        "speedup": {
            name: {**asdict(Spread.of(values)), "by_round": values} for name, values in stock.items()
        },
        "unfused": variants["fused"].unfused,
        "convolutions": variants["fused"].convolutions,
    }


# ---------------------------------------------------------------------------------------------------------
# what is asked for


def check(arguments: argparse.Namespace) -> list[str]:
    """The stock variants, once everything that was asked for is known to make sense.

    Raises:
        SettingsError: it does not.
    """
    options.check(arguments)
    against = list(dict.fromkeys(filter(None, arguments.against.split(","))))
    if not against or not set(against) <= set(_STOCK_VARIANTS):
        names = ", ".join(_STOCK_VARIANTS)
        raise BenchError(f"--against {arguments.against!r}: expected one or more of {names}, with commas")
    if arguments.cuda_graph and arguments.device != "cuda":
        raise BenchError("--cuda-graph: takes a CUDA device, with --device cuda")
    if arguments.cuda_graph and arguments.breakdown:
        raise BenchError("--breakdown: cannot look into a CUDA graph; leave out --cuda-graph")
    if arguments.device == "cuda" and not _C.build_info()["cuda"]:
        raise BenchError("--device cuda: this fastres was built without CUDA, so nothing would run fused")
    options.check_writable("json", arguments.json)
    return against


# ---------------------------------------------------------------------------------------------------------
# a variant


def _errors(name: str) -> contextlib.AbstractContextManager[None]:
    """Tell what the variant's model says to its input as a BenchError."""
    return told_as(BenchError, f"{name} cannot run these settings")


class Variant:
    """A model and the step that is timed.

    Args:
        name: "fused", "eager" (stock layers), or of torch.compile of stock layers.
        arguments: of `fastres bench`.

    Raises:
        BenchError: the model cannot run these settings.
    """

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        with _errors(name):
            self._set_up(name, arguments)

    def _set_up(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        self.device = torch.device(arguments.device)
        self.training = arguments.mode == "train"
        self.bf16 = arguments.dtype == "bf16"
        self.unfused: dict[str, int] = {}  # why sites ran stock, and how many of them
        self.convolutions = {"fastres": 0, "PyTorch": 0}  # whose run in fused sites, and how many
        self.peak_bytes = 0  # of GPU memory in a step: this variant's own state and what the step adds
        layout = torch.contiguous_format if arguments.contiguous else torch.channels_last
        generator = torch.Generator().manual_seed(0)
        size = arguments.image_size
        images = torch.randn(arguments.batch, 3, size, size, generator=generator)
        labels = torch.randint(2, (arguments.batch,), generator=generator)  # which any classifier has
        self.images, self.labels = images.to(self.device, memory_format=layout), labels.to(self.device)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _model(arguments.model)
        self.model = model.to(self.device, memory_format=layout).train(self.training)
        self.optimizer = None
        if self.training:
            # At so small a rate a batch seen many times is not learned by heart: its gradients would become
            # denormal numbers, which are slow.
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-5, momentum=0.9)
        if name == "fused" and not (self.training or arguments.contiguous):
            model = self.model = optimize_for_inference(self.model, inplace=True)
        mode = _STOCK_VARIANTS.get(name)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(model, mode=mode) if mode else model
        self._take_step = self._train if self.training else self._infer
        if name == "fused" and arguments.cuda_graph:
            self._take_step = GraphedStep(self._take_step, CudaGraphs(arguments.device))
        self._warm_up_calls = _warm_up(name, arguments)

    def warm_up(self, advance: Callable[[], object] = lambda: None) -> None:
        """Everything that only the first calls do, and a look at whether the fused model runs fused.

        Raises:
            BenchError: the model cannot run these settings.
        """
        with recording.record() if self.name == "fused" else contextlib.nullcontext([]) as records:
            self.step()
        advance()
        for _ in range(self._warm_up_calls - 1):
            with self._watch_memory():
                self.step()
            advance()
        for record in records:
            if not record.fused:
                reason = record.reason[1]
                self.unfused[reason] = self.unfused.get(reason, 0) + 1
            elif record.ran.startswith("conv"):
                self.convolutions["fastres" if record.own_convolution else "PyTorch"] += 1

    def step(self) -> None:
        """One step.

        Raises:
            BenchError: the model cannot run these settings.
        """
        with _errors(self.name):
            self._take_step(self.images, self.labels)

    def _infer(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(), self._context():
            output = self.forward(images)
        return output, output

    def _train(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), loss.detach()

    def saved_bytes(self) -> int:
        """Memory that the forward keeps for the backward: each storage once, the model's own left out."""
        saved = Saved([*self.model.parameters(), *self.model.buffers()])
        with saved.hooks():
            loss = self._loss(self.images, self.labels)
        loss.backward()
        return saved.bytes.total()

    @contextlib.contextmanager
    def _watch_memory(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        parameters = list(self.model.parameters())
        tensors = [self.images, self.labels, *parameters, *self.model.buffers()]
        tensors += [p.grad for p in parameters]
        if self.optimizer is not None:
            tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        own = sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor) and t.is_cuda)
        others = torch.cuda.memory_allocated(self.device) - own
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        # The most of several: a graph's replay asks for no memory, the steps before did.
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device) - others)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._context():
            output = self.forward(images)
            return F.cross_entropy(getattr(output, "logits", output), labels)

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        layers = contextlib.nullcontext() if self.name == "fused" else sites.stock()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), layers:
            yield


def _model(name: str) -> torch.nn.Module:
    try:
        model = by_name.build(name)
    except ValueError as error:
        raise BenchError(f"--model {name}: {error}") from error
    return fuse(model, inplace=True) if ":" in name else model


# ---------------------------------------------------------------------------------------------------------
# showing and writing


def _print(result: dict) -> None:
    settings = result["settings"]
    print(
        f"{settings['model']}, {settings['mode']}, {settings['batch']} images of "
        f"{settings['image_size']}x{settings['image_size']}, {settings['dtype']}, "
        f"{'contiguous' if settings['contiguous'] else 'channels_last'}, {settings['device']}"
        f"{', fused in a CUDA graph' if settings['cuda_graph'] else ''}"
    )
    print(Machine(**result["machine"]))
    counts = ", ".join(f"{count} {whose}'s" for whose, count in result["convolutions"].items())
    print(f"convolutions of the fused model: {counts}")
    peak = f"{'peak MB':>10}" if settings["device"] == "cuda" else ""
    quartiles = f"quartiles of {settings['repeat']} rounds"
    width = max(map(len, result["variants"])) + 2
    print(f"\n{'':{width}}{'ms/step':>10}{'images/s':>10}{peak}   its time / fused's ({quartiles})")
    for name, variant in result["variants"].items():
        line = (
            f"{name:{width}}{variant['seconds']['median'] * 1e3:10.2f}{variant['images_per_second']:10.1f}"
        )
        if peak:
            line += f"{variant['peak_bytes'] / 1e6:10.1f}"
        if name in result["speedup"]:
            speedup = result["speedup"][name]
            line += f"   {speedup['median']:.2f}x ({speedup['low']:.2f} to {speedup['high']:.2f}): "
            line += too_few(settings["repeat"]) or f"fused is {in_words(speedup)}"
        print(line)
    for reason, count in result["unfused"].items():
        print(f"{count} sites of the fused model ran stock: {reason}")
    breakdowns = {n: v["breakdown"] for n, v in result["variants"].items() if "breakdown" in v}
    if breakdowns:
        _print_breakdown(breakdowns)


def in_words(speedup: dict[str, float]) -> str:
    """faster, slower, or neither where the quartiles lie on both sides of 1."""
    if speedup["low"] > 1:
        return "faster"
    return "slower" if speedup["high"] < 1 else "as fast, within the noise"


def _print_breakdown(breakdowns: dict[str, dict]) -> None:
    width = max(10, *(len(name) + 2 for name in breakdowns))
    print()
    _print_row("ms/step, profiled", breakdowns, width)
    for part in PARTS:
        _print_row(part, [f"{b['seconds'][part] * 1e3:.2f}" for b in breakdowns.values()], width)
    _print_shares("  of stock's", {n: b["seconds"]["the rest"] for n, b in breakdowns.items()}, width)
    saved = {name: breakdown.get("saved_bytes") for name, breakdown in breakdowns.items()}
    if None not in saved.values():
        _print_row("saved MB", [f"{bytes / 1e6:.1f}" for bytes in saved.values()], width)
        _print_shares("  of stock's", saved, width)


def _print_shares(title: str, values: dict[str, float], width: int) -> None:
    """Fused's value as a share of each stock variant's, beneath that variant."""
    shares = [
        "" if name == "fused" or not value else f"{values['fused'] / value:.2f}"
        for name, value in values.items()
    ]
    _print_row(title, shares, width)


def _print_row(title: str, cells: Iterable[str], width: int) -> None:
    print(f"{title:18}" + "".join(f"{cell:>{width}}" for cell in cells))


def _write(result: dict, path: Path) -> None:
    try:
        with replaced(path) as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    except OSError as error:
        raise BenchError(f"--json {path}: {error.strerror}") from error
