"""Faults planted in the CUDA kernels: the emulator and the sanitizers must report each, with its place."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
# Runs the cases that come line by line, each in a child of its own, and tells when one is over.
SERVE = """
import os, signal, sys, traceback, emu, torch

def run(on_chip, direction):
    emu.use_on_chip(int(on_chip))
    for layout in (torch.channels_last, torch.contiguous_format):
        for channels, size in ((16, 16), (520, 4), (5, 3)):
            input = torch.randn(2, channels, size, size).contiguous(memory_format=layout)
            outputs = emu.batch_norm(input, None, None, None, None, relu=True, training=True)
            if direction == "backward":
                arguments = input, input, None, None, None, *outputs[1:]
                outputs = emu.batch_norm_backward(*arguments, relu=True, training=True)
            for output in outputs:
                if output is not None and not output.isfinite().all():
                    print("not finite")

torch.set_num_threads(1)
for line in sys.stdin:
    library, printed, *case = line.split()
    if os.fork() == 0:
        signal.alarm(300)
        os.environ["FASTRES_EMU_LIBRARY"] = library
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        try:
            run(*case)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
    print("done", flush=True)
"""

FLAGS = ["-std=c++17", "-g1", "-fPIC", "-w", "-x", "c++"]
TWO_LAUNCHES, FORWARD, BACKWARD = (
    f"batch_norm_{name}.cu" for name in ("forward", "forward_on_chip", "backward_on_chip")
)
STATISTICS = "batch_norm_statistics.cu"  # the first of the two
SCHEDULER = ["block.cpp", "card.cpp", "shared_memory.cpp"]
RUNTIMES = {"thread": "libtsan.so", "address": "libasan.so"}

# What tells of a fault.
REPORTS = ("ERROR", "data race", "Traceback", "not finite")

Change = Callable[[str, str], str]  # of a file of csrc/cuda: its name and text -> its text


class Case(NamedTuple):
    """Kernels with a fault in them, and what must be printed about it.

    Attributes:
        name: of the test.
        kernels: the file whose kernels run.
        sanitizer: "thread", "address" or "".
        change: plants the fault.
        told: regular expressions, each of which is to be found; none: nothing is to be reported.
    """

    name: str
    kernels: str
    sanitizer: str
    change: Change
    told: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------
# faults


def unchanged(name: str, text: str) -> str:
    return text


BLOCK_BARRIER, GRID_BARRIER = "__syncthreads();", "cooperative_groups::this_grid().sync();"
BLOCK_BARRIERS = {"partial_sums.cuh": 3, "tile_coefficients.cuh": 2}
GRID_BARRIERS = {FORWARD: 1, BACKWARD: 1}


def without_barrier(file: str, number: int, barrier: str = BLOCK_BARRIER) -> Change:
    def change(name, text):
        if name != file:
            return text
        places = [m.span() for m in re.finditer(re.escape(barrier), text)]
        begin, end = places[number]
        return text[:begin] + text[end:]

    return change


def replaced(file: str, old: str, new: str) -> Change:
    def change(name, text):
        assert name != file or old in text, f"{file} has changed: plant another fault"
        return text.replace(old, new) if name == file else text

    return change


SHORT_ARRAY = replaced("partial_sums.cuh", "double, kWarps * n * most_lanes>", "double, n * most_lanes>")
PAST_THE_TENSOR = replaced(
    "sweep.cuh", "i < unroll; ++i, offset +=", "i < unroll; ++i, offset += sweep.pixels +"
)
NOT_ALIGNED = replaced("sweep.cuh", "% kVectorBytes == 0;", "% 1 == 0;")
NOT_ALL_ARRIVE = replaced(
    "tile_coefficients.cuh",
    "    __syncthreads();\n    if (",
    "    if (threadIdx.x > 7) __syncthreads();\n    if (",
)
NOT_ALL_BLOCKS_ARRIVE = replaced(FORWARD, GRID_BARRIER, f"if (blockIdx.x > 0) {GRID_BARRIER}")
PLAIN_LAUNCH = replaced("launch.h", "cooperative.val.cooperative = 1", "cooperative.val.cooperative = 0")
ANOTHER_STREAM = replaced("launch.h", "config.stream = stream;", "")
HALF_A_WARP = replaced("partial_sums.cuh", "__shfl_xor_sync(0xffffffffu", "__shfl_xor_sync(0xffffu")
OUT_OF_ORDER = replaced(STATISTICS, "begin_in_stream_order();", "")
TOO_FEW_BYTES = replaced("on_chip.cu", "kThreads * kVectorBytes;", "kThreads * kVectorBytes / 2;")

CASES = [
    *(
        Case(f"the_source_as_it_is-{sanitizer}-{kernels}", kernels, sanitizer, unchanged, ())
        for sanitizer in RUNTIMES
        for kernels in (TWO_LAUNCHES, FORWARD, BACKWARD)
    ),
    *(
        Case(
            f"without_barrier_{number}_of_{file}",
            TWO_LAUNCHES,
            "thread",
            without_barrier(file, number),
            ("data race", re.escape(file)),
        )
        for file, count in BLOCK_BARRIERS.items()
        for number in range(count)
    ),
    *(
        Case(
            f"without_the_barrier_of_the_grid_in_{file}",
            file,
            "thread",
            without_barrier(file, 0, GRID_BARRIER),
            ("data race", r"partial_sums\.cuh"),
        )
        for file in GRID_BARRIERS
    ),
    Case(
        "an_index_past_a_shared_array",
        TWO_LAUNCHES,
        "address",
        SHORT_ARRAY,
        ("use-after-poison", r"partial_sums\.cuh"),
    ),
    Case(
        "a_write_past_a_shared_array_without_sanitizers",
        TWO_LAUNCHES,
        "",
        SHORT_ARRAY,
        (r"block 0 wrote \d+ bytes past a shared array of \d+ bytes",),
    ),
    Case(
        "an_index_past_the_tensor",
        TWO_LAUNCHES,
        "address",
        PAST_THE_TENSOR,
        ("heap-buffer-overflow", r"storage\.cuh"),
    ),
    Case(
        "a_barrier_that_some_threads_never_reach",
        TWO_LAUNCHES,
        "",
        NOT_ALL_ARRIVE,
        (r"batch_norm_apply .* block 0, thread \d+ waits for ever at .*tile_coefficients.cuh:\d+",),
    ),
    Case(
        "a_kernel_that_does_not_wait_for_those_ahead",
        TWO_LAUNCHES,
        "",
        OUT_OF_ORDER,
        (r"batch_norm_moments .* block 0, thread \d+: did not wait for the launches ahead of it",),
    ),
    Case(
        "a_launch_on_another_stream",
        TWO_LAUNCHES,
        "",
        ANOTHER_STREAM,
        (r"batch_norm_moments failed to launch .*: not on the caller's stream",),
    ),
    Case(
        "an_exchange_that_leaves_threads_out",
        TWO_LAUNCHES,
        "",
        HALF_A_WARP,
        (r"batch_norm_moments .* block 0, thread \d+: a warp's exchange leaves threads out",),
    ),
    Case(
        "a_vector_that_is_not_aligned",
        TWO_LAUNCHES,
        "",
        NOT_ALIGNED,
        (r"block 0, thread \d+: a vector of 16 bytes at an address that is \d+ bytes off",),
    ),
    Case(
        "a_block_that_never_reaches_the_barrier_of_the_grid",
        FORWARD,
        "",
        NOT_ALL_BLOCKS_ARRIVE,
        (rf"batch_norm_forward_on_chip .* block 1, thread 0 waits for ever at .*{FORWARD}:\d+",),
    ),
    Case(
        "a_barrier_of_the_grid_in_a_plain_launch",
        FORWARD,
        "",
        PLAIN_LAUNCH,
        (rf"thread \d+: a barrier of the grid at .*{FORWARD}:\d+ in a launch that is not cooperative",),
    ),
    *(
        Case(
            f"shared_memory_that_nobody_wrote_yet-{number}",
            BACKWARD if file == BACKWARD else FORWARD,
            "",
            replaced(file, old, new),
            ("not finite",),
        )
        for number, (file, old, new) in enumerate(
            [
                (FORWARD, "kept.wait_for(index);", ""),
                (BACKWARD, "kept.wait_for(index);", ""),
                (
                    "kept_share.cuh",
                    "wait_for_copies_but(fetched_ - 1 - index)",
                    "wait_for_copies_but(fetched_ - index)",
                ),
                ("kept_share.cuh", "if (i < group.valid) copy_16", "if (i + 1 < group.valid) copy_16"),
            ]
        )
    ),
    Case(
        "an_index_past_dynamic_shared_memory",
        FORWARD,
        "address",
        TOO_FEW_BYTES,
        ("use-after-poison", r"kept_share\.cuh"),
    ),
    Case(
        "a_write_past_dynamic_shared_memory_without_sanitizers",
        FORWARD,
        "",
        TOO_FEW_BYTES,
        (r"block 0 wrote 0 bytes past its dynamic shared memory of \d+ bytes",),
    ),
]


# ---------------------------------------------------------------------------------------------------------
# building and running


def compile(source: Path, into: Path, *options: str) -> Path:
    csrc = source.parent.parent
    object = into / f"{source.name}.o"
    command = ["g++", *options, *FLAGS, f"-I{csrc / 'emu'}", f"-I{csrc}", "-c", source, "-o", object]
    subprocess.run(command, check=True)
    return object


@cache
def files_of(source: str) -> frozenset[str]:
    """Names of the files that a source of csrc/cuda is made of."""
    command = ["g++", "-MM", *FLAGS, f"-I{CSRC / 'emu'}", f"-I{CSRC}", CSRC / "cuda" / source]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return frozenset(Path(word).name for word in listed.split())


class AsItIs:
    """Compiles a file of csrc/ as it is, once for each set of options."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._objects, self._lock = folder, {}, threading.Lock()

    def __call__(self, source: str, *options: str) -> Path:
        with self._lock:
            key = (source, *options)
            if key not in self._objects:
                into = self._folder / str(len(self._objects))
                into.mkdir()
                self._objects[key] = compile(CSRC / source, into, *options)
            return self._objects[key]


