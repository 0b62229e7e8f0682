"""benchmarks/cuda_kernels.py on listings of cuobjdump, and what it reads from the library at hand."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastres import _C

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import cuda_kernels  # noqa: E402

# Of cuobjdump 13.5.
USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _Z5applyIfLi4EEvPT_:
  REG:255 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Function _Z5applyIfLi4EEvPT_:
  REG:32 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:704 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = sm_90a
		Function : _Z5applyIfLi4EEvPT_
        /*0670*/                   LDG.E R55, [R28.64] ;                     /* 0x000000061c377981 */
        /*1f90*/               @P5 LDG.E.128 R12, [R30.64] ;                 /* 0x000000061e0c5981 */
        /*2020*/              @!P4 LDG.E.128 R16, [R42.64] ;                 /* 0x000000062a105981 */
        /*2030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR8][R4.64] ;
        /*2040*/                   STG.E.U16 [R28.64], R31 ;                 /* 0x0000001f1c007986 */
        /*2050*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
"""


def test_reads_resources():
    usage = cuda_kernels.resources(USAGE)
    assert usage["_Z5applyIfLi4EEvPT_", "sm_80"] == {
        "registers": 255,
        "stack_bytes": 16,
        "shared_bytes": 1024,
    }
    assert usage["_Z5applyIfLi4EEvPT_", "sm_90a"]["shared_bytes"] == 1024


def test_counts_accesses_by_width():
    (counts,) = cuda_kernels.accesses(SASS).values()
    assert counts == {("LDG", 32): 1, ("LDG", 128): 2, ("LDGSTS", 128): 1, ("STG", 16): 1}


# Of NVIDIA's occupancy calculator, for blocks of 256 threads.
@pytest.mark.parametrize(
    "architecture, registers, shared, blocks",
    [
        ("sm_90a", 32, 0, 8),
        ("sm_90a", 33, 0, 6),
        ("sm_90a", 128, 0, 2),
        ("sm_90a", 129, 0, 1),
        ("sm_90a", 64, 100 << 10, 2),
        ("sm_80", 64, 100 << 10, 1),
        ("sm_89", 32, 0, 6),
        ("sm_120", 64, 60 << 10, 1),
    ],
)
def test_blocks_a_multiprocessor(architecture, registers, shared, blocks):
    found, occupancy = cuda_kernels.blocks_a_multiprocessor(architecture, registers, shared)
    assert found == blocks and 0 < occupancy <= 1


def test_an_architecture_that_is_not_known():
    assert cuda_kernels.blocks_a_multiprocessor("sm_777", 32, 0) is None


@pytest.mark.skipif(
    not (_C.build_info()["cuda"] and shutil.which("cuobjdump")),
    reason="built without CUDA, or there is no cuobjdump on the PATH",
)
def test_no_kernel_spills():
    command = ["cuobjdump", "--dump-resource-usage", _C.__file__]
    usage = cuda_kernels.resources(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    assert usage and not [function for function, used in usage.items() if used["stack_bytes"]]
