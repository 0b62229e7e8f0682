"""`fastres doctor`: what is installed, whether it works together, and whether each op computes right.

Nothing of fastres is imported before it is needed, so that a missing extension can be told about.
"""

import argparse
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FACTOR = 1.5  # how many times as far from float64 as stock PyTorch's an op's result may be
_LEAST_TORCH = (2, 10)
_PACKAGE = Path(__file__).parent
_KERNELS = (
    "bn_act_forward",
    "bn_act_eval",
    "bn_act_again",
    "bn_act_backward",
    "bn_relu_max_pool_forward",
    "bn_relu_max_pool_backward",
    "add_relu_forward",
    "add_relu_backward",
    "conv_forward",
    "conv_pack_weight",
    "conv_bn_act_eval",
    "conv_bn_act_infer",
    "conv_bn_act_sequence",
    "conv_backward_input",
    "conv_backward_weight",
    "conv_bn_act_forward",
    "conv_bn_act_backward",
)
_OPS = ("bn_relu", "bn_add_relu", "batch_norm", "add_relu", "conv_bn_relu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`fastres doctor` takes none."""


def run(arguments: argparse.Namespace | None = None) -> int:
    problems = sum(_sections())
    print()
    print(
        "All is well."
        if not problems
        else f"{problems} problem{'s' if problems > 1 else ''}, see FAILED above."
    )
    return 1 if problems else 0


def _sections() -> Iterator[int]:
    """Print section by section, each with its number of problems; stop where the next could only fail."""
    _line("Python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    try:
        import torch
    except Exception as error:
        yield _failed("torch", f"cannot be imported: {error}", "Install it as https://pytorch.org says.")
        return
    _line("torch", torch.__version__)
    try:
        extension = import_module("fastres._C")
    except Exception as error:
        yield _failed("extension", *why_no_extension(error))
        return
    build = extension.build_info()
    _line("fastres", build["version"])
    _line("extension", f"{extension.__file__}, built by {build['compiler']} with torch {build['torch']}")
    devices = []
    try:
        isa = extension.cpu_isa()
    except ValueError as error:
        yield _failed("CPU kernels", str(error), "Unset FASTRES_CPU_ISA, or set it to one of these.")
    else:
        _line("CPU kernels", f"{isa}, of {', '.join(extension.cpu_isas())} that this CPU runs")
        devices.append("cpu")
    _line("CUDA kernels", _cuda_kernels(build))
    _line("CUDA device", _cuda_device(build))
    yield _registered(len(extension.kernels()))
    if torch.cuda.is_available() and build["cuda"]:
        devices.append("cuda")
    for device in devices:
        print(f"\nEach op on {device} against float64, error / allowed error ({FACTOR} x stock PyTorch's):")
        for name in _OPS:
            yield _self_test(name, device)


def _line(title: str, text: str) -> None:
    print(f"{title:14}{text}")


def _failed(title: str, what: str, advice: str) -> int:
    _line(title, f"FAILED  {what}")
    _line("", advice)
    return 1


# ---------------------------------------------------------------------------------------------------------
# the installation


def why_no_extension(error: Exception, package: Path = _PACKAGE) -> tuple[str, str]:
    """What is wrong with fastres._C, which `error` came from importing, and what to do about it."""
    import torch

    build = "Run `pip install --no-build-isolation .` in fastres's source folder."
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _LEAST_TORCH:
        least = ".".join(map(str, _LEAST_TORCH))
        return f"torch is {torch.__version__}, fastres needs {least} or later", "Upgrade torch."
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = sorted(path.name for path in package.glob("_C*.so")) + sorted(
        path.name for path in package.glob("_C*.pyd")
    )
    if not built:
        return f"there is no _C{suffix} in {package}: it was not built", build
    if f"_C{suffix}" not in built:
        return f"{', '.join(built)} is for another Python than this one, which takes _C{suffix}", build
    return f"_C{suffix} cannot be loaded: {error}", f"It may fit another torch or system. {build}"


def _cuda_kernels(build: dict[str, str]) -> str:
    if not build["cuda"]:
        return "none, built for the CPU alone"
    return f"built by CUDA {build['cuda']} for architectures {', '.join(build['cuda_archs'].split())}"


def _cuda_device(build: dict[str, str]) -> str:
    import torch

    from fastres.kernels import runs_on_card

    if torch.version.cuda is None:
        return "none, this torch is for the CPU alone"
    if not torch.cuda.is_available():
        return f"none found by torch (CUDA {torch.version.cuda})"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lacks = "" if not build["cuda"] or runs_on_card(index) else ", which this build has no kernels for"
        names.append(f"{torch.cuda.get_device_name(index)} (architecture {major}{minor}{lacks})")
    return ", ".join(names)


def _registered(kernels: int) -> int:
    import torch

    try:
        import_module("fastres.ops")
    except Exception as error:
        return _failed("ops", f"fastres.ops cannot be imported: {error}", "Install fastres anew.")
    missing = [name for name in (*_OPS, *_KERNELS) if not hasattr(torch.ops.fastres, name)]
    if missing:
        return _failed("ops", f"not registered: {', '.join(missing)}", "Install fastres anew.")
    _line("ops", f"{', '.join(_OPS)} ({len(_KERNELS)} kernel ops, {kernels} CPU kernels)")
    return 0


# ---------------------------------------------------------------------------------------------------------
# the self-test of an op

# Each channel's coefficients are rounded once, so that only the errors of many channels are more than luck.
# And only convolutions of many pixels and channels run on kernels of ours.
_SHAPE = (8, 32, 9, 8)
_DRAWS = 4


def _self_test(name: str, device: str) -> int:
    try:
        quotients = {case: excess for case, excess in _quotients(name, device)}
    except Exception as error:
        _line(name, f"FAILED  {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return 1
    too_far = {case: excess for case, excess in quotients.items() if not excess <= 1}
    if too_far:
        shown = [f"{case} {excess:.3g}" for case, excess in list(too_far.items())[:4]]
        more = len(too_far) - len(shown)
        _line(name, f"FAILED  {'; '.join(shown)}{f'; and {more} more' if more else ''}")
        return 1
    worst = max(quotients, key=quotients.get)
    _line(name, f"ok      {len(quotients)} results, at most {quotients[worst]:.2f} ({worst})")
    return 0


def _quotients(name: str, device: str) -> Iterator[tuple[str, float]]:
    """What was computed and how, and its error / the error that it may have."""
    import torch

    from fastres import ops

    fused, stock = _by_kernels(name, getattr(ops, name)), _stock()[name]
    for training in (True, False):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layout in (torch.contiguous_format, torch.channels_last):
                sides = []
                for draw in range(_DRAWS):
                    drawn = _draw(name, draw, dtype, device)
                    sides.append(
                        (
                            _run(fused, drawn, dtype, layout, training),
                            _run(stock, drawn, dtype, layout, training),
                            _run(stock, drawn, torch.float64, layout, training),
                        )
                    )
                case = f"{str(dtype)[6:]} {str(layout)[6:].removesuffix('_format')}"
                if not training:
                    case += " eval"
                for result in sides[0][0]:
                    pooled = (torch.stack([side[k][result] for side in sides]) for k in range(3))
                    yield f"{result} {case}", _quotient(*pooled)


def _by_kernels(name: str, op: "Callable[..., torch.Tensor]") -> "Callable[..., torch.Tensor]":
    """The op, run by kernels on few values too; an error where PyTorch's own operations run it."""
    from fastres import convolution, kernels, tuning
    from fastres.recording import Record, telling

    def run(*arguments, **options):
        few_values, record = kernels.few_values, Record((), "", True, None)
        kernels.few_values = 0
        try:
            with telling(record), tuning.forcing(ours=True):
                output = op(*arguments, **options)
        finally:
            kernels.few_values = few_values
        if not record.fused:
            raise RuntimeError(f"no kernel ran: {record.reason[1]}")
        if name == "conv_bn_relu" and not record.own_convolution:
            if convolution.covered(*arguments[:2], None, 1, options["padding"], 1, groups=1):
                raise RuntimeError("no kernel ran the convolution, for which there is one")
        return output

    return run


def _stock() -> "dict[str, Callable[..., torch.Tensor]]":
    from torch.nn import functional as F

    def bn_add_relu(input, residual, *batch_norm):
        return F.relu(F.batch_norm(input, *batch_norm) + residual)

    def conv_bn_relu(input, weight, *statistics, training, **_):
        return F.relu(F.batch_norm(F.conv2d(input, weight, padding=1), *statistics, training))

    return {
        "bn_relu": lambda *arguments: F.relu(F.batch_norm(*arguments)),
        "bn_add_relu": bn_add_relu,
        "batch_norm": F.batch_norm,
        "add_relu": lambda input, other: F.relu(input + other),
        "conv_bn_relu": conv_bn_relu,
    }


def _draw(name: str, seed: int, dtype: "torch.dtype", device: str) -> "dict[str, torch.Tensor]":
    """The op's tensors in its order, and its output's gradient, of values that `dtype` holds exactly."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    channels = _SHAPE[1]
    tensors = {"input": randn(*_SHAPE) * 2 + 0.5}
    if name in ("bn_add_relu", "add_relu"):
        tensors["residual" if name == "bn_add_relu" else "other"] = randn(*_SHAPE)
    if name == "conv_bn_relu":
        tensors["weight"] = randn(channels, channels, 3, 3) / 15
    if name != "add_relu":
        tensors["running_mean"], tensors["running_var"] = randn(channels), randn(channels).square() + 0.5
        tensors["bn_weight"], tensors["bn_bias"] = randn(channels), randn(channels)
    tensors["grad"] = randn(*_SHAPE)
    return {name: (t if t.dim() == 1 else t.to(dtype)).double().to(device) for name, t in tensors.items()}


def _run(op, drawn, dtype, layout, training) -> "dict[str, torch.Tensor]":
    """The output, every gradient and the running statistics."""
    import torch

    per_channel = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        name: t.to(per_channel, copy=True) if t.dim() == 1 else t.to(dtype, memory_format=layout, copy=True)
        for name, t in drawn.items()
    }
    grad = tensors.pop("grad")
    statistics = {name: t for name, t in tensors.items() if name.startswith("running")}
    leaves = [t.requires_grad_() for name, t in tensors.items() if name not in statistics]
    options = {"training": training, "padding": 1} if "weight" in tensors else {}
    arguments = list(tensors.values())
    if statistics and not options:
        arguments.append(training)
    with torch.set_grad_enabled(
        training
    ):  # evaluation as it is meant, in which a convolution's weights are folded
        output = op(*arguments, **options)
    if not training:
        return {"output": output}
    output.backward(grad)
    names = [name for name in tensors if name not in statistics]
    gradients = {f"grad of {name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    return {"output": output.detach(), **gradients, **statistics}


def _quotient(value: "torch.Tensor", stock: "torch.Tensor", reference: "torch.Tensor") -> float:
    """The larger one, of root mean square and largest error, of `value`'s error / FACTOR times stock's.

    Where stock is closer to the reference than its dtype can show, the error of the reference rounded
    to that dtype counts: no result can be expected to be closer.
    """
    import torch

    if value.dtype != stock.dtype or value.shape != stock.shape or not value.isfinite().all():
        return float("inf")
    # Half a unit in the last place of the largest value: a lone element's rounding may go either way.
    last_place = torch.finfo(stock.dtype).eps * reference.abs().max().item() / 2
    quotients = []
    for error, slack in ((_root_mean_square, 0.0), (_largest, last_place)):
        floor = error(reference.to(stock.dtype), reference)
        allowed = FACTOR * max(error(stock, reference), floor) + slack
        ours = error(value, reference)
        quotients.append(ours / allowed if allowed else float("inf") if ours else 0.0)
    return max(quotients)


def _root_mean_square(value: "torch.Tensor", reference: "torch.Tensor") -> float:
    return (value.double() - reference).square().mean().sqrt().item()


def _largest(value: "torch.Tensor", reference: "torch.Tensor") -> float:
    return (value.double() - reference).abs().max().item()


if __name__ == "__main__":
    sys.exit(run())
