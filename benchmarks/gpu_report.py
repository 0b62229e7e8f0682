"""What a run of benchmarks/gpu.sh has left in its folder, as one JSON file and one table.

    python benchmarks/gpu_report.py FOLDER [--json FILE] [--kernels]

FOLDER holds stages.tsv, build.log with ptxas's report, and the JSON of bandwidth.py and `fastres bench`.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------
# reading


def kernels(log: str) -> list[dict]:
    """Registers and bytes of shared memory, stack and spills of each kernel, as `ptxas -v` reports them."""
    found = []
    for entry in log.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", entry).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        shared = re.search(r"(\d+) bytes smem", entry)
        found.append(
            {
                "kernel": name,
                "architecture": architecture,
                "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
                "shared_bytes": int(shared[1]) if shared else 0,
                "stack_bytes": int(stack),
                "spill_bytes": int(stores) + int(loads),
            }
        )
    for row, name in zip(found, demangled([row["kernel"] for row in found]), strict=True):
        row["kernel"] = name
    return sorted(found, key=lambda row: row["kernel"])


def demangled(names: list[str]) -> list[str]:
    """`batch_norm_apply_kernel<float, 4>` and the like; the names as they are where c++filt is missing."""
    if not names or not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = (line.replace("(anonymous namespace)::", "") for line in done.stdout.splitlines())
    return [re.sub(r"\w+::", "", re.sub(r"^void |\([^()]*\)$", "", line)) for line in short]


def collect(folder: Path) -> dict:
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    stages = folder / "stages.tsv"
    build = folder / "build.log"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "stages": [
            dict(zip(("stage", "outcome", "seconds", "last_line"), line.split("\t"), strict=True))
            for line in (stages.read_text().splitlines() if stages.exists() else [])
        ],
        "kernels": kernels(build.read_text()) if build.exists() else [],
        "bandwidth": {name: part for name, part in parts.items() if "rows" in part},
        "bench": {name: part for name, part in parts.items() if "variants" in part},
    }


# ---------------------------------------------------------------------------------------------------------
# showing


def print_kernels(rows: list[dict], all_of_them: bool) -> None:
    if not rows:
        print("ptxas reported no kernel")
        return
    spilling = [row for row in rows if row["spill_bytes"] or row["stack_bytes"]]
    shown = rows if all_of_them else spilling
    width = max((len(row["kernel"]) for row in shown), default=0)
    if shown:
        print(f"{'kernel':{width}}  arch    registers  shared  stack  spills (bytes)")
    for row in shown:
        memory = f"{row['shared_bytes']:7} {row['stack_bytes']:6} {row['spill_bytes']:7}"
        print(f"{row['kernel']:{width}}  {row['architecture']:7} {row['registers']:9} {memory}")
    most = max(row["registers"] for row in rows)
    print(f"{len(rows)} kernels, at most {most} registers, {len(spilling)} with spills or a stack\n")


def print_bandwidth(rows: list[dict]) -> None:
    """A line a tensor, a column an op: the share of a copy's bandwidth, and stock's time / fused's."""
    tensors: dict[str, list[dict]] = {}
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        tensors.setdefault(f"{row['dtype']} {shape} {row['layout']}", []).append(row)
    heads = {row["op"] + {"forward": "", "backward": "'"}[row["direction"]]: None for row in rows}
    print("share of a copy's bandwidth, stock's time / fused's (medians; ' is backward)")
    print(f"{'':34}{'copy GB/s':>9}" + "".join(f"{head:>14}" for head in heads))
    for tensor, row_of_ops in tensors.items():
        first = row_of_ops[0]
        seconds = statistics.median(first["fused_s"]) / statistics.median(first["warm_copy_s"])
        copy = first["gb_per_s"] * 2 / first["passes"] * seconds
        cells = (
            f"{row['share_of_warm_copy'][1]:7.0%}{row['stock_over_fused'][1]:6.2f}x" for row in row_of_ops
        )
        print(f"{tensor:34}{copy:9,.0f}" + "".join(cells))


def print_steps(parts: list[dict]) -> None:
    """A line a step and stock variant: the speedup's median and quartiles, the share of its peak memory."""
    print(f"\n{'fused step':60}{'images/s':>9}   stock/fused          of its peak memory")
    for part in parts:
        settings, fused = part["settings"], part["variants"]["fused"]
        step = " ".join(str(settings[key]) for key in ("model", "mode", "dtype", "batch"))
        if settings["cuda_graph"]:
            step += " graph"
        for stock, speedup in part["speedup"].items():
            line = f"{f'{step} against {stock}':60}{fused['images_per_second']:9,.0f}   "
            line += f"{speedup['median']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f})"
            if "peak_bytes" in fused:
                line += f"  {fused['peak_bytes'] / part['variants'][stock]['peak_bytes']:8.0%}"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--kernels", action="store_true", help="list each kernel, not only those that spill"
    )
    args = parser.parse_args()
    result = collect(args.folder)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print_kernels(result["kernels"], args.kernels)
    machines = [part["machine"] for part in (*result["bandwidth"].values(), *result["bench"].values())]
    for about in machines[:1]:
        known = (about[key] for key in ("gpu", "gpu_clocks", "cpu", "torch") if about[key])
        print("; ".join((*known, result["date"])))
    if result["bandwidth"]:
        print_bandwidth([row for part in result["bandwidth"].values() for row in part["rows"]])
    if result["bench"]:
        print_steps(list(result["bench"].values()))


if __name__ == "__main__":
    main()