def build(case: Case, folder: Path, as_it_is: AsItIs) -> Path:
    """The emulator with the case's kernels, and the fault in them, in `folder`."""
    for part in ("core", "cpu", "cuda", "emu"):
        shutil.copytree(CSRC / part, folder / part)
    changed = set()
    for file in (folder / "cuda").iterdir():
        before = file.read_text()
        after = case.change(file.name, before)
        if after != before:
            file.write_text(after)
            changed.add(file.name)
    watched = [f"-fsanitize={case.sanitizer}"] if case.sanitizer else []
    of_scheduler = ["-DFASTRES_EMU_THREAD_SANITIZER"] if case.sanitizer == "thread" else watched
    # The watched ones first: of functions that several objects have, the linker takes the first.
    run = ["launch.cu", "on_chip.cu", case.kernels, *([STATISTICS] if case.kernels == TWO_LAUNCHES else [])]
    objects = [
        compile(folder / "cuda" / source, folder, "-O1", *watched)
        if files_of(source) & changed
        else as_it_is(f"cuda/{source}", "-O1", *watched)
        for source in run
    ]
    objects += [as_it_is(f"emu/{name}", "-O1", *of_scheduler) for name in SCHEDULER]
    objects.append(as_it_is("emu/api.cpp", "-O1", *watched))
    others = sorted(file.name for file in (CSRC / "cuda").glob("*.cu") if file.name not in run)
    objects += [as_it_is(f"cuda/{source}", "-O0") for source in others]
    library = folder / "emu.so"
    subprocess.run(["g++", "-shared", *watched, *objects, "-o", library], check=True)
    return library


