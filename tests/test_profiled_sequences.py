"""fastres.profile of models whose inference runs in sequences: these are measured as they run."""

import time

import pytest
import torch
from sequencing import images, optimized
from torch import nn

import fastres
from fastres import _C, models, recording
from fastres.profiler.walk import Walk

pytestmark = [
    pytest.mark.usefixtures("one_thread", "quick_limits"),
    pytest.mark.skipif(not _C.convolves("float32"), reason="there are no convolutions for this processor"),
]
_SEQUENCE = "fastres::conv_bn_act_sequence"


def walked(model, input, known=None):
    """The walk, and when which of its parts began to work."""
    marks = []
    walk = Walk(
        model,
        lambda part, direction: marks.append((part, time.perf_counter())),
        known,
        lambda part, direction, at: marks.append((part, at)),
    )
    with torch.no_grad(), walk.forward():
        model(input)
    return walk, marks


def test_a_walk_is_told_of_each_layer_of_a_sequence_when_it_began():
    input = images(side=64)
    model = optimized(models.resnet18(num_classes=10), input)
    before = time.perf_counter()
    walk, marks = walked(model, input)
    after = time.perf_counter()
    with torch.no_grad(), recording.record() as records:
        model(input)
    assert [p.record.ran for p in walk.pieces if p.record is not None] == [r.ran for r in records]
    times = [at for _, at in marks]
    assert times == sorted(times) and before < times[0] and times[-1] < after
    begun = [part for part, _ in marks if part != "between blocks" and walk.pieces[part].record is not None]
    assert begun == sorted(set(begun)) and len(begun) == len(records)


def test_the_layers_that_take_longer_are_charged():
    layers = [
        (nn.Conv2d(c, n, 5), nn.BatchNorm2d(n), nn.ReLU()) for c, n in ((32, 8), (8, 256), (256, 256))
    ]
    input = images(side=48, channels=32)
    model = optimized(nn.Sequential(*[module for layer in layers for module in layer]), input)
    shares = []
    for _ in range(5):
        walk, marks = walked(model, input)
        seconds = [end - begin for (_, begin), (_, end) in zip(marks[:-1], marks[1:], strict=True)]
        by_part = {part: s for (part, _), s in zip(marks[:-1], seconds, strict=True)}
        first, *others = [i for i, piece in enumerate(walk.pieces) if piece.record is not None]
        shares.append(by_part[first] / sum(by_part[i] for i in others))
    assert min(shares) < 0.3


def test_known_pieces_are_found_again():
    input = images(side=64)
    model = optimized(models.resnet18(num_classes=10), input)
    one_by_one = Walk(model, lambda part, direction: None)
    with torch.no_grad(), one_by_one.forward():
        model(input)
    walk, marks = walked(model, input, one_by_one.pieces)
    assert walk.is_as_known()
    sites = {index for index, piece in enumerate(one_by_one.pieces) if piece.record is not None}
    assert sites <= {part for part, _ in marks}
    fewer, _ = walked(model.layer1, images(side=16, channels=64), one_by_one.pieces)
    assert not fewer.is_as_known() and not fewer.strange
    other, _ = walked(model, input, one_by_one.pieces[:-9])
    assert other.strange and not other.is_as_known()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_profile_measures_sequences(dtype, tmp_path):
    profile = fastres.profile(
        models.resnet18(num_classes=10), images(side=64), mode="infer", dtype=dtype, repeat=2
    )
    ops = [(block["name"], op) for block in profile.data["blocks"] for op in block["ops"]]
    fused = [op for name, op in ops if op["fused"] and name.startswith("layer")]
    assert len(fused) == 19
    if _C.convolves({"fp32": "float32", "bf16": "bfloat16"}[dtype]):
        assert all(op["called"]["fused"]["forward"] == [_SEQUENCE] for op in fused)
        assert not any(_SEQUENCE in op["called"]["stock"]["forward"] for op in fused)
    for op in fused:
        for variant in ("fused", "stock"):
            assert min(op["seconds"][variant]["forward"]) > 0
    (linear,) = [op for _, op in ops if op["ran"] == "Linear"]
    assert min(linear["seconds"]["fused"]["forward"]) > 0
    profile.show()
    profile.to_html(tmp_path / "report.html")


class Conv(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(32, 32, 3, padding=1, bias=False))


class NormAndRelu(nn.Sequential):
    def __init__(self):
        super().__init__(nn.BatchNorm2d(32), nn.ReLU())


def test_sites_across_modules_are_measured_one_by_one():
    # In a sequence the convolution is one with the batch norm; by itself each module does its own.
    model = nn.Sequential(
        Conv(), NormAndRelu(), Conv(), NormAndRelu(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    profile = fastres.profile(model, images(channels=32), mode="infer", repeat=1)
    ops = [op for block in profile.data["blocks"] for op in block["ops"]]
    assert [op["ran"] for op in ops if op["fused"]]
    assert not any(_SEQUENCE in op["called"]["fused"]["forward"] for op in ops)
