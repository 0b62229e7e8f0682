"""Faults planted in the CUDA kernels: the emulator and the sanitizers must report each, with its place."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
RUN = """
import sys, emu, torch
torch.set_num_threads(1)
emu.use_on_chip(int(sys.argv[1]))
for layout in (torch.channels_last, torch.contiguous_format):
    for channels, size in ((16, 16), (520, 4), (5, 3)):
        input = torch.randn(2, channels, size, size).contiguous(memory_format=layout)
        outputs = emu.batch_norm(input, None, None, None, None, relu=True, training=True)
        if sys.argv[2] == "backward":
            arguments = input, input, None, None, None, *outputs[1:]
            outputs = emu.batch_norm_backward(*arguments, relu=True, training=True)
        for output in outputs:
            if output is not None and not output.isfinite().all():
                print("not finite")
"""


FLAGS = ["-std=c++17", "-g1", "-fPIC", "-w", "-x", "c++"]
TWO_LAUNCHES, FORWARD, BACKWARD = (
    f"batch_norm_{name}.cu" for name in ("forward", "forward_on_chip", "backward_on_chip")
)
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
def built(tmp_path_factory):
    """Compiles a file of csrc/ as it is, once for each set of options."""
    return cache(
        lambda source, *options: compile(CSRC / source, tmp_path_factory.mktemp("built"), *options)
    )


def run_kernels(folder: Path, built, sanitizer: str, change, kernels: str = TWO_LAUNCHES) -> str:
    """Build `kernels` of csrc/cuda as `change(name, text)` edits it, run it, return what that printed."""
    for part in ("core", "cpu", "cuda", "emu"):
        shutil.copytree(CSRC / part, folder / part)
    for file in (folder / "cuda").iterdir():
        file.write_text(change(file.name, file.read_text()))
    watched = [f"-fsanitize={sanitizer}"] if sanitizer else []
    of_scheduler = ["-DFASTRES_EMU_THREAD_SANITIZER"] if sanitizer == "thread" else watched
    changed = ("launch.cu", "on_chip.cu", kernels)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(lambda name: compile(folder / "cuda" / name, folder, "-O1", *watched), changed)
        )
    objects += [built(f"emu/{name}", "-O1", *of_scheduler) for name in SCHEDULER]
    objects.append(built("emu/api.cpp", "-O1", *watched))
    others = sorted(file.name for file in (CSRC / "cuda").glob("*.cu") if file.name not in changed)
    objects += [built(f"cuda/{name}", "-O0") for name in others]
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
    what = ["0" if kernels == TWO_LAUNCHES else "1", "backward" if kernels == BACKWARD else "forward"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *what], env=environment, capture_output=True, text=True, timeout=300
    )
    return done.stdout + done.stderr


def unchanged(name, text):
    return text


BLOCK_BARRIER, GRID_BARRIER = "__syncthreads();", "cooperative_groups::this_grid().sync();"


def without_barrier(file, number, barrier=BLOCK_BARRIER):
    def change(name, text):
        if name != file:
            return text
        places = [m.span() for m in re.finditer(re.escape(barrier), text)]
        begin, end = places[number]
        return text[:begin] + text[end:]

    return change


def replaced(file, old, new):
    def change(name, text):
        assert name != file or old in text, f"{file} has changed: plant another fault"
        return text.replace(old, new) if name == file else text

    return change


@pytest.mark.parametrize("kernels", [TWO_LAUNCHES, FORWARD, BACKWARD])
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_the_source_as_it_is_is_clean(tmp_path, built, sanitizer, kernels):
    printed = run_kernels(tmp_path, built, sanitizer, unchanged, kernels)
    assert not any(word in printed for word in REPORTS), printed


@pytest.mark.parametrize(
    "file, number",
    [(f, n) for f, count in (("partial_sums.cuh", 3), ("tile_coefficients.cuh", 2)) for n in range(count)],
)
def test_each_barrier_is_needed(tmp_path, built, file, number):
    printed = run_kernels(tmp_path, built, "thread", without_barrier(file, number))
    assert "data race" in printed and file in printed, printed


@pytest.mark.parametrize("file", [FORWARD, BACKWARD])
def test_each_barrier_of_the_grid_is_needed(tmp_path, built, file):
    printed = run_kernels(tmp_path, built, "thread", without_barrier(file, 0, GRID_BARRIER), file)
    assert "data race" in printed and "partial_sums.cuh" in printed, printed


def test_all_barriers_are_tried():
    texts = {file.name: file.read_text() for file in (CSRC / "cuda").iterdir()}
    for barrier, expected in (
        (BLOCK_BARRIER, {"partial_sums.cuh": 3, "tile_coefficients.cuh": 2}),
        (GRID_BARRIER, {FORWARD: 1, BACKWARD: 1}),
    ):
        counts = {name: text.count(barrier) for name, text in texts.items()}
        assert {name: count for name, count in counts.items() if count} == expected


SHORT_ARRAY = replaced("partial_sums.cuh", "double, kWarps * n * most_lanes>", "double, n * most_lanes>")


def test_an_index_past_a_shared_array(tmp_path, built):
    printed = run_kernels(tmp_path, built, "address", SHORT_ARRAY)
    assert "use-after-poison" in printed and "partial_sums.cuh" in printed, printed


def test_a_write_past_a_shared_array_is_seen_without_sanitizers(tmp_path, built):
    printed = run_kernels(tmp_path, built, "", SHORT_ARRAY)
    assert re.search(r"block 0 wrote \d+ bytes past a shared array of \d+ bytes", printed), printed


def test_an_index_past_the_tensor(tmp_path, built):
    fault = replaced("sweep.cuh", "i < unroll; ++i, offset +=", "i < unroll; ++i, offset += sweep.pixels +")
    printed = run_kernels(tmp_path, built, "address", fault)
    assert "heap-buffer-overflow" in printed and "storage.cuh" in printed, printed


def test_a_barrier_that_some_threads_never_reach(tmp_path, built):
    fault = replaced(
        "tile_coefficients.cuh",
        "    __syncthreads();\n    if (",
        "    if (threadIdx.x > 7) __syncthreads();\n    if (",
    )
    printed = run_kernels(tmp_path, built, "", fault)
    assert re.search(
        r"batch_norm_apply .* block 0, thread \d+ waits for ever at .*tile_coefficients.cuh:\d+", printed
    )


def test_a_vector_that_is_not_aligned(tmp_path, built):
    fault = replaced("sweep.cuh", "% kVectorBytes == 0;", "% 1 == 0;")
    printed = run_kernels(tmp_path, built, "", fault)
    assert re.search(
        r"block 0, thread \d+: a vector of 16 bytes at an address that is \d+ bytes off", printed
    ), printed


# ---------------------------------------------------------------------------------------------------------
# what is kept on the chip


def test_a_block_that_never_reaches_the_barrier_of_the_grid(tmp_path, built):
    fault = replaced(FORWARD, GRID_BARRIER, f"if (blockIdx.x > 0) {GRID_BARRIER}")
    printed = run_kernels(tmp_path, built, "", fault, FORWARD)
    assert re.search(
        rf"batch_norm_forward_on_chip .* block 1, thread 0 waits for ever at .*{FORWARD}:\d+", printed
    ), printed


def test_a_barrier_of_the_grid_in_a_plain_launch(tmp_path, built):
    fault = replaced("launch.h", "cooperative.val.cooperative = 1", "cooperative.val.cooperative = 0")
    printed = run_kernels(tmp_path, built, "", fault, FORWARD)
    assert re.search(
        rf"thread \d+: a barrier of the grid at .*{FORWARD}:\d+ in a launch that is not cooperative",
        printed,
    ), printed


@pytest.mark.parametrize(
    "file, old, new",
    [
        (FORWARD, "kept.wait_for(index);", ""),
        (BACKWARD, "kept.wait_for(index);", ""),
        (
            "kept_share.cuh",
            "wait_for_copies_but(fetched_ - 1 - index)",
            "wait_for_copies_but(fetched_ - index)",
        ),
        ("kept_share.cuh", "if (i < group.valid) copy_16", "if (i + 1 < group.valid) copy_16"),
    ],
)
def test_shared_memory_that_nobody_wrote_yet_is_nan(tmp_path, built, file, old, new):
    kernels = file if file == BACKWARD else FORWARD
    printed = run_kernels(tmp_path, built, "", replaced(file, old, new), kernels)
    assert "not finite" in printed, printed


TOO_FEW_BYTES = replaced("on_chip.cu", "kThreads * kVectorBytes;", "kThreads * kVectorBytes / 2;")


def test_an_index_past_dynamic_shared_memory(tmp_path, built):
    printed = run_kernels(tmp_path, built, "address", TOO_FEW_BYTES, FORWARD)
    assert "use-after-poison" in printed and "kept_share.cuh" in printed, printed


def test_a_write_past_dynamic_shared_memory_is_seen_without_sanitizers(tmp_path, built):
    printed = run_kernels(tmp_path, built, "", TOO_FEW_BYTES, FORWARD)
    assert re.search(r"block 0 wrote 0 bytes past its dynamic shared memory of \d+ bytes", printed), printed
