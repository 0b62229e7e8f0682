"""How the CUDA kernels are launched: what is told where that fails, and when launches may overlap."""

import re
from pathlib import Path

import emu
import pytest
import torch

from fastres import cases, kernels

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"


def add_relu():
    values = torch.randn(4097)
    return emu.add_relu(values, values)


def batch_norm(on_chip=0):
    with emu.on_chip(on_chip):
        input = torch.randn(2, 64, 7, 7).contiguous(memory_format=torch.channels_last)
        return emu.batch_norm(input, None, None, None, None, relu=True, training=True)


def test_a_failed_launch_is_told_with_its_shape():
    emu.leave_error("an illegal memory access was encountered")
    with pytest.raises(RuntimeError) as error:
        add_relu()
    assert str(error.value) == (
        "fastres: kernel add_relu failed to launch with grid 4, block 256, dynamic shared memory 0: "
        "an illegal memory access was encountered"
    )
    add_relu()  # it was not the launch's own, and is told once


def test_a_cooperative_launch_is_told_with_its_shared_memory():
    emu.leave_error("why")
    with pytest.raises(
        RuntimeError, match=r"_on_chip .* grid \d+, block 256, dynamic shared memory [1-9]\d*: "
    ):
        batch_norm(on_chip=1)


@pytest.mark.parametrize(
    "call, kernel",
    [
        (add_relu, "add_relu"),
        (batch_norm, "batch_norm_moments"),
        (lambda: batch_norm(on_chip=1), "batch_norm_forward_on_chip"),
    ],
    ids=["add_relu", "two_launches", "on_chip"],
)
def test_a_device_that_the_build_has_no_kernels_for(call, kernel):
    with (
        emu.another_device(1, 0),  # of which nothing is remembered: each call fails
        pytest.raises(RuntimeError, match=rf"of kernel {kernel} failed: no kernel image"),
    ):
        call()


@pytest.mark.parametrize("ptx_version, overlap", [(80, False), (90, True), (100, True)])
def test_kernels_overlap_only_where_their_code_waits(ptx_version, overlap):
    """A card that can overlap them may run code for one that cannot."""
    with emu.another_device(2000 + ptx_version, ptx_version):
        before = emu.overlapping_launches()
        add_relu()
        assert emu.overlapping_launches() - before == overlap


def test_each_kernel_waits_before_all_else():
    """The emulator finds out who never waits, but not who waits too late."""
    kernels = re.compile(r"__global__ void[^{;]*\{\s*(.*)")
    first = [kernels.findall(file.read_text()) for file in sorted(CUDA.glob("*.cu*"))]
    found = [statement for statements in first for statement in statements]
    assert len(found) >= 10 and set(found) == {"begin_in_stream_order();"}


@pytest.mark.parametrize(
    "capability, archs, runs",
    [
        ((7, 5), "80 90a 100", False),
        ((8, 0), "80 90a 100", True),
        ((8, 6), "80 90a 100", True),  # of its generation
        ((9, 0), "80 90a 100", True),
        ((9, 0), "90", True),
        ((9, 0), "80 100", False),  # PTX is of the last alone
        ((9, 0), "80", True),  # by PTX
        ((10, 0), "80 90a", False),  # such PTX is of one card
        ((10, 3), "80 90a 100", True),
        ((10, 3), "100a", False),
        ((12, 0), "80 90a 100", True),
        ((12, 0), "", False),
    ],
)
def test_which_cards_a_build_has_kernels_for(capability, archs, runs):
    assert kernels.compiled_for(capability, archs.split()) == runs


def test_a_card_that_the_build_has_no_kernels_for_runs_pytorchs_own_operations(monkeypatch):
    class OnCard:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(kernels, "CUDA", True)
    monkeypatch.setattr(kernels, "runs_on_card", lambda index: False)
    monkeypatch.setattr(cases, "is_special", lambda *tensors: False)
    assert "no kernels for cuda of this compute capability" in cases.why_no_kernel(OnCard())
