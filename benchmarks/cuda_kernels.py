"""What the compiler made of each CUDA kernel: nothing here runs, so that no GPU is needed.

    python benchmarks/cuda_kernels.py [--extension fastres/_C*.so] [--json FILE] [--all]

Of each kernel and architecture in the built extension: registers, bytes of stack (which spills take) and of
its own shared memory, the blocks that a multiprocessor then holds, and how wide the loads and stores in its
machine code are. The *_on_chip kernels are launched with most of a multiprocessor's shared memory on top,
and so with 1 block, or 2. Needs cuobjdump and nvdisasm, which come with CUDA or from PyPI
(nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm). The figures are the compiler's; no time and no bandwidth
follows from them.
"""

import argparse
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

from gpu_report import demangled

ROOT = Path(__file__).parent.parent
THREADS = 256  # csrc/cuda/launch.h: kThreads

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": kB of shared memory of a
# multiprocessor, and its threads. Blocks of so many threads reach no other limit.
MULTIPROCESSORS = {
    "80": (164, 2048),
    "86": (100, 1536),
    "87": (164, 1536),
    "89": (100, 1536),
    "90": (228, 2048),
    "100": (228, 2048),
    "103": (228, 2048),
    "120": (100, 1536),
    "121": (100, 1536),
}
REGISTERS = 65536
RESERVED_SHARED = 1024  # bytes of each block


