"""csrc/cuda/tensor_core.cuh: its products under the emulator, faults that must be told, and on a GPU."""

import shutil
from pathlib import Path

import pytest
import torch
from emulating import assert_reports, planted, run

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCE = ROOT / "tests" / "tensor_core.cu"
SCHEDULER = [CSRC / "emu" / f"{name}.cpp" for name in ("block", "card", "shared_memory")]
LAUNCH = CSRC / "cuda" / "launch.cu"


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """The objects that no fault changes."""
    folder = tmp_path_factory.mktemp("scheduler")
    flags = ["-std=c++17", "-O1", "-w", "-x", "c++", f"-I{CSRC / 'emu'}", f"-I{CSRC}"]
    run("g++", *flags, "-c", *SCHEDULER, LAUNCH, cwd=folder)
    return sorted(folder.glob("*.o"))


def emulated(folder: Path, source: str, scheduler: list[Path]) -> str:
    """What the program with this source prints."""
    changed, program = folder / "changed.cpp", folder / "program"
    changed.write_text(source)
    includes = [f"-I{CSRC / 'emu'}", f"-I{CSRC}"]
    run("g++", "-std=c++17", "-O1", "-w", *includes, changed, *scheduler, "-o", program)
    return run(program)


def test_multiplies_as_plain_loops_do(tmp_path, scheduler):
    assert emulated(tmp_path, SOURCE.read_text(), scheduler) == "all sums agree\n"


FAULTS = {
    "without the barrier": ("__syncthreads();", "", "wrong sums"),
    "without waiting for copies": ("wait_for_copies_but(0);", "", "wrong sums"),
    "rows of a that are not aligned": (
        "+ k + lane / 16 * 8)",
        "+ k + lane / 16 * 8 + 1)",
        r"thread \d+: a vector of 16 bytes at an address that is 2 bytes off",
    ),
    "rows of a in another order": ("lane % 16)", "lane / 2)", "wrong sums"),
    "b not turned": ("load_matrices<true>", "load_matrices<false>", "wrong sums: bf16, row"),
    "b turned twice": (
        "load_matrices<false>(of_b",
        "load_matrices<true>(of_b",
        "wrong sums: bf16, turned",
    ),
    "columns of b in another order": ("{of_b[0], of_b[1]}", "{of_b[0], of_b[2]}", "wrong sums"),
    "a lane that does not multiply": (
        "multiply_add(tile[1]",
        "if (lane < 31) multiply_add(tile[1]",
        r"thread \d+: a warp's exchange at .*changed.cpp:\d+ meets thread \d+'s at .*changed.cpp:\d+",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(name, tmp_path, scheduler):
    old, new, told = FAULTS[name]
    source = planted(SOURCE, old, new)
    assert_reports(told, lambda: emulated(tmp_path, source, scheduler))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_compiles_to_the_instructions(tmp_path):
    ptx = tmp_path / "kernels.ptx"
    run("nvcc", "-std=c++17", "-arch=sm_80", f"-I{CSRC}", SOURCE, "-ptx", "-o", ptx)
    for instruction in ("ldmatrix.sync.aligned.m8n8.x4.shared", "ldmatrix.sync.aligned.m8n8.x4.trans"):
        assert instruction in ptx.read_text()
    for dtype in ("bf16", "f16"):
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32" in ptx.read_text()


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available() or shutil.which("nvcc") is None, reason="no CUDA device, or no compiler"
)
def test_on_the_device(tmp_path):
    major, minor = torch.cuda.get_device_capability()
    program, machine = tmp_path / "program", f"-arch=sm_{major}{minor}"
    run("nvcc", "-std=c++17", machine, f"-I{CSRC}", SOURCE, LAUNCH, "-o", program)
    assert run(program) == "all sums agree\n"
