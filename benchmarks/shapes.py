"""Random layers on the CPU: whether any is slower fused than stock.

    python benchmarks/shapes.py [--count 200] [--seed 0] [--tune on|off] [--json results.json]

A layer is a convolution, its batch norm, with or without a residual, and a ReLU: a forward and a backward
pass of it, or a forward in evaluation. The choices are kept for this run alone.
"""

import argparse
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bandwidth import interleave
from torch import nn

from fastres import sites, tuning
from fastres.progress import shown
from fastres.timing import Machine, Spread, ratios

_MOST_FLOPS = 2e9
_SECONDS = 0.2  # of each side
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_layer(choose: random.Random) -> dict:
    while True:
        kernel = choose.choice([1, 1, 1, 3, 3, 3, 5, 7])
        layer = {
            "mode": choose.choice(["train", "train", "infer"]),
            "dtype": choose.choice(list(DTYPES)),
            "batch": choose.choice([1, 2, 4, 8, 16, 32]),
            "channels": [choose.choice([3, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512]) for _ in range(2)],
            "side": choose.choice([4, 7, 8, 14, 16, 28, 32, 56]),
            "kernel": kernel,
            "stride": choose.choice([1, 1, 2]),
            "residual": choose.random() < 0.3,
            "groups": 1,
        }
        if choose.random() < 0.15:
            channels, of_group = choose.choice([64, 128, 256, 512, 1024]), choose.choice([4, 8, 16, 32, 64])
            layer |= {"channels": [channels] * 2, "groups": channels // of_group}
        pixels = (layer["side"] // layer["stride"]) ** 2 * layer["batch"]
        flops = 2 * pixels * kernel**2 * layer["channels"][0] * layer["channels"][1] // layer["groups"]
        if pixels > 1 and 1e6 < flops < _MOST_FLOPS:
            return layer


def measure(layer: dict) -> Spread:
    """Of stock's time / ours."""
    in_channels, channels = layer["channels"]
    training, dtype = layer["mode"] == "train", DTYPES[layer["dtype"]]
    geometry = (layer["kernel"], layer["stride"], layer["kernel"] // 2, 1, layer["groups"])
    conv = nn.Conv2d(in_channels, channels, *geometry, bias=False)
    conv, bn = conv.to(memory_format=torch.channels_last), nn.BatchNorm2d(channels).train(training)

    def randn(*size: int) -> torch.Tensor:
        values = torch.randn(size).to(dtype, memory_format=torch.channels_last)
        return values.requires_grad_(training)

    input = randn(layer["batch"], in_channels, layer["side"], layer["side"])
    with torch.no_grad():
        size = conv(input.float()).shape
    residual, grad = (randn(*size) if layer["residual"] else None), torch.ones(size, dtype=dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
        with torch.set_grad_enabled(training), autocast:
            output = sites.conv_bn_act(conv, bn, None, input, residual, relu=True)
        if training:
            output.backward(grad)

    def stock() -> None:
        with sites.stock():
            step()

    for call in (step, stock) * 2:
        call()
    seconds = interleave({"ours": step, "stock": stock}, _SECONDS, torch.device("cpu"))
    return Spread.of(ratios(seconds, "stock", "ours"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", choices=["on", "off"], default="on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    choose, results = random.Random(arguments.seed), []
    with TemporaryDirectory() as folder, shown("layers", arguments.count) as advance:
        tuning.mode, tuning.table = arguments.tune, tuning.Table(Path(folder) / "convolutions.json")
        for _ in range(arguments.count):
            layer = random_layer(choose)
            results.append((measure(layer), layer))
            advance()
    results.sort(key=lambda result: result[0].median)
    for spread, layer in results[:15]:
        print(f"{spread.median:5.2f}x ({spread.low:.2f} to {spread.high:.2f})  {json.dumps(layer)}")
    medians = [spread.median for spread, _ in results]
    slower = sum(median < 0.95 for median in medians)
    print(f"{slower} of {len(medians)} layers more than 5 % slower than stock; "
          f"median {Spread.of(medians).median:.2f}x, best {medians[-1]:.2f}x")  # fmt: skip
    machine = Machine.at_hand(torch.device("cpu"))
    print(machine)
    if arguments.json is not None:
        rows = [{**layer, "stock_over_ours": spread.__dict__} for spread, layer in results]
        text = {"machine": machine.as_dict(), "tune": arguments.tune, "layers": rows}
        arguments.json.write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
