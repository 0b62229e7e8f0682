"""Faults planted in the CUDA kernels: the emulator and the sanitizers must report each, with its place."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
RUN = """
import emu, torch
torch.set_num_threads(1)
for layout in (torch.channels_last, torch.contiguous_format):
    for channels, size in ((16, 16), (520, 4), (5, 3)):
        input = torch.randn(2, channels, size, size).contiguous(memory_format=layout)
        outputs = emu.batch_norm(input, None, None, None, None, relu=True, training=True)
        for output in outputs:
            if output is not None and not output.isfinite().all():
                print("not finite")
"""


FLAGS = ["-std=c++17", "-g1", "-fPIC", "-w", "-x", "c++"]
KERNELS = "batch_norm_forward.cu"
SCHEDULER = ["block.cpp", "card.cpp", "shared_memory.cpp"]


# What tells of a fault.
REPORTS = ("ERROR", "data race", "Traceback", "not finite")


def compile(source: Path, into: Path, *options) -> Path:
    csrc = source.parent.parent
    object = into / f"{source.name}.o"
    command = ["g++", *options, *FLAGS, f"-I{csrc / 'emu'}", f"-I{csrc}", "-c", source, "-o", object]
    subprocess.run(command, check=True)
    return object


@pytest.fixture(scope="module")
def rest(tmp_path_factory) -> list[Path]:
    """All kernels, built once as they are."""
    folder = tmp_path_factory.mktemp("rest")
    return [compile(source, folder, "-O0") for source in (CSRC / "cuda").glob("*.cu")]


def run_kernels(folder: Path, rest: list[Path], sanitizer: str, change) -> str:
    """Build the forward pass as `change(name, text)` edits it, run it, and return what that printed."""
    for part in ("core", "cpu", "cuda", "emu"):
        shutil.copytree(CSRC / part, folder / part)
    for file in (folder / "cuda").iterdir():
        file.write_text(change(file.name, file.read_text()))
    watched = [f"-fsanitize={sanitizer}"] if sanitizer else []
    of_scheduler = ["-DFASTRES_EMU_THREAD_SANITIZER"] if sanitizer == "thread" else watched
    sources = ("api.cpp", *SCHEDULER, "launch.cu", KERNELS)
    objects = []
    for name in sources:
        source = folder / ("cuda" if name.endswith(".cu") else "emu") / name
        objects.append(compile(source, folder, "-O1", *(of_scheduler if name in SCHEDULER else watched)))
    objects += [object for object in rest if object.stem not in sources]
    library = folder / "emu.so"
    subprocess.run(["g++", "-shared", *watched, *objects, "-o", library], check=True)
    environment = os.environ | {
        "FASTRES_EMU_LIBRARY": str(library),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    if sanitizer:
        runtime = {"thread": "libtsan.so", "address": "libasan.so"}[sanitizer]
        found = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True
            ).stdout.strip()
            for name in (runtime, "libstdc++.so.6")
        ]
        environment |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, timeout=300
    )
    return done.stdout + done.stderr


def unchanged(name, text):
    return text


def without_barrier(file, number):
    def change(name, text):
        if name != file:
            return text
        places = [m.span() for m in re.finditer(r"__syncthreads\(\);", text)]
        begin, end = places[number]
        return text[:begin] + text[end:]

    return change


def replaced(file, old, new):
    def change(name, text):
        assert name != file or old in text, f"{file} has changed: plant another fault"
        return text.replace(old, new) if name == file else text

    return change


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_the_source_as_it_is_is_clean(tmp_path, rest, sanitizer):
    printed = run_kernels(tmp_path, rest, sanitizer, unchanged)
    assert not any(word in printed for word in REPORTS), printed


@pytest.mark.parametrize(
    "file, number",
    [(f, n) for f, count in (("partial_sums.cuh", 3), ("tile_coefficients.cuh", 2)) for n in range(count)],
)
def test_each_barrier_is_needed(tmp_path, rest, file, number):
    printed = run_kernels(tmp_path, rest, "thread", without_barrier(file, number))
    assert "data race" in printed and file in printed, printed


def test_all_barriers_are_tried():
    counts = {f.name: f.read_text().count("__syncthreads();") for f in (CSRC / "cuda").iterdir()}
    assert {name: count for name, count in counts.items() if count} == {
        "partial_sums.cuh": 3,
        "tile_coefficients.cuh": 2,
    }


SHORT_ARRAY = replaced("partial_sums.cuh", "double, kWarps * n * most_lanes>", "double, n * most_lanes>")


def test_an_index_past_a_shared_array(tmp_path, rest):
    printed = run_kernels(tmp_path, rest, "address", SHORT_ARRAY)
    assert "use-after-poison" in printed and "partial_sums.cuh" in printed, printed


def test_a_write_past_a_shared_array_is_seen_without_sanitizers(tmp_path, rest):
    printed = run_kernels(tmp_path, rest, "", SHORT_ARRAY)
    assert re.search(r"block 0 wrote \d+ bytes past a shared array of \d+ bytes", printed), printed


def test_an_index_past_the_tensor(tmp_path, rest):
    fault = replaced("sweep.cuh", "i < unroll; ++i, offset +=", "i < unroll; ++i, offset += sweep.pixels +")
    printed = run_kernels(tmp_path, rest, "address", fault)
    assert "heap-buffer-overflow" in printed and "storage.cuh" in printed, printed


def test_a_barrier_that_some_threads_never_reach(tmp_path, rest):
    fault = replaced(
        "tile_coefficients.cuh",
        "    __syncthreads();\n    if (",
        "    if (threadIdx.x > 7) __syncthreads();\n    if (",
    )
    printed = run_kernels(tmp_path, rest, "", fault)
    assert re.search(
        r"batch_norm_apply .* block 0, thread \d+ waits for ever at .*tile_coefficients.cuh:\d+", printed
    )


def test_a_vector_that_is_not_aligned(tmp_path, rest):
    fault = replaced("sweep.cuh", "% kVectorBytes == 0;", "% 1 == 0;")
    printed = run_kernels(tmp_path, rest, "", fault)
    assert re.search(
        r"block 0, thread \d+: a vector of 16 bytes at an address that is \d+ bytes off", printed
    ), printed
