"""fastres.profile: what it counts, to which block it charges a time, what it says.

No test asks for a speed.
"""

import contextlib
import errno
import io
import json
import re
import time
from pathlib import Path

import pytest
import torch
from fastres._C import cpu_isa
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from fastres import cli, models, recording, sites
from fastres.profiler import Profile, ProfileError, limits, table
from fastres.profiler.advice import advice
from fastres.profiler.blocks import find_blocks
from fastres.profiler.count import Count
from fastres.profiler.walk import Walk

KEPT = Path(__file__).with_name("profile.json")
_copy_speed = limits._copy_speed


pytestmark = pytest.mark.usefixtures("quick_limits")


def images(size=16, batch=2):
    return torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


def blocks_of(model, input):
    walk = Walk(model, lambda part, direction: None)
    with walk.forward():
        model(input)
    return find_blocks(model, walk.pieces)


@pytest.mark.parametrize("stock", [False, True], ids=["fused", "stock"])
def test_blocks_hold_each_site_once_fused_or_not(stock):
    model = models.resnet50(num_classes=10)
    with recording.record() as records:
        model(images(64))
    with sites.stock() if stock else recording.record():
        blocks = blocks_of(model, images(64))
    stages = [f"layer{stage}.{i}" for stage, depth in enumerate((3, 4, 6, 3), 1) for i in range(depth)]
    assert [block.name for block in blocks] == ["stem", *stages, "head"]
    assert [op.name for op in blocks[0].ops] == ["conv1 bn1 relu maxpool"]
    assert [op.name for op in blocks[-1].ops] == ["avgpool", "fc"]
    assert blocks[1].kind == "Bottleneck"
    found = [op for block in blocks for op in block.ops if op.ran.startswith("conv_bn")]
    assert [op.ran for op in found] == [record.ran for record in records]


def test_blocks_of_foreign_models(torchvision, timm):
    from fastres.models.by_name import build

    for name, last in (
        ("torchvision:resnet18", "layer4.1"),
        ("timm:resnet18", "layer4.1"),
        ("transformers:resnet-18", "resnet.encoder.stages.3.layers.1"),
    ):
        blocks = blocks_of(fastres.fuse(build(name)), images(64))
        assert len(blocks) == 10 and blocks[-2].name == last, name


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "transformers:resnet-18"])
def test_foreign_models(name, mode, torchvision, timm):
    from fastres.models.by_name import build

    result = fastres.profile(build(name), images(32), mode=mode, repeat=1)
    fused = [row for row in result.rows if row.data["fused"]]
    assert len(fused) == 20 and all(row.seconds("stock") > 0 for row in fused)


