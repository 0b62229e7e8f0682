"""Layers of shapes that nobody chose, by any instruction set."""

import random

import pytest
import torch
from layers import PRECISIONS, Case, assert_accurate, conv_bn_relu, is_node, units

from fastres import _C, ops

pytestmark = pytest.mark.usefixtures("small_layers", "few_values", "one_thread")

ISAS = sorted({isa for isa, _ in units()})


def random_case(choose: random.Random) -> Case:
    groups = choose.choice([1, 1, 1, 2, 4, 8])
    channels = choose.choice([16, 17, 33, 64, 96, 130]), choose.choice([16, 24, 31, 65, 128])
    if groups > 1:
        channels = (groups * choose.choice([4, 8, 16, 32]),) * 2
    kernel = choose.choice([1, 1, 2, 3, 3, 3, 5, 7])
    return Case(
        choose.choice(list(PRECISIONS.values())),
        choose.random() < 0.4,
        kernel,
        channels,
        (choose.choice([1, 2, 3, 5, 8, 14, 17]), choose.choice([1, 2, 3, 4, 7, 13, 19, 33])),
        choose.choice([2, 3, 5, 8, 9, 16]),
        groups=groups,
        stride=choose.choice([1, 1, 2, 3]),
        dilation=choose.choice([1, 1, 1, 2]),
        padding=choose.choice([kernel, kernel // 2, kernel // 2 + 1]),
        training=choose.random() < 0.7,
        activation=choose.choice(["relu", "relu", None]),
    )


def fitting_case(seed: int) -> Case:
    choose = random.Random(seed)
    while True:
        try:
            return random_case(choose)
        except RuntimeError:  # the kernel is larger than the padded image
            pass


@pytest.mark.parametrize("seed", range(150))
def test_a_random_layer(seed):
    case = fitting_case(seed)
    torch.set_num_threads(1 + seed % 2)
    before = _C.cpu_isa()
    _C.select_cpu_isa(ISAS[seed % len(ISAS)])
    try:
        if case.by["activation"]:
            case.keep_off_the_kink()
        stock, reference = case.run(conv_bn_relu), case.run(conv_bn_relu, double=True)
        outputs = []
        ours = case.run(lambda **arguments: outputs.append(ops.conv_bn_relu(**arguments)) or outputs[0])
        dtype = str(case.precision.activations).removeprefix("torch.")
        channels = case.values["input"].size(1), case.values["weight"].size(0)
        covered = case.by["training"] and _C.convolves(dtype, *channels, case.by["groups"])
        covered = covered and case.grad.numel() // channels[1] >= 8 and min(channels) >= 16
        assert is_node(outputs[0]) == covered
    finally:
        _C.select_cpu_isa(before)
    assert ours.keys() == stock.keys()
    for name in ours:
        # PyTorch's bf16 convolutions on AMX read what nobody wrote, of images of one or two pixels' width.
        if reference[name].isfinite().all() and not stock[name].isfinite().all():
            assert not covered or ours[name].isfinite().all(), name
            continue
        assert_accurate(name, ours[name], stock[name], reference[name])
