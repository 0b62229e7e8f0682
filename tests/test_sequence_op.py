"""torch.ops.fastres.conv_bn_act_sequence itself."""

import time

import pytest
import torch
from sequencing import images
from torch import library

from fastres import _C

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _C.convolves("float32"), reason="there are no convolutions for this processor"),
]
_COLUMNS = 9


def arguments(count=3, channels=32):
    """Of conv_bn_act_sequence: each step takes the value before, and adds the first."""
    input = images(2, 7, channels)
    tensors, steps = [], []
    for i in range(count):
        weight = torch.randn(channels, channels, 3, 3) / 17
        pack = torch.ops.fastres.conv_pack_weight(weight, input, [1, 1], [1, 1], 1)
        tensors += [weight, pack, None, torch.randn(channels), torch.rand(channels) + 0.5, None, None]
        steps += [i, 0, 1, 1, 1, 1, 1, 1, 1]
    return [[input], tensors, steps, [1e-5] * count, [count - 1, count]]


@pytest.mark.parametrize("timed", [False, True])
def test_opcheck(timed):
    library.opcheck(
        torch.ops.fastres.conv_bn_act_sequence.default,
        [*arguments(), timed],
        test_utils=("test_schema", "test_faketensor"),
    )


def test_times_are_those_of_pythons_clock():
    given = arguments()
    before = time.perf_counter()
    *results, times = torch.ops.fastres.conv_bn_act_sequence(*given, timed=True)
    after = time.perf_counter()
    assert len(times) == 5 and times.tolist() == sorted(times.tolist())
    assert before <= times[0] < times[-1] <= after
    for result, expected in zip(results, torch.ops.fastres.conv_bn_act_sequence(*given), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[0].clear(), "inputs is empty"),
        (lambda a: a[3].clear(), "nine integers for each of eps"),
        (lambda a: a[4].append(0), "that no step makes"),
        (lambda a: a[4].append(4), "that no step makes"),
        (lambda a: a[2].pop(), "nine integers for each of eps"),
        (lambda a: a[1].pop(), "seven for each of eps"),
        (lambda a: a[2].__setitem__(_COLUMNS, 3), "not there yet"),
        (lambda a: a[2].__setitem__(1, -2), "not there yet"),
        (lambda a: a[2].__setitem__(4, 0), "another shape than what it is added to"),
        (lambda a: a[2].__setitem__(2, 0), "stride takes two integers of at least 1"),
        (lambda a: a[1].__setitem__(1, None), "are needed"),
        (lambda a: a[1].__setitem__(3, None), "are needed"),
        (lambda a: a[1].__setitem__(3, torch.zeros(31)), "one value a channel"),
        (
            lambda a: a[1].__setitem__(1, torch.zeros(5, dtype=torch.uint8)),
            "not what conv_pack_weight makes",
        ),
        (lambda a: a[0].append(a[0][0].contiguous()), "inputs is not channels last"),
        (lambda a: a[0].append(a[0][0].double()), "inputs is not of dtype float32"),
        (lambda a: a[0].__setitem__(0, images(2, 7, 16)), "input channels"),
    ],
)
def test_bad_arguments(change, message):
    given = arguments()
    change(given)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastres.conv_bn_act_sequence(*given)
