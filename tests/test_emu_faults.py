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
    for channels, size in ((16, 8), (520, 4), (5, 3)):
        input = torch.randn(2, channels, size, size).contiguous(memory_format=layout)
        emu.batch_norm(input, None, None, None, None, relu=True, training=True)
"""


FLAGS = ["-std=c++17", "-g1", "-fPIC", "-w", "-x", "c++"]


@pytest.fixture(scope="module")
def rest(tmp_path_factory) -> list[Path]:
    """What the library needs beside the forward pass, built once as it is."""
    objects = []
    for name in ("batch_norm_backward", "max_pool_forward", "max_pool_backward", "add_relu"):
        objects.append(tmp_path_factory.mktemp("rest") / f"{name}.o")
        source = CSRC / "cuda" / f"{name}.cu"
        command = ["g++", "-O0", *FLAGS, f"-I{CSRC / 'emu'}", f"-I{CSRC}", "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    return objects


def run_forward(folder: Path, rest: list[Path], sanitizer: str, change) -> str:
    """Build csrc/ as `change(name, text)` edits it, run the forward pass, and return what that printed."""
    for part in ("core", "cpu", "cuda", "emu"):
        shutil.copytree(CSRC / part, folder / part)
    for file in (folder / "cuda").iterdir():
        file.write_text(change(file.name, file.read_text()))
    library = folder / "emu.so"
    watched = [f"-fsanitize={sanitizer}"] if sanitizer else []
    for source in ("emu/api.cpp", "emu/block.cpp", "cuda/launch.cu", "cuda/batch_norm_forward.cu"):
        own = watched
        if sanitizer == "thread" and source == "emu/block.cpp":
            own = ["-DFASTRES_EMU_THREAD_SANITIZER"]
        command = ["g++", "-O1", *own, *FLAGS, f"-I{folder / 'emu'}", f"-I{folder}"]
        subprocess.run([*command, "-c", folder / source, "-o", f"{folder / source}.o"], check=True)
    objects = [*folder.glob("emu/*.o"), *folder.glob("cuda/*.o")]
    subprocess.run(["g++", "-shared", *watched, *objects, *rest, "-o", library], check=True)
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
    printed = run_forward(tmp_path, rest, sanitizer, unchanged)
    assert "ERROR" not in printed and "data race" not in printed and "Traceback" not in printed, printed


@pytest.mark.parametrize(
    "file, number",
    [(f, n) for f, count in (("partial_sums.cuh", 3), ("tile_coefficients.cuh", 2)) for n in range(count)],
)
def test_each_barrier_is_needed(tmp_path, rest, file, number):
    printed = run_forward(tmp_path, rest, "thread", without_barrier(file, number))
    assert "data race" in printed and file in printed, printed


def test_all_barriers_are_tried():
    counts = {f.name: f.read_text().count("__syncthreads();") for f in (CSRC / "cuda").iterdir()}
    assert {name: count for name, count in counts.items() if count} == {
        "partial_sums.cuh": 3,
        "tile_coefficients.cuh": 2,
    }


def test_an_index_past_a_shared_array(tmp_path, rest):
    fault = replaced(
        "partial_sums.cuh", "double staging[kWarps * n * most_lanes]", "double staging[n * most_lanes]"
    )
    printed = run_forward(tmp_path, rest, "address", fault)
    assert "global-buffer-overflow" in printed and "partial_sums.cuh" in printed, printed


def test_an_index_past_the_tensor(tmp_path, rest):
    fault = replaced("sweep.cuh", "i < unroll; ++i, offset +=", "i < unroll; ++i, offset += sweep.pixels +")
    printed = run_forward(tmp_path, rest, "address", fault)
    assert "heap-buffer-overflow" in printed and "storage.cuh" in printed, printed


def test_a_barrier_that_some_threads_never_reach(tmp_path, rest):
    fault = replaced(
        "tile_coefficients.cuh",
        "    __syncthreads();\n    if (",
        "    if (threadIdx.x > 7) __syncthreads();\n    if (",
    )
    printed = run_forward(tmp_path, rest, "", fault)
    assert re.search(
        r"batch_norm_apply .* block 0, thread \d+ waits for ever at .*tile_coefficients.cuh:\d+", printed
    )


def test_a_vector_that_is_not_aligned(tmp_path, rest):
    fault = replaced("sweep.cuh", "% kVectorBytes == 0;", "% 1 == 0;")
    printed = run_forward(tmp_path, rest, "", fault)
    assert re.search(
        r"block 0, thread \d+: a vector of 16 bytes at an address that is \d+ bytes off", printed
    ), printed
