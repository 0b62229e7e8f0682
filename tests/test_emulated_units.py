"""The kernels of instruction sets that this processor has not, in a library that has them emulated.

Their own tests run once more there, by a Python that finds that library.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
from emulating import EMULATES, needs_emulator, run

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
FILES = [
    *sorted(TESTS.glob("test_convolution*.py")),
    *(TESTS / f"test_{name}.py" for name in ("conv_max_pool", "max_pool", "ops")),
]

pytestmark = needs_emulator


@pytest.fixture(scope="module")
def package() -> Path:
    """A folder with a fastres of such a library, built beside the usual one."""
    build = ROOT / "build" / f"emulates_{EMULATES}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cmake, environment = shutil.which("cmake", path=path), os.environ | {"PATH": path}
    options = [
        f"-DFASTRES_EMULATE={EMULATES}",
        "-DFASTRES_CUDA=off",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
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


def test_the_package_is_the_emulated_one(package):
    told = "import fastres; print(fastres.__file__, *fastres._C.kernels())"
    printed = run_in(package, "-c", told).split()
    assert Path(printed[0]).is_relative_to(package)
    assert "cpu/avx512_amx/conv_load_steps" in printed  # which only AMX's multiplication wants


# Of what runs with the emulated ones. AVX-512's emulation is slow, and bf16's products are the slowest: one
# thread, but for AMX, whose rows come by the sixteen; bf16 not on the shapes of Winograd's algorithm, which
# it is not multiplied by; its pairs not on the pooled convolution's large images, as that has no own loops.
CHOSEN = {
    "amx": "avx512_amx or bfloat16",
    "avx512": "(avx512 or bfloat16) and (avx512_amx or not 2_threads) and not (bfloat16 and winograd)"
    " and not (avx512_bf16 and values_are_those_of_the_parts)",
}


def test_their_tests(package):
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider"]
    printed = run_in(package, "-m", "pytest", "-vv", *options, "-k", CHOSEN[EMULATES], *FILES)
    assert "avx512_amx-bfloat16" in printed
    if EMULATES == "avx512":
        assert "avx512-float32" in printed and "avx512_bf16-bfloat16" in printed
