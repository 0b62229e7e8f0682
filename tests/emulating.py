"""Instructions that a test gives a meaning of its own, by csrc/emu, as this processor may not have them."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fastres import _C

_INFO = Path("/proc/cpuinfo")
_FLAGS = set(_INFO.read_text().split()) if _INFO.exists() else set()

# The least that gives the processor all of our instruction sets: AMX alone, or AVX-512 as well.
EMULATES = "amx" if "avx512_bf16" in _FLAGS else "avx512"

needs_emulator = pytest.mark.skipif(
    EMULATES == "avx512" and "avx2" not in _C.cpu_isas(), reason="the emulator runs on AVX2"
)


def run(*command, **options) -> str:
    """Return what the command printed, which is told where it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, **options
    )
    if done.returncode:
        raise AssertionError(f"{Path(command[0]).name} exited with {done.returncode}:\n{done.stdout}")
    return done.stdout


def planted(file: Path, old: str, new: str) -> str:
    """The text of the file with a fault in it."""
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} has changed: plant another fault"
    return text.replace(old, new)


def assert_reports(told: str, run_faulty: Callable[[], object]) -> None:
    """That the program with the fault in it fails, and prints what matches `told`."""
    with pytest.raises(AssertionError, match="exited with") as failure:
        run_faulty()
    assert re.search(told, str(failure.value)), failure.value