class _Projected(nn.Module):
    """What comes last in its forward is moved before the sum that it is part of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.shortcut = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        out = self.bn(self.conv(x))
        out += self.shortcut(x)
        return self.relu(out)


def test_stock_runs_where_the_sites_are():
    model = fastres.fuse(_Projected())
    pieces = []
    for context in (contextlib.nullcontext(), sites.stock()):
        walk = Walk(model, lambda part, direction: None)
        with context, walk.forward():
            output = model(images())
        pieces.append([piece.modules for piece in walk.pieces])
        assert output.min() == 0
    assert pieces[0] == pieces[1]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_counts_are_the_same_in_inference(context):
    model = fastres.fuse(models.resnet18()).eval()
    flops, bytes = [], []
    for inside in (torch.no_grad, context):
        with inside(), sites.stock(), Count() as count:
            model(images(64))
        flops.append(count.flops.total())
        bytes.append(sum(count.bytes().values()))
    assert flops[0] == flops[1] > 1e8 and bytes[0] == bytes[1]


# Multiply-adds at 224x224, as torchvision's table of weights gives them.
@pytest.mark.parametrize(
    "name, giga",
    [("resnet18", 1.81), ("resnet34", 3.66), ("resnet50", 4.09), ("resnet101", 7.80), ("resnet152", 11.51)],
)
def test_flops_of_a_forward(name, giga):
    model = models.get_model(name).to("meta").eval()
    with sites.stock(), Count() as count:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert round(count.flops.total() / 2e9, 2) == giga


def test_flops_and_bytes_of_each_op_are_those_of_its_shapes():
    model = models.resnet50(num_classes=10)
    result = fastres.profile(model, images(64), repeat=1)
    with sites.stock(), FlopCounterMode(display=False) as counter:
        model(images(64)).sum().backward()
    assert sum(sum(row.data["flops"].values()) for row in result.rows) == counter.get_total_flops()
    row = next(r for r in result.rows if (r.block, r.name) == ("layer1.0", "conv2 bn2 relu"))
    tensor, weight = 2 * 64 * 16 * 16 * 4, 64 * 64 * 9 * 4
    # Forward: x and the weight come in, the convolution's output is kept, and z leaves.
    assert row.data["bytes"]["forward"] == pytest.approx(3 * tensor + weight, rel=0.01)
    # Backward: the gradient, x, the convolution's output, z for its mask, and the weight come in, and the
    # gradients of x and of the weight leave.
    assert row.data["bytes"]["backward"] == pytest.approx(5 * tensor + 2 * weight, rel=0.01)
    assert row.data["flops"] == {
        "forward": 2 * 2 * 256 * 64 * 64 * 9,
        "backward": 4 * 2 * 256 * 64 * 64 * 9,
    }


class Slow(torch.autograd.Function):
    """Identity, whose forward and backward take 20 ms."""

    @staticmethod
    def forward(ctx, input):
        time.sleep(0.02)
        return input.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.02)
        return grad


class SlowBlock(fastres.nn.BasicBlock):
    def forward(self, x):
        return super().forward(Slow.apply(x))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_time_counts_for_the_block_that_takes_it(direction):
    model = models.cifar_resnet20(num_classes=10)
    model.layer2[1].__class__ = SlowBlock
    result = fastres.profile(model, images(), repeat=2)
    for variant in ("fused", "stock"):
        by_block = {}
        for row in result.rows:
            by_block[row.block] = by_block.get(row.block, 0) + row.seconds(variant, direction)
        assert max(by_block, key=by_block.get) == "layer2.1" and by_block["layer2.1"] >= 0.02


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_parts_add_up_and_come_back_from_the_file(mode, dtype, tmp_path):
    model = models.cifar_resnet20(num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fastres.profile(model, images(), mode=mode, dtype=dtype, repeat=2, name="small")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for variant in ("fused", "stock"):
        for index, whole in enumerate(result.data["profiled_step"][variant]):
            parts = sum(row.by_round(variant)[index] for row in result.rows)
            parts += sum(times[variant][index] for times in result.data["rest"].values())
            assert parts == pytest.approx(whole)
    assert (result.saved_bytes("fused") > 0) == (mode == "train")
    path = tmp_path / "profile.json"
    result.to_json(path)
    assert Profile.read(path).data == json.loads(json.dumps(result.data))
    assert "small" in str(result)


def test_says_what_pytorch_saw_of_an_op_in_both_directions():
    model = models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    rows = fastres.profile(model, images(64, batch=8), repeat=1).rows
    called = next(r for r in rows if (r.block, r.name) == ("layer1.0", "conv1 bn1 relu")).data["called"]
    assert {"aten::conv2d", "aten::batch_norm"} <= set(called["stock"]["forward"])
    assert "aten::convolution_backward" in called["stock"]["backward"]
    ours = "fastres::conv_bn_act_{}" if cpu_isa() != "scalar" else "fastres::bn_act_{}"
    assert ours.format("forward") in called["fused"]["forward"]
    assert ours.format("backward") in called["fused"]["backward"]


def test_the_tables_have_each_op_and_the_sums_of_its_block():
    result = fastres.profile(models.cifar_resnet20(num_classes=10), images(), repeat=2)
    shown = io.StringIO()
    result.show(shown)
    blocks, ops = [
        [re.split(r"  +", line.strip()) for line in table.splitlines()]
        for table in shown.getvalue().split("\n\n")[:2]
    ]
    assert "\n".join(blocks.pop(0)) == result.title
    machine, titles, *blocks = blocks
    assert titles == ["block", *ops[0][3:]] and len(ops) == 1 + len(result.rows)
    assert [line[0] for line in blocks] == [block["name"] for block in result.data["blocks"]]
    for block, line in zip(result.blocks, blocks, strict=True):
        rows = [row for row in result.rows if row.block == block.block]
        shown = dict(zip(titles, line, strict=True))
        assert shown["GFLOP"] == f"{sum(sum(row.data['flops'].values()) for row in rows) / 1e9:.2f}"
        assert shown["MB to move"] == f"{sum(sum(row.data['bytes'].values()) for row in rows) / 1e6:.1f}"
        for index, seconds in enumerate(block.by_round("fused", "backward")):
            assert seconds == pytest.approx(sum(row.by_round("fused", "backward")[index] for row in rows))


@pytest.mark.parametrize("width", [60, 80, 100, 180])
def test_the_tables_names_are_whole_on_a_narrow_terminal(width, monkeypatch):
    result = Profile.read(KEPT)
    result.data["blocks"][3]["name"] = "resnet.encoder.stages.3.layers.1"
    result.data["blocks"][3]["ops"][0]["reason"] = "a forward hook is set on a layer with a long name"
    monkeypatch.setattr(table, "_WIDTH", width)
    shown = io.StringIO()
    result.show(shown)
    blocks, ops = [text.splitlines() for text in shown.getvalue().split("\n\n")[:2]]
    lines = blocks[-len(result.blocks) :]
    titles, *ops = ops
    assert [line.split()[0] for line in lines] == [block.block for block in result.blocks]
    assert all(len(line) <= width and "…" not in line for line in (*lines, titles, *ops))
    assert "lost ms" in titles and ("GFLOP" in titles) == (width == 180)
    column = slice(titles.index("op"), titles.index("ran"))
    names = "".join(line[column].replace(" ", "") for line in ops)
    assert names == "".join(
        row.name.replace(" ", "") for row in sorted(result.rows, key=lambda row: -row.lost)
    )


def test_says_why_an_op_runs_unfused():
    model = models.cifar_resnet20(num_classes=10)
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    rows = fastres.profile(model, images(), repeat=1).rows
    told = [(row.block, row.data["reason"]) for row in rows if row.data["reason"]]
    assert told == [("layer1.0", "a forward hook is set on layer1.0.bn1")]


def test_saved_bytes_are_those_that_bench_counts():
    import argparse

    from fastres import bench

    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = "--model cifar_resnet20 --batch 2 --image-size 16".split()
    counted = bench.Variant("fused", parser.parse_args(words)).saved_bytes()
    result = fastres.profile(models.cifar_resnet20(), images(), repeat=1)
    loss, input = 2 * 10 * 4 + 2 * 8 + 4, 2 * 3 * 16 * 16 * 4  # which are no part of a block
    assert result.saved_bytes("fused") == counted - loss - input


def test_trace_has_a_line_of_blocks(tmp_path):
    path = tmp_path / "trace.json"
    fastres.profile(models.cifar_resnet20(), images(), repeat=1, trace_path=path)
    events = json.loads(path.read_text())["traceEvents"]
    parts = [event for event in events if event.get("cat") == "blocks"]
    names = {(e["name"], e["args"]["pass"]) for e in parts}
    assert {("layer3.1: conv1 bn1 relu", d) for d in ("forward", "backward")} <= names
    assert {e["pid"].partition(",")[0] for e in parts} == {"fused", "stock"}


class Picky(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 3, 1)

    def forward(self, x):
        assert x.size(-1) == 17, "no images of 16"


class Divides(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / (1 // 0)


class Reads(nn.Conv2d):
    def forward(self, x):
        raise FileNotFoundError("no weights")


class OneOfItsKind(nn.Conv2d):
    def __deepcopy__(self, memo):
        raise NotImplementedError("it holds a lock\nand more")


class Fickle(nn.Module):
    """Calls one layer more each time."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 3, 1), 0

    def forward(self, x):
        self.calls += 1
        for _ in range(self.calls):
            x = self.conv(x)
        return x


