"""What the build says where it cannot do what it is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def configure(folder: Path, *options: str, nvcc: str | None = None) -> subprocess.CompletedProcess:
    """Of CMake, in a folder that may be there already, with this nvcc before all others."""
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if nvcc is not None:
        tools = folder.with_name("tools")
        tools.mkdir(exist_ok=True)
        (tools / "nvcc").write_text(nvcc)
        (tools / "nvcc").chmod(0o755)
        path.insert(0, str(tools))
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    environment = {**os.environ, "PATH": ":".join(path)}
    environment.pop("CUDACXX", None)
    return subprocess.run([*command, *options], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "option, message",
    [
        ("FASTRES_CUDA=maybe", "FASTRES_CUDA is 'maybe'; it takes auto, on or off."),
        ("FASTRES_CUDA_ARCHS=", "FASTRES_CUDA_ARCHS is empty; it takes architectures"),
        ("FASTRES_CUDA_ARCHS=75;90a", "FASTRES_CUDA_ARCHS: '75' is none of the architectures from 80 on"),
        ("FASTRES_CUDA_ARCHS=90;all", "FASTRES_CUDA_ARCHS: 'all' is none of the architectures"),
        ("FASTRES_EMULATE=all", "FASTRES_EMULATE is 'all'; it takes off, amx or avx512."),
    ],
)
def test_an_option_that_makes_no_sense(option, message, tmp_path):
    done = configure(tmp_path / "build", f"-D{option}")
    assert done.returncode != 0 and message in " ".join(done.stderr.split())


def test_an_nvcc_that_compiles_nothing(tmp_path):
    broken = "#!/bin/sh\nexit 1\n"
    done = configure(tmp_path / "build", "-DFASTRES_CUDA=on", nvcc=broken)
    words = " ".join(done.stderr.split())
    assert (
        done.returncode != 0 and "FASTRES_CUDA=on, but " in words and "nvcc compiles nothing here" in words
    )
    done = configure(tmp_path / "build", "-DFASTRES_CUDA=auto", nvcc=broken)
    assert done.returncode == 0 and "building for the CPU alone" in done.stdout, done.stderr
