"""Batch norm in training, by size of tensor: launches that overlap, and one with its tensors on the chip.

    python benchmarks/tune.py [--device cuda] [--batches 8 32 128] [--dtypes bf16 fp32] [--json FILE]

A call's median seconds for each choice: launches one after the other, those that may overlap the ones ahead
(fastres._C.overlap_launches), and one launch of 1 or 2 blocks a multiprocessor (fastres._C.use_on_chip).
A tensor that does not fit on the chip takes several launches whatever was chosen: its columns are equal but
for noise. Each call begins with a cold L2 cache.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from bandwidth import DTYPES, interleave
from cases import LARGE, OTHERS, cases, input_of

from fastres import _C
from fastres.timing import Machine

# Name -> blocks a multiprocessor, and whether launches overlap.
CHOICES = {"apart": (0, False), "overlapping": (0, True), "1 block": (1, False), "2 blocks": (2, False)}


def chosen(blocks: int, overlap: bool, run):
    """`run` with that choice; the choice is nothing to a library without CUDA."""

    def call():
        if hasattr(_C, "use_on_chip"):
            _C.use_on_chip(blocks)
            _C.overlap_launches(overlap)
        run()

    return call


def measure(batch: int, size, dtype: str, device: torch.device, seconds: float) -> list[dict]:
    input = input_of(batch, size, DTYPES[dtype], True, device)
    measured = [case for case in cases(input) if case.op != "add_relu"]
    sides = {
        (case.op, case.direction, name): chosen(*choice, case.fused)
        for case in measured
        for name, choice in CHOICES.items()
    }
    times = interleave(sides, seconds, device)
    return [
        {
            "op": case.op,
            "direction": case.direction,
            "dtype": dtype,
            "shape": [batch, *size],
            "bytes": input.numel() * input.element_size(),
            "seconds": {name: statistics.median(times[case.op, case.direction, name]) for name in CHOICES},
        }
        for case in measured
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--seconds", type=float, default=1.0, help="a shape and dtype")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not (torch.cuda.is_available() and hasattr(_C, "use_on_chip")):
        raise SystemExit(
            "tune.py: --device cuda: there is no CUDA device, or fastres was built without CUDA"
        )
    torch.manual_seed(0)
    device = torch.device(args.device)
    launches = []
    apart, *others = CHOICES
    titles = "".join(f"{name:>13}" for name in others)
    print(f"{'op':12}{'':9}{'dtype':6}{'shape':16}{'MB':>7}{apart + ', us':>11}{titles}")
    for size in sorted(LARGE + OTHERS, key=lambda size: size[0] * size[1] * size[2]):
        for batch in args.batches:
            for dtype in args.dtypes:
                for row in measure(batch, size, dtype, device, args.seconds):
                    seconds = row["seconds"]
                    ratios = "".join(f"{seconds[apart] / seconds[name]:12.2f}x" for name in others)
                    shape = "x".join(map(str, row["shape"]))
                    print(
                        f"{row['op']:12}{row['direction']:9}{dtype:6}{shape:16}"
                        f"{row['bytes'] / 1e6:7.1f}{seconds[apart] * 1e6:11.1f}{ratios}",
                        flush=True,
                    )
                    launches.append(row)
    if args.json:
        about = {**Machine.at_hand(device).as_dict(), "date": time.strftime("%Y-%m-%d")}
        args.json.write_text(json.dumps({"machine": about, "launches": launches}, indent=1) + "\n")


if __name__ == "__main__":
    main()
