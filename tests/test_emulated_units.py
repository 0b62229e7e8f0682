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


def test_its_kernels(package):
    """With one thread, as how work is shared out is no matter of the instruction set; and each dtype on the
    shapes of its own: Winograd's are not for bf16."""
    emulated = "avx512" if EMULATES == "avx512" else "avx512_amx"
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider"]
    chosen = ["-k", f"{emulated} and not 2_threads and not (bfloat16 and winograd)"]
    printed = run_in(package, "-m", "pytest", "-vv", *options, *chosen, *FILES)
    for unit in ("avx512-float32", "avx512_bf16-bfloat16", "avx512_amx-bfloat16"):
        assert unit in printed or not unit.startswith(emulated)