class Server:
    """A process that has a sanitizer's runtime and PyTorch, which take seconds to load, and runs cases."""

    def __init__(self, sanitizer: str) -> None:
        self._lock = threading.Lock()
        environment = os.environ | {
            "PYTHONPATH": str(Path(__file__).parent),
            "ASAN_OPTIONS": "detect_leaks=0",
            "TSAN_OPTIONS": "halt_on_error=1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        if sanitizer:
            found = [
                subprocess.run(
                    ["g++", f"-print-file-name={name}"], capture_output=True, text=True
                ).stdout.strip()
                for name in (RUNTIMES[sanitizer], "libstdc++.so.6")
            ]
            environment["LD_PRELOAD"] = " ".join(found)
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, case: Case, library: Path) -> str:
        """What the case's kernels print."""
        on_chip = int(case.kernels != TWO_LAUNCHES)
        direction = "backward" if case.kernels == BACKWARD else "forward"
        printed = library.with_suffix(".txt")
        with self._lock:
            print(library, printed, on_chip, direction, file=self._process.stdin, flush=True)
            assert self._process.stdout.readline() == "done\n", "the server of cases died"
        return printed.read_text()

    def stop(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def printed(request, tmp_path_factory) -> dict[str, Future[str]]:
    """Of the cases that were asked for, by name; side by side, as each keeps one core busy."""
    as_it_is = AsItIs(tmp_path_factory.mktemp("as_it_is"))
    asked = [
        item.callspec.params["case"] for item in request.session.items if "printed" in item.fixturenames
    ]
    servers = {sanitizer: Server(sanitizer) for sanitizer in {case.sanitizer for case in asked}}

    def run(case: Case) -> str:
        return servers[case.sanitizer].run(case, build(case, tmp_path_factory.mktemp("case"), as_it_is))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {case.name: pool.submit(run, case) for case in asked}
    for server in servers.values():
        server.stop()


# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_reported(case, printed):
    text = printed[case.name].result()
    if not case.told:
        assert not any(word in text for word in REPORTS), text
    for told in case.told:
        assert re.search(told, text), text


def test_all_barriers_are_tried():
    texts = {file.name: file.read_text() for file in (CSRC / "cuda").iterdir()}
    for barrier, expected in ((BLOCK_BARRIER, BLOCK_BARRIERS), (GRID_BARRIER, GRID_BARRIERS)):
        counts = {name: text.count(barrier) for name, text in texts.items()}
        assert {name: count for name, count in counts.items() if count} == expected
