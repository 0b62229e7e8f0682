"""AMX's convolutions on processors without it: csrc/emu/amx_tiles.h gives its instructions a meaning."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastres import _C

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
MULTIPLY = CSRC / "cpu" / "conv_multiply_amx.h"
INFO = Path("/proc/cpuinfo")

needs_avx512 = pytest.mark.skipif(
    not INFO.exists() or "avx512_bf16" not in INFO.read_text().split(),
    reason="the emulator runs on AVX-512 with bf16",
)
needs_amx = pytest.mark.skipif("avx512_amx" not in _C.cpu_isas(), reason="the processor has no AMX")


def run(*command, **options) -> str:
    """Return what the command printed, which is told where it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, **options
    )
    if done.returncode:
        raise AssertionError(f"{Path(command[0]).name} exited with {done.returncode}:\n{done.stdout}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------
# the whole library


@pytest.fixture(scope="module")
def package() -> Path:
    """A folder with a fastres whose library has AMX emulated, built beside the usual one."""
    build = ROOT / "build" / "amx"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cmake, environment = shutil.which("cmake", path=path), os.environ | {"PATH": path}
    options = ["-DFASTRES_EMULATE_AMX=ON", "-DFASTRES_CUDA=off", f"-DPython_EXECUTABLE={sys.executable}"]
    run(cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *options, env=environment)
    run(cmake, "--build", build, "--target", "_C", env=environment)
    folder = build / "package"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "fastres", folder / "fastres", ignore=shutil.ignore_patterns("_C*.so"))
    (library,) = build.glob("_C*.so")
    shutil.copy(library, folder / "fastres")
    return folder


def run_in(package: Path, *arguments) -> str:
    """By Python, which looks for modules in its working folder first."""
    environment = os.environ | {"FASTRES_CPU_ISA": "avx512_amx"}
    environment.pop("PYTHONPATH", None)
    return run(sys.executable, *arguments, cwd=package, env=environment)


@needs_avx512
def test_the_package_is_the_emulated_one(package):
    printed = run_in(
        package, "-c", "import fastres; print(fastres.__file__, *fastres._C.kernels())"
    ).split()
    assert Path(printed[0]).is_relative_to(package)
    assert "cpu/avx512_amx/conv_load_steps" in printed  # which only AMX's multiplication wants


@needs_avx512
def test_bf16_convolutions(package):
    """All tests of convolutions that are of bf16."""
    files = sorted((ROOT / "tests").glob("test_convolution*.py"))
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider", "-k", "bfloat16"]
    printed = run_in(package, "-m", "pytest", "-vv", *options, *files)
    assert "avx512_amx-bfloat16" in printed


# ---------------------------------------------------------------------------------------------------------
# the multiplication alone, as it is and with faults


def multiply(folder: Path, source: str, emulated: bool) -> str:
    """Build amx_multiply.cpp with this conv_multiply_amx.h, and return what it prints."""
    (folder / "cpu").mkdir()
    (folder / "cpu" / MULTIPLY.name).write_text(source)
    program = folder / "multiply"
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")]
    machine = ["-mavx2", "-mfma", "-mf16c", *avx512, "-mamx-tile", "-mamx-bf16"]
    emulator = ["-DFASTRES_EMULATE_AMX", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    options = ["-std=c++17", "-O1", "-w", *machine, *(emulator if emulated else [])]
    run(*("g++", *options, f"-I{folder}", f"-I{CSRC}", ROOT / "tests" / "amx_multiply.cpp", "-o", program))
    return run(program, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})


@pytest.mark.parametrize(
    "emulated",
    [pytest.param(True, marks=needs_avx512), pytest.param(False, marks=needs_amx)],
    ids=["emulated", "processor"],
)
def test_multiplies_as_plain_loops_do(tmp_path, emulated):
    assert "all sums agree" in multiply(tmp_path, MULTIPLY.read_text(), emulated)


FAULTS = {
    "tiles of a have a row": (
        "wanted.set(kATile + i, tile_rows,",
        "wanted.set(kATile + i, 1,",
        "TDPBF16PS: the sums have not the first operand's rows",
    ),
    "tiles of b have a row": (
        "wanted.set(kBTile + i, width,",
        "wanted.set(kBTile + i, 1,",
        "TDPBF16PS: the first operand has not a word for each row of the second",
    ),
    "b in bytes of a": (
        "wanted.set(kBTile + i, width, amx::kRowBytes)",
        "wanted.set(kBTile + i, width, width * sizeof(float))",
        "TDPBF16PS: the sums have not the second operand's columns",
    ),
    "a row of 128 bytes": (
        "wanted.set(kBTile + i, width, amx::kRowBytes)",
        "wanted.set(kBTile + i, width, 2 * amx::kRowBytes)",
        "LDTILECFG: a row has more than 64 bytes",
    ),
    "steps that are not there": (
        "wanted.set(kBTile + i, width,",
        "wanted.set(kBTile + i, kAmxSide,",
        "heap-buffer-overflow",
    ),
    "rows that are not there": (
        "rows - i * kAmxSide < kAmxSide ? rows - i * kAmxSide : kAmxSide",
        "kAmxSide",
        "heap-buffer-overflow",
    ),
    "no palette": ("wanted.palette = 1;", "", "no configuration is loaded"),
    "another palette": (
        "wanted.palette = 1;",
        "wanted.palette = 2;",
        "LDTILECFG: there is no such palette",
    ),
    "never configured": ("if (differs) amx::load_config(wanted);", "", "no configuration is loaded"),
    "configured once": ("if (differs)", "if (loaded.palette == 0)", "heap-buffer-overflow"),
    "the last steps are left out": ("if (rest > 0)", "if (rest < 0)", "wrong sums"),
    "the last steps alone are left": (
        "{tile.steps - rest, 1, rest}, true)",
        "{tile.steps - rest, 1, rest}, false)",
        "wrong sums",
    ),
    "sums that do not begin at zero": ("amx::zero<kSumsTile + 3>();", ";", "wrong sums"),
    "the same lanes twice": (
        "amx::load<kBTile + 1>(b + kAmxSide,",
        "amx::load<kBTile + 1>(b,",
        "wrong sums",
    ),
    "the same rows twice": ("amx::load<kATile + 1>(a + a_tile,", "amx::load<kATile + 1>(a,", "wrong sums"),
    "the first run's b": (
        "(run * tile.steps + steps.first)",
        "(0 * tile.steps + steps.first)",
        "wrong sums",
    ),
    "sums that replace": (
        "steps / width, width}, tile.add)",
        "steps / width, width}, false)",
        "wrong sums",
    ),
}


@needs_avx512
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(tmp_path, name):
    old, new, report = FAULTS[name]
    source = MULTIPLY.read_text()
    assert source.count(old) == 1, f"{MULTIPLY.name} has changed: plant another fault"
    with pytest.raises(AssertionError, match="multiply exited with") as failure:
        multiply(tmp_path, source.replace(old, new), emulated=True)
    assert report in str(failure.value)