def blocks_a_multiprocessor(architecture: str, registers: int, shared: int) -> tuple[int, float] | None:
    """Those of THREADS threads that fit at a time, and their share of all threads; None: not known here."""
    limits = MULTIPROCESSORS.get(architecture.removeprefix("sm_").rstrip("af"))
    if limits is None:
        return None
    kilobytes, threads = limits
    registers_a_warp = -(-registers * 32 // 256) * 256  # handed out by the 256
    by_registers = REGISTERS // (registers_a_warp * THREADS // 32)
    by_shared = kilobytes * 1024 // (shared + RESERVED_SHARED)
    blocks = min(by_registers, by_shared, threads // THREADS)
    return blocks, blocks * THREADS / threads


def resources(listing: str) -> dict[tuple[str, str], dict]:
    """(function, architecture): what `cuobjdump --dump-resource-usage` says of it."""
    found, architecture = {}, ""
    names = re.compile(r"arch = (\w+)|Function (\w+):\s+(REG:.*)")
    for arch, function, usage in names.findall(listing):
        architecture = arch or architecture
        if function:
            words = dict(re.findall(r"(\w+):(\d+)", usage))
            found[function, architecture] = {
                "registers": int(words["REG"]),
                "stack_bytes": int(words["STACK"]) + int(words["LOCAL"]),
                # From sm_90 on what is reserved is counted as well, where there is any.
                "shared_bytes": max(0, int(words["SHARED"]) - RESERVED_SHARED * (architecture != "sm_80")),
            }
    return found


# Loads and stores of memory, of shared memory and of the stack (whatever is spilled), and copies from the
# first to the second. .E is an address of 64 bits; what names no width has 32 bits.
ACCESS = re.compile(r"\b(LDGSTS|LDG|STG|LDS|STS|LDL|STL|LD|ST)((?:\.\w+)*)\s")
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


def accesses(listing: str) -> dict[tuple[str, str], Counter]:
    """(function, architecture): the instructions in `cuobjdump -sass`, by kind and width in bits."""
    found, architecture, counter = {}, "", Counter()
    for line in listing.splitlines():
        if "arch = " in line:
            architecture = line.split("arch = ")[1].strip()
        elif "Function : " in line:
            counter = found.setdefault((line.split("Function : ")[1].strip(), architecture), Counter())
        elif access := ACCESS.search(line):
            kind, words = access[1], access[2].split(".")
            counter[kind, next((WIDTHS[word] for word in words if word in WIDTHS), 32)] += 1
    return found


def report(extension: Path) -> list[dict]:
    def cuobjdump(option):
        return subprocess.run(
            ["cuobjdump", option, extension], capture_output=True, text=True, check=True
        ).stdout

    usage, counts = resources(cuobjdump("--dump-resource-usage")), accesses(cuobjdump("-sass"))
    rows = []
    names = demangled([function for function, _ in usage])
    for ((function, architecture), used), name in zip(usage.items(), names, strict=True):
        fits = blocks_a_multiprocessor(architecture, used["registers"], used["shared_bytes"])
        blocks, occupancy = fits or (None, None)
        rows.append(
            {
                "kernel": name,
                "architecture": architecture,
                **used,
                "blocks_a_multiprocessor": blocks,
                "occupancy": occupancy,
                "accesses": {
                    f"{kind}.{width}": count
                    for (kind, width), count in sorted(counts.get((function, architecture), {}).items())
                },
            }
        )
    return sorted(rows, key=lambda row: (row["architecture"], row["kernel"]))


def of_kind(row: dict, kind: str) -> str:
    """`128:4 32:1`, widest first."""
    widths = [name.split(".") for name in row["accesses"]]
    mine = sorted((int(width) for name, width in widths if name == kind), reverse=True)
    return " ".join(f"{width}:{row['accesses'][f'{kind}.{width}']}" for width in mine)


def print_table(rows: list[dict]) -> None:
    kinds = ("LDG", "LDGSTS", "STG", "LDS", "STS")
    width = max(len(row["kernel"]) for row in rows)
    cells = [[of_kind(row, kind) for kind in kinds] for row in rows]
    widths = [max(len(kind), *(len(line[i]) for line in cells)) for i, kind in enumerate(kinds)]
    heads = "  ".join(f"{kind:{w}}" for kind, w in zip(kinds, widths, strict=True))
    print(f"{'kernel':{width}}  arch    regs  stack  shared  blocks  occupancy  {heads}".rstrip())
    for row, line in zip(rows, cells, strict=True):
        counts = "  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True))
        memory = f"{row['registers']:5}{row['stack_bytes']:7}{row['shared_bytes']:8}"
        known = row["occupancy"] is not None
        resident = (
            f"{row['blocks_a_multiprocessor']:8}{row['occupancy']:11.0%}" if known else f"{'unknown':>19}"
        )
        print(f"{row['kernel']:{width}}  {row['architecture']:7}{memory}{resident}  {counts}".rstrip())


def print_summary(rows: list[dict]) -> None:
    for architecture in sorted({row["architecture"] for row in rows}):
        mine = [row for row in rows if row["architecture"] == architecture]
        spilling = sum(row["stack_bytes"] > 0 for row in mine)
        most = max(row["registers"] for row in mine)
        print(f"{architecture}: {len(mine)} kernels, at most {most} registers, {spilling} with a stack")


def is_vector_kernel_of_hopper(row: dict) -> bool:
    """Not one for what fills no vectors of 16 bytes."""
    return row["architecture"] == "sm_90a" and not re.search(r"<\w+, 1\b", row["kernel"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--extension", type=Path, help="(default: the one in fastres/)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--all", action="store_true", help="every architecture and kernel in the table")
    args = parser.parse_args()
    for tool in ("cuobjdump", "nvdisasm"):
        if not shutil.which(tool):
            raise SystemExit(f"cuda_kernels.py: there is no {tool} on the PATH")
    built = [args.extension] if args.extension else sorted((ROOT / "fastres").glob("_C*.so"))
    if not built:
        raise SystemExit("cuda_kernels.py: fastres is not built")
    rows = report(built[0])
    if not rows:
        raise SystemExit(f"cuda_kernels.py: {built[0]} holds no CUDA kernel")
    shown = rows if args.all else [row for row in rows if is_vector_kernel_of_hopper(row)]
    print_table(shown or rows)
    print_summary(rows)
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "measured": "nothing: read from the machine code",
            "threads_a_block": THREADS,
        }
        lines = ",\n".join(json.dumps(row) for row in rows)  # a line a kernel
        args.json.write_text(f'{{"about": {json.dumps(about)}, "kernels": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
