"""How near each fused op comes to the memory's limit, and how it compares with stock PyTorch.

    python benchmarks/bandwidth.py [--device cuda] [--batch 256] [--dtypes fp32 bf16] [--all-shapes]
                                   [--contiguous] [--json results.json]

Bytes moved per second, their share of what a copy of the same tensor reaches in the same run, and the time
of stock PyTorch's ops over ours. On a GPU each call begins with a cold L2 cache.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from cases import LARGE, OTHERS, cases, copies, input_of

from fastres.timing import Machine, clock_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def interleave(
    sides: dict, seconds: float, device: torch.device, least: int = 7
) -> dict[object, list[float]]:
    """Seconds of each call, in rounds, for so many seconds and at least `least` rounds.

    The order is drawn anew in each round: who runs second on the same tensors finds them in a CPU's caches.
    """
    clock = clock_of(device)
    marks: dict[object, list] = {name: [] for name in sides}
    for run in sides.values():
        run()
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(marks.values()))) < least:
        for name in order.sample(list(sides), len(sides)):
            begin = clock.begin()
            sides[name]()
            marks[name].append((begin, clock.end()))
    return {name: [clock.between(*mark) for mark in side] for name, side in marks.items()}


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def measure(
    batch: int, size, dtype_name: str, channels_last: bool, device: torch.device, seconds: float
) -> list[dict]:
    input = input_of(batch, size, DTYPES[dtype_name], channels_last, device)
    measured = cases(input)
    sides = {("copy", into): run for into, run in copies(input).items()}
    for case in measured:
        sides[case.op, case.direction, "fused"] = case.fused
        sides[case.op, case.direction, "stock"] = case.stock
    times = interleave(sides, seconds, device)
    pass_bytes = input.numel() * input.element_size()
    rows = []
    for case in measured:
        fused, stock = (times[case.op, case.direction, side] for side in ("fused", "stock"))
        row = {
            "op": case.op,
            "direction": case.direction,
            "dtype": dtype_name,
            "shape": [batch, *size],
            "layout": "channels_last" if channels_last else "contiguous",
            "passes": case.passes,
            "gb_per_s": case.passes * pass_bytes / statistics.median(fused) / 1e9,
            "stock_over_fused": quartiles([s / f for s, f in zip(stock, fused, strict=True)]),
            "fused_s": fused,
            "stock_s": stock,
        }
        for into in ("fresh", "warm"):
            copy = times["copy", into]
            row[f"share_of_{into}_copy"] = quartiles(
                [case.passes / 2 * c / f for c, f in zip(copy, fused, strict=True)]
            )
            row[f"{into}_copy_s"] = copy
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--all-shapes", action="store_true", help="ResNet-50's other shapes as well")
    parser.add_argument(
        "--contiguous", action="store_true", help="contiguous (NCHW) instead of channels_last"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="a shape and dtype")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bandwidth.py: --device cuda: PyTorch finds no CUDA device here")

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print("median (quartiles); share of what a copy reaches: into a fresh tensor, into one in place")
    heads = "".join(f"{head:19}" for head in ("of fresh copy", "of warm copy", "stock/fused"))
    print(f"{'op':12}{'':9}{'dtype':6}{'shape':15}{'GB/s':>6}  {heads}".rstrip())
    rows = []
    for size in LARGE + (OTHERS if args.all_shapes else []):
        for dtype in args.dtypes:
            for row in measure(args.batch, size, dtype, not args.contiguous, device, args.seconds):
                ratios = "".join(
                    f"{f'{middle:.2f} ({low:.2f}-{high:.2f})':19}"
                    for low, middle, high in (
                        row["share_of_fresh_copy"],
                        row["share_of_warm_copy"],
                        row["stock_over_fused"],
                    )
                )
                print(
                    f"{row['op']:12}{row['direction']:9}{dtype:6}{'x'.join(map(str, row['shape'])):15}"
                    f"{row['gb_per_s']:6.1f}  {ratios}".rstrip(),
                    flush=True,
                )
                rows.append(row)
    machine = Machine.at_hand(device)
    print(machine)
    if args.json:
        about = {**machine.as_dict(), "date": time.strftime("%Y-%m-%d")}
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