@pytest.mark.parametrize(
    "model, input, settings, message",
    [
        (
            models.cifar_resnet20(),
            torch.ones(2, 1, 16, 16),
            {},
            "cannot run these settings: Given",
        ),
        (models.cifar_resnet20(), images(), {"mode": "fly"}, "mode='fly': expected 'train' or 'infer'"),
        (models.cifar_resnet20(), images(), {"dtype": "int8"}, "dtype='int8': expected"),
        (models.cifar_resnet20(), images(), {"against": ("compile",)}, "expected 'stock'"),
        (models.cifar_resnet20(), images(), {"repeat": 0}, "repeat=0: expected 1 or more"),
        (models.cifar_resnet20(), {}, {}, "input holds no tensor"),
        (nn.ReLU(), images(), {}, "no parameter of the model requires a gradient"),
        (Fickle(), images(), {}, "calls other modules from one step to the next"),
        (3, images(), {}, "model has type int, expected torch.nn.Module"),
        (Picky(), images(), {}, "the model cannot run these settings: no images of 16"),
        (Divides(3, 3, 1), images(), {}, "the model cannot run these settings: integer division"),
        (Reads(3, 3, 1), images(), {}, "the model cannot run these settings: no weights"),
        (OneOfItsKind(3, 3, 1), images(), {}, "the model cannot run these settings: it holds a lock$"),
    ],
)
def test_refuses(model, input, settings, message):
    with pytest.raises(ProfileError, match=message.replace("(", r"\(")):
        fastres.profile(model, input, **{"repeat": 2, **settings})


