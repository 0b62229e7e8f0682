"""A model's forward on the CPU: fastres against stock PyTorch, torch.compile, OpenVINO and ONNX Runtime.

    pip install -r benchmarks/requirements.txt
    python benchmarks/inference.py [--model resnet50] [--batch 1 16] [--dtype fp32 bf16] [--json out.json]

Those that are not installed are left out. The variants take turns, a few calls each, with a pause before
them: the threads of the one before spin for a while. Printed is each one's time over that of
fastres.optimize_for_inference, the median over the rounds, and its error against float64.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import fastres
from fastres import sites
from fastres.models.by_name import build
from fastres.timing import Machine, Spread, ratios

Call = Callable[[], Tensor]
_PAUSE = 0.3  # seconds
_CALLS = 5  # in a row; the first does not count


def variants(model: nn.Module, images: Tensor, dtype: str, folder: Path) -> dict[str, Call]:
    """Functions of no arguments that give the logits; the first is what the others are compared with."""
    fused = fastres.fuse(model).to(memory_format=torch.channels_last)
    optimized = fastres.optimize_for_inference(model)
    found = {
        "fastres optimized": _in_torch(optimized, images, dtype),
        "fastres": _in_torch(fused, images, dtype),
        "eager": _stock(fused, images, dtype),
        "compile, frozen": _compiled(model, images, dtype),
    }
    onnx = folder / "model.onnx"
    if find_spec("onnx") and (find_spec("onnxruntime") or find_spec("openvino")):
        # The older exporter: the newer one asks for a package more.
        torch.onnx.export(model, (images[:1].contiguous(),), onnx, dynamo=False, input_names=["images"],
                          dynamic_axes={"images": {0: "batch"}})  # fmt: skip
        if find_spec("openvino"):
            found["OpenVINO"] = _openvino(onnx, images, dtype)
        if find_spec("onnxruntime") and dtype == "fp32":  # it has no bf16 convolutions for a CPU
            found["ONNX Runtime"] = _onnxruntime(onnx, images)
    return found


def _in_torch(model: nn.Module, images: Tensor, dtype: str) -> Call:
    def call() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return model(images)

    return call


def _stock(model: nn.Module, images: Tensor, dtype: str) -> Call:
    call = _in_torch(model, images, dtype)

    def stock() -> Tensor:
        with sites.stock():
            return call()

    return stock


def _compiled(model: nn.Module, images: Tensor, dtype: str) -> Call:
    from torch._inductor import config

    config.freezing = True
    stock = fastres.unfuse(model).to(memory_format=torch.channels_last).eval()
    return _stock(torch.compile(stock), images, dtype)


def _openvino(path: Path, images: Tensor, dtype: str) -> Call:
    import openvino

    core = openvino.Core()
    precision = {"fp32": "f32", "bf16": "bf16"}[dtype]
    threads = torch.get_num_threads()
    core.set_property(
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    network = core.read_model(path)
    network.reshape(list(images.shape))
    request = core.compile_model(network, "CPU").create_infer_request()
    array = images.contiguous().numpy()
    return lambda: torch.from_numpy(request.infer([array])[0])


def _onnxruntime(path: Path, images: Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    array = images.contiguous().numpy()
    return lambda: torch.from_numpy(session.run(None, {"images": array})[0])


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, the fastest of each round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(_PAUSE)
            times = []
            for _ in range(_CALLS):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
            seconds[name].append(min(times[1:]))
    return seconds


def error(call: Call, exact: Tensor) -> float:
    """Root mean square, relative to that of the logits."""
    return ((call().double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = fastres.unfuse(build(arguments.model)).eval()
    results = []
    for batch in arguments.batch:
        images = torch.randn(batch, 3, arguments.image_size, arguments.image_size)
        images = images.to(memory_format=torch.channels_last)
        with torch.no_grad():
            exact = fastres.unfuse(model).double()(images.double())
        for dtype in arguments.dtype:
            torch.compiler.reset()
            with TemporaryDirectory() as folder:
                calls = variants(model, images, dtype, Path(folder))
                seconds = measure(calls, arguments.rounds)
                errors = {name: error(call, exact) for name, call in calls.items()}
            first = next(iter(calls))
            print(f"\n{arguments.model}, batch {batch}, {arguments.image_size} pixels, {dtype}")
            for name in calls:
                spread = Spread.of(ratios(seconds, name, first))
                print(
                    f"  {name:18} {1e3 * Spread.of(seconds[name]).median:8.1f} ms   {spread.median:5.2f}x "
                    f"({spread.low:.2f} to {spread.high:.2f})   error {errors[name]:.1e}"
                )
            results.append(
                {"model": arguments.model, "batch": batch, "image_size": arguments.image_size,
                 "dtype": dtype, "seconds": seconds, "errors": errors}
            )  # fmt: skip
    machine = Machine.at_hand(torch.device("cpu"))
    print(f"\n{machine}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine.as_dict(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
