"""AMX's multiplication, as it is and with faults; csrc/emu gives its instructions a meaning elsewhere."""

import os
import re
from pathlib import Path

import pytest
from emulating import EMULATES, assert_reports, needs_emulator, planted, run

from fastres import _C

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
MULTIPLY = CSRC / "cpu" / "conv_multiply_amx.h"

needs_amx = pytest.mark.skipif("avx512_amx" not in _C.cpu_isas(), reason="the processor has no AMX")
needs_avx512 = pytest.mark.skipif(EMULATES != "amx", reason="takes minutes where AVX-512 is emulated too")


def multiply(folder: Path, source: str, emulated: bool) -> str:
    """Build amx_multiply.cpp with this conv_multiply_amx.h, and return what it prints."""
    (folder / "cpu").mkdir()
    (folder / "cpu" / MULTIPLY.name).write_text(source)
    program = folder / "multiply"
    if emulated and EMULATES == "avx512":
        avx512 = ["-DFASTRES_EMULATE_AVX512", "-DFASTRES_EMULATE_AVX512_BF16"]
    else:
        avx512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")]
    machine = ["-mavx2", "-mfma", "-mf16c", *avx512, "-mamx-tile", "-mamx-bf16"]
    emulator = ["-DFASTRES_EMULATE_AMX", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    options = ["-std=c++17", "-O1", "-w", *machine, *(emulator if emulated else [])]
    run(*("g++", *options, f"-I{folder}", f"-I{CSRC}", ROOT / "tests" / "amx_multiply.cpp", "-o", program))
    return run(program, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})


@pytest.mark.parametrize(
    "emulated",
    [pytest.param(True, marks=needs_emulator), pytest.param(False, marks=needs_amx)],
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
    "never configured": ("amx::load_config(wanted);", "", "no configuration is loaded"),
    "configured once": ("configured.rows == rows &&", "configured.rows > 0 ||", "heap-buffer-overflow"),
    "other rows alone": (" && configured.width == width", "", "heap-buffer-overflow"),
    "other widths alone": ("configured.rows == rows && ", "", "heap-buffer-overflow"),
    "remembered for ever": ("configured = {};", "", "no configuration is loaded"),
    "the last steps are left out": ("if (rest > 0)", "if (rest < 0)", "wrong sums"),
    "the last steps alone are left": (
        "{tile.steps - rest, 1, rest, rest, 0}, true)",
        "{tile.steps - rest, 1, rest, rest, 0}, false)",
        "wrong sums",
    ),
    "sums that do not begin at zero": ("amx::zero<kSumsTile + 3>();", ";", "wrong sums"),
    "the same lanes twice": (
        "amx::load<kBTile + 1>(b + kAmxSide,",
        "amx::load<kBTile + 1>(b,",
        "wrong sums",
    ),
    "the same rows twice": ("amx::load<kATile + 1>(a + a_tile,", "amx::load<kATile + 1>(a,", "wrong sums"),
    "the first run's b": (": run * tile.steps * block;", ": 0;", "wrong sums"),
    "b where the last run ends": ("tile.b_runs ? tile.b_runs[run] :", "", "wrong sums"),
    "slots without gaps": ("tile.in_slots ? kAmxSide : width", "width", "wrong sums"),
    "gaps without slots": ("tile.in_slots ? kAmxSide : width", "kAmxSide", "heap-buffer-overflow"),
    "sums that replace": ("tile.add);\n    if (rest", "false);\n    if (rest", "wrong sums"),
}


@needs_avx512
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(tmp_path, name):
    old, new, report = FAULTS[name]
    source = planted(MULTIPLY, old, new)
    assert_reports(re.escape(report), lambda: multiply(tmp_path, source, emulated=True))