def test_command(tmp_path, capsys):
    path = tmp_path / "out.json"
    words = f"profile --model cifar_resnet20 --batch 2 --image-size 16 --repeat 1 --json {path}"
    assert cli.main(words.split()) == 0
    printed = capsys.readouterr().out
    assert "layer3.2" in printed and "Look next at" in printed
    assert Profile.read(path).data["settings"]["model"] == "cifar_resnet20"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--model resnet51", "did you mean"),
        ("--batch 0", "--batch 0: expected 1 or more"),
        ("--json /no/such/folder/out.json", "cannot write there"),
        ("--against eager", "expected 'stock'"),
        ("--batch 1000000000", "--batch 1000000000: "),
        ("--batch 99999999999999999999999", "--batch 99999999999999999999999: "),
        ("--json x --html x", "two of them are one file"),
        ("--model cifar_resnet20 --batch 1 --image-size 2", "cannot run these settings"),
    ],
)
def test_command_refuses_in_one_sentence(words, message, capsys):
    assert cli.main(["profile", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("fastres profile: ") and error.count("\n") == 1


def test_command_refuses_a_model_without_data(tmp_path, capsys):
    path = tmp_path / "models.py"
    path.write_text("import torch\n\ndef build():\n    return torch.nn.Conv2d(3, 8, 3, device='meta')\n")
    assert cli.main(f"profile --model {path}:build --batch 2 --image-size 16".split()) == 2
    error = capsys.readouterr().err
    assert f"--model {path}:build: Cannot copy out of meta" in error and error.count("\n") == 1


def test_a_cache_is_as_fast_as_any_size_that_it_holds():
    copy = limits.measured(torch.device("cpu")).copy
    assert copy["memory"].speed == 5e9
    assert all(level.speed == 1e10 for level in copy.values() if level.bytes)
    assert 1e7 < _copy_speed(2**20, torch.device("cpu")) < 1e13


def test_the_best_of_each_limit_is_kept(monkeypatch):
    device = torch.device("cpu")
    first = limits.measured(device)
    assert list(first.copy)[-1] == "memory" and min(level.speed for level in first.copy.values()) > 0
    fastest = first.copy["memory"].speed * 2
    levels = {n: limits.Level(level.bytes, level.speed / 2) for n, level in first.copy.items()}
    second = limits.Limits({**levels, "memory": limits.Level(None, fastest)}, {"fp32": 1.0, "bf16": 1e15})
    monkeypatch.setattr(limits, "_measure", lambda device: second)
    best = limits.Limits(
        {**first.copy, "memory": limits.Level(None, fastest)}, {"fp32": first.flops["fp32"], "bf16": 1e15}
    )
    assert limits.measured(device) == best
    monkeypatch.setattr(limits, "_measure", lambda device: limits.Limits(levels, dict(second.flops)))
    assert limits.measured(device) == best


@pytest.mark.parametrize(("speed", "size"), [(1e13, 2048), (3e9, 512)])
def test_a_slow_product_is_not_made_larger(speed, size, monkeypatch):
    sizes = []

    def fastest(call, device):
        sizes.append(len(call()))
        return 2 * sizes[-1] ** 3 / speed

    monkeypatch.setattr(limits, "_fastest", fastest)
    assert limits._product_flops(2048, torch.float32, torch.device("cpu")) == pytest.approx(speed)
    assert sizes[-1] == size


@pytest.mark.parametrize("option", ["json", "html", "trace"])
def test_a_full_disk_leaves_nothing_half_written(option, tmp_path, monkeypatch, capsys):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    path = tmp_path / "out"
    words = "profile --model cifar_resnet20 --batch 2 --image-size 16 --repeat 1"
    limits.measured(torch.device("cpu"))  # kept before the disk is full
    assert cli.main([*words.split(), f"--{option}", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"No space left on device: '{path}'\n" in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir() if file.name != "cache"] == []


def test_refuses_threads_that_no_machine_has(capsys):
    assert cli.main("profile --threads 2000".split()) == 2
    assert "--threads 2000: expected at most" in capsys.readouterr().err


def _profile(seconds, bounds, profiled=1.0):
    """Of rows of so many seconds and bounds, beside stock's of 1 s."""
    ops = [
        {
            "name": f"op{i}",
            "ran": "conv",
            "fused": True,
            "reason": "",
            "seconds": {"fused": {"forward": [time] * 4}, "stock": {"forward": [1.0] * 4}},
            "flops": {"forward": 1.0},
            "bound": {"forward": bound},
        }
        for i, (time, bound) in enumerate(zip(seconds, bounds, strict=True))
    ]
    level = {"bytes": None, "speed": 1.0}
    return Profile(
        {
            "settings": {"against": ["stock"], "dtype": "fp32"},
            "limits": {"copy_bytes_per_second": {"memory": level}, "flops_per_second": {"fp32": 1e9}},
            "whole_step": {"fused": [1.0, 1.1, 1.2, 1.3], "stock": [1.3, 1.2, 1.1, 1.0]},
            "profiled_step": {v: [profiled * t for t in (1.0, 1.1, 1.2, 1.3)] for v in ("fused", "stock")},
            "blocks": [{"name": "block", "kind": "", "ops": ops}],
        }
    )


def test_advice_says_what_is_noise_and_what_is_in_doubt():
    told = advice(_profile([1.0, 2.0], [0.5, 0.5]))
    assert told[0].startswith("Fused is as fast as stock, within the noise (")
    assert told[-1] == "Look next at block op1: of all ops it loses most, 1500.0 ms."
    assert not any("Watched" in sentence or "busier" in sentence for sentence in told)
    told = advice(_profile([1.0, 2.0], [2.0, 0.5], profiled=1.2))
    assert any("fused takes 1.20x its time in one go" in sentence for sentence in told)
    assert any(sentence.startswith("1 of 2 passes were faster than the limits") for sentence in told)
    told = advice(_profile([1.0], [3.0]))
    assert any("at 100% of the machine's limit." in sentence for sentence in told)
