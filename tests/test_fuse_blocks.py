"""fuse() on blocks as users write them: fused, and the same numbers."""

import pytest
import torch
from fusing import DTYPE, images, ran, same
from torch import nn
from user_blocks import (
    AddMethod,
    Body,
    Chosen,
    EmptyShortcut,
    Functional,
    InPlaceSum,
    Method,
    OneLine,
    PreActivation,
    Registered,
    ResidualFirst,
    Scaled,
    SharedNorm,
    Shortcut,
    SumAlone,
    SumIntoFreshShortcut,
    TorchRelu,
    Training,
    conv,
)

from fastres.fuse import fuse


@pytest.mark.parametrize(
    "block, expected",
    [
        (OneLine, 1),
        (Functional, 1),
        (TorchRelu, 1),
        (Method, 1),
        (InPlaceSum, 2),
        (SumIntoFreshShortcut, 2),
        (ResidualFirst, 1),
        (AddMethod, 1),
        (PreActivation, 2),
        (SumAlone, 1),
        (Chosen, 1),
        (SharedNorm, 2),
        (Shortcut, 3),
        (EmptyShortcut, 2),
        (Body, 2),
        (Registered, 1),
        (Training, 1),
        (Scaled, 0),  # what is added broadcasts, which no kernel takes
    ],
)
def test_block_is_fused_and_computes_the_same(block, expected):
    stock = block().to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, images(4))
    assert len(ran(fused, images(4))) == expected


def test_the_residual_sum_is_part_of_the_chain():
    assert len(ran(fuse(InPlaceSum().to(DTYPE)), images(4))) == 2  # and no add_relu of its own
    assert "add_relu" not in ran(fuse(InPlaceSum().to(DTYPE)), images(4))


@pytest.mark.parametrize("norm, shape", [(nn.BatchNorm1d, (3, 4, 5)), (nn.BatchNorm3d, (2, 4, 3, 3, 3))])
def test_other_batch_norms_are_fused_with_their_relu(norm, shape):
    stock = nn.Sequential(norm(4), nn.ReLU()).to(DTYPE)
    fused = fuse(stock)
    same(stock, fused, torch.randn(shape, dtype=DTYPE))
    assert len(ran(fused, torch.randn(shape, dtype=DTYPE))) == 1


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}]
)
def test_batch_norm_options(options):
    stock = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, **options), nn.ReLU()).to(DTYPE)
    same(stock, fuse(stock), images(4), modes=(True, True, False))
