"""ResNet-50's convolutions on the CPU, layer by layer: ours and stock PyTorch's, in all three directions.

    python benchmarks/convolutions.py [--dtype bf16] [--batch 16] [--image-size 224] [--json results.json]

Milliseconds of stock / ours, and ours in GFLOP/s; the last line is what a training step adds up to. The
first convolution, of 3 channels, is timed too, though fastres leaves its gradient to PyTorch, and all of it
at small batches.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from bandwidth import DTYPES, interleave, quartiles

import fastres.ops  # noqa: F401  (registers the kernels)
from fastres.timing import Machine

# How often, input channels, output channels, kernel, stride, side of the input for images of 224 pixels.
LAYERS = [
    (1, 3, 64, 7, 2, 224),
    (1, 64, 64, 1, 1, 56),
    (3, 64, 64, 3, 1, 56),
    (4, 64, 256, 1, 1, 56),
    (2, 256, 64, 1, 1, 56),
    (1, 256, 128, 1, 1, 56),
    (1, 128, 128, 3, 2, 56),
    (4, 128, 512, 1, 1, 28),
    (1, 256, 512, 1, 2, 56),
    (3, 512, 128, 1, 1, 28),
    (3, 128, 128, 3, 1, 28),
    (1, 512, 256, 1, 1, 28),
    (1, 256, 256, 3, 2, 28),
    (6, 256, 1024, 1, 1, 14),
    (1, 512, 1024, 1, 2, 28),
    (5, 1024, 256, 1, 1, 14),
    (5, 256, 256, 3, 1, 14),
    (1, 1024, 512, 1, 1, 14),
    (1, 512, 512, 3, 2, 14),
    (3, 512, 2048, 1, 1, 7),
    (1, 1024, 2048, 1, 2, 14),
    (2, 2048, 512, 1, 1, 7),
    (2, 512, 512, 3, 1, 7),
]
DIRECTIONS = ("forward", "input", "weight")


def measure(batch: int, layer, image_size: int, dtype: torch.dtype, seconds: float) -> dict:
    """Of each direction: the times of both sides, and the FLOPs."""
    times, channels, out_channels, kernel, stride, side = layer
    side = side * image_size // 224
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype, memory_format=torch.channels_last)

    input, weight = randn(batch, channels, side, side), randn(out_channels, channels, kernel, kernel)
    by = ([stride] * 2, [kernel // 2] * 2, [1, 1])
    kernels, aten = torch.ops.fastres, torch.ops.aten
    output = torch.nn.functional.conv2d(input, weight, None, *by)
    grad = torch.randn_like(output)

    def stock_backward(*mask: bool):
        return aten.convolution_backward(grad, input, weight, None, *by, False, [0, 0], 1, [*mask, False])

    sides = {
        ("forward", "stock"): lambda: torch.nn.functional.conv2d(input, weight, None, *by),
        ("forward", "ours"): lambda: kernels.conv_forward(input, weight, None, None, *by, False),
        ("input", "stock"): lambda: stock_backward(True, False),
        ("input", "ours"): lambda: kernels.conv_backward_input(grad, weight, input.shape, *by),
        ("weight", "stock"): lambda: stock_backward(False, True),
        ("weight", "ours"): lambda: kernels.conv_backward_weight(grad, input, weight, *by),
    }
    seconds_of = interleave(sides, seconds, torch.device("cpu"), least=5)
    return {
        "layer": layer,
        "flops": 2 * output.numel() * channels * kernel**2,
        **{f"{direction}_{side}_s": seconds_of[direction, side] for direction, side in sides},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=1.0, help="a layer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    machine = Machine.at_hand(torch.device("cpu"))
    print(machine)
    print(f"batch {args.batch}, {args.dtype}; medians: stock / ours in ms, and ours in GFLOP/s")
    heads = "".join(f"{'gradient of ' * (d != 'forward') + d:>26}" for d in DIRECTIONS)
    print(f"{'':26}{heads}")
    total = dict.fromkeys(((d, side) for d in DIRECTIONS for side in ("stock", "ours")), 0.0)
    rows = []
    for layer in LAYERS:
        row = measure(args.batch, layer, args.image_size, DTYPES[args.dtype], args.seconds)
        rows.append(row)
        times, channels, out_channels, kernel, stride, side = layer
        line = f"{times} x {channels:4} -> {out_channels:4} {kernel}x{kernel}/{stride} {side:4}  "
        for direction in DIRECTIONS:
            stock, ours = (quartiles(row[f"{direction}_{side}_s"])[1] for side in ("stock", "ours"))
            total[direction, "stock"] += times * stock
            total[direction, "ours"] += times * ours
            line += f"{stock * 1e3:8.2f} /{ours * 1e3:7.2f}{row['flops'] / ours / 1e9:9.0f}"
        print(line, flush=True)
    line = "".join(
        f"{total[d, 'stock'] * 1e3:8.1f} /{total[d, 'ours'] * 1e3:7.1f}{'':9}" for d in DIRECTIONS
    )
    print(f"{'all':26}{line}")
    if args.json:
        settings = {name: getattr(args, name) for name in ("dtype", "batch", "image_size")}
        args.json.write_text(json.dumps({"machine": asdict(machine), **settings, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
