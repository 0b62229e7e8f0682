"""`fastres bench`: what it measures, says and writes. No test asks for a speed."""

import argparse
import json
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training import RunAgain

import fastres.nn
from fastres import bench, recording, sites, timing
from fastres.cli import main

SMALL = [
    "--model",
    "cifar_resnet20",
    "--batch",
    "2",
    "--image-size",
    "16",
    "--repeat",
    "2",
    "--threads",
    "1",
]


def arguments(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*SMALL, *words])


def run(*words):
    return bench.run(arguments(*words))


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_writes_what_it_measured(mode, device, tmp_path, capsys):
    path = tmp_path / "out.json"
    words = f"--device {device} --mode {mode} --dtype bf16 --breakdown --json {path}"
    assert run(*words.split()) == 0
    result = json.loads(path.read_text())
    fused, eager = (result["variants"][name]["seconds_by_round"] for name in ("fused", "eager"))
    assert len(fused) == len(eager) == 2 and min(*fused, *eager) > 0
    speedup = result["speedup"]["eager"]
    assert speedup["by_round"] == [e / f for e, f in zip(eager, fused, strict=True)]
    assert speedup["low"] <= speedup["median"] <= speedup["high"]
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["threads"] == 1
    assert result["settings"]["dtype"] == "bf16" and result["unfused"] == {}
    assert sum(result["convolutions"].values()) == 19
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left
    printed = capsys.readouterr().out
    assert f"{speedup['median']:.2f}x" in printed and result["machine"]["cpu"] in printed
    assert bool(result["machine"]["gpu"]) == (device == "cuda")
    for variant in result["variants"].values():
        assert ("peak_bytes" in variant) == (device == "cuda")
        seconds = variant["breakdown"]["seconds"]
        assert min(seconds["convolution"], seconds["linear"], seconds["the rest"]) > 0
        assert (seconds["optimizer"] > 0) == (mode == "train")
        assert ("saved_bytes" in variant["breakdown"]) == (mode == "train")


def _table(printed: str) -> list[str]:
    """The rows of the breakdown's times."""
    begin = printed.index("ms/step, profiled")
    return printed[begin:].split("\n")[:5]


def test_compares_with_torch_compile(monkeypatch, tmp_path, capsys):
    compiled = []

    def compile(model, mode):
        compiled.append(mode)
        return torch._dynamo.optimize("eager")(model)

    monkeypatch.setattr(torch, "compile", compile)
    path = tmp_path / "out.json"
    stock = ["compile", "eager", "compile-max-autotune", "compile-reduce-overhead"]
    assert run("--against", ",".join(stock), "--breakdown", "--json", str(path)) == 0
    assert list(json.loads(path.read_text())["variants"]) == ["fused", *stock]
    assert compiled == ["default", "max-autotune", "reduce-overhead"]
    assert all(len(line) == len(lines[0]) for lines in [_table(capsys.readouterr().out)] for line in lines)


def test_foreign_models_are_fused_first(torchvision, tmp_path):
    path = tmp_path / "out.json"
    assert run("--model", "torchvision:resnet18", "--image-size", "32", "--json", str(path)) == 0
    result = json.loads(path.read_text())
    assert result["settings"]["model"] == "torchvision:resnet18" and result["unfused"] == {}


@pytest.mark.parametrize("factor, word", [(2.0, "faster"), (0.5, "slower")])
def test_says_faster_and_slower_alike(factor, word, monkeypatch, capsys):
    monkeypatch.setattr(bench, "interleave", lambda *_: {"fused": [1.0] * 3, "eager": [factor] * 3})
    assert run("--repeat", "3") == 0
    ratio = f"{factor:.2f}"
    assert capsys.readouterr().out.endswith(f"{ratio}x ({ratio} to {ratio}): fused is {word}\n")


@pytest.mark.parametrize("rounds, words", [("1", "1 round"), ("2", "2 rounds")])
def test_too_few_rounds_are_not_called_faster_or_slower(rounds, words, monkeypatch, capsys):
    monkeypatch.setattr(
        bench,
        "interleave",
        lambda *_: {name: [s] * int(rounds) for name, s in (("fused", 1.0), ("eager", 2.0))},
    )
    assert run("--repeat", rounds) == 0
    assert capsys.readouterr().out.endswith(f"(2.00 to 2.00): the noise of {words} is not known\n")


def test_says_when_the_rounds_disagree():
    assert bench.in_words({"median": 1.05, "low": 0.99, "high": 1.1}) == "as fast, within the noise"


@pytest.mark.parametrize("name, fused", [("fused", True), ("eager", False)])
def test_variants_run_what_their_names_say(name, fused):
    with recording.record() as records:
        bench.Variant(name, arguments()).step()
    assert records and {record.fused for record in records} == {fused}


def test_stock_layers_are_the_modules_themselves():
    bn, stock = nn.BatchNorm2d(3), fastres.nn.BnAddReLU2d(3)
    x = torch.randn(2, 3, 5, 5)
    expected = torch.relu(bn(x) + x)
    with sites.stock(), recording.record() as records:
        assert torch.equal(stock(x, x), expected)
    assert [(record.fused, record.reason) for record in records] == [
        (False, (None, "stock layers were asked for"))
    ]
    assert torch.equal(stock.running_var, bn.running_var) and stock.num_batches_tracked == 1
    assert sites.why_not(bn) is None


def test_compiled_code_heeds_a_change_to_stock_layers():
    fused = []

    def backend(module, _):
        fused.append(any("fastres" in str(node.target) for node in module.graph.nodes))
        return module

    compiled = torch.compile(fastres.nn.ConvBnReLU2d(3, 4, 3), fullgraph=True, backend=backend)
    x = torch.randn(2, 3, 5, 5)
    with sites.stock():
        compiled(x)
    compiled(x)
    with sites.stock():
        compiled(x)
    assert fused == [False, True]


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_what_is_timed_of_a_cuda_graph_is_its_replay(mode, monkeypatch):
    graphs = RunAgain()
    monkeypatch.setattr(bench, "CudaGraphs", lambda device: graphs)
    plain, graphed = (bench.Variant("fused", arguments("--mode", mode, *g)) for g in ([], ["--cuda-graph"]))
    eager = bench.Variant("eager", arguments("--mode", mode, "--cuda-graph"))
    for variant in (plain, graphed, eager):
        variant.warm_up()
    assert (graphs.aside, graphs.captured, graphs.replayed) == (3, 1, 2)
    graphed.step()
    assert (graphs.aside, graphs.captured, graphs.replayed) == (3, 1, 3)
    for _ in range(4):
        plain.step()
    for ours, theirs in zip(
        graphed.model.state_dict().values(), plain.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_cuda_graph(mode, tmp_path):
    path = tmp_path / "out.json"
    words = f"--device cuda --cuda-graph --mode {mode} --dtype bf16 --json {path}"
    assert run(*words.split()) == 0
    result = json.loads(path.read_text())
    assert result["settings"]["cuda_graph"] and result["unfused"] == {}


def test_variants_begin_with_the_same_weights_and_batch():
    fused, eager = (bench.Variant(name, arguments("--contiguous")) for name in ("fused", "eager"))
    for ours, theirs in zip(fused.model.parameters(), eager.model.parameters(), strict=True):
        assert ours is not theirs and torch.equal(ours, theirs)
    assert torch.equal(fused.images, eager.images) and fused.images.is_contiguous()


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    variant = bench.Variant("eager", arguments())
    # Saved by the linear layers: images, hidden and the second one's weight, which does not count; by cross
    # entropy: log_softmax, labels and their total weight.
    variant.model = variant.forward = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16 * 16, 10), nn.Linear(10, 10)
    )
    batch, classes = 2, 10
    images = batch * 3 * 16 * 16 * 4  # channels_last, so that Flatten copies it
    hidden = log_softmax = batch * classes * 4
    labels, weight_sum = batch * 8, 4
    assert variant.saved_bytes() == images + hidden + log_softmax + labels + weight_sum


def test_tells_why_sites_of_the_fused_model_ran_stock(capsys, monkeypatch):
    build = bench.by_name.build

    def hooked(name):
        model = build(name)
        model.bn1.register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(bench.by_name, "build", hooked)
    assert run() == 0
    assert "1 sites of the fused model ran stock: a forward hook is set" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "resnet5"], "--model resnet5: there is no such model; did you mean resnet50?"),
        (["--batch", "0"], "--batch 0: expected 1 or more"),
        (["--image-size", "-3"], "--image-size -3: expected 1 or more"),
        (["--repeat", "0"], "--repeat 0: expected 1 or more"),
        (["--threads", "0"], "--threads 0: expected 1 or more"),
        (["--threads", "2000"], "--threads 2000: expected at most"),
        (
            ["--against", "eager,jit"],
            "--against 'eager,jit': expected one or more of eager, compile, compile-red",
        ),
        (["--against", ""], "--against '': expected one or more of eager"),
        (["--cuda-graph"], "--cuda-graph: takes a CUDA device, with --device cuda"),
        (["--json", "no/such/folder/out.json"], "--json no/such/folder/out.json: cannot write there"),
        (
            ["--batch", "1", "--image-size", "1"],
            "fused cannot run these settings: Expected more than 1 value",
        ),
        (["--batch", "100000000", "--image-size", "1000"], "fused cannot run these settings: "),
        (["--batch", "9" * 23], "fused cannot run these settings: "),
    ],
)
def test_bad_arguments_get_one_sentence(words, message, capsys):
    assert run(*words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"fastres bench: {message}") and printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(bench.BenchError, match="No space left"):
        bench._write({}, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_restores_the_number_of_threads():
    before = torch.get_num_threads()
    assert run("--batch", "0", "--threads", str(before + 1)) == 2
    assert torch.get_num_threads() == before


def test_lets_cudnn_choose_its_algorithms_while_it_measures(monkeypatch):
    seen, step = [], bench.Variant.step

    def watched(variant):
        seen.append(torch.backends.cudnn.benchmark)
        step(variant)

    monkeypatch.setattr(bench.Variant, "step", watched)
    assert not torch.backends.cudnn.benchmark
    assert run() == 0
    assert seen and all(seen) and not torch.backends.cudnn.benchmark


def test_peak_memory_leaves_out_what_is_not_the_variants(device):
    variant = bench.Variant("eager", arguments("--device", device, "--batch", "64"))
    variant.warm_up()
    if device == "cpu":
        assert variant.peak_bytes == 0
        return
    alone = variant.peak_bytes
    assert alone > variant.saved_bytes()
    _others = torch.empty(2**28, dtype=torch.uint8, device=device)
    variant.warm_up()
    assert variant.peak_bytes == pytest.approx(alone, rel=0.05)


def test_variants_take_turns(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    calls = []

    def variant(name, seconds):
        def call():
            calls.append(name)
            for _ in range(seconds):
                next(now)

        return call

    variants = {"fast": variant("fast", 1), "slow": variant("slow", 5)}
    seconds = timing.interleave(variants, rounds=3, device=torch.device("cpu"))
    assert calls == ["fast", "slow"] * 3
    assert seconds == {"fast": [2, 2, 2], "slow": [6, 6, 6]}
    assert timing.ratios(seconds, "slow", "fast") == [3, 3, 3]


class Event:
    """A torch.cuda.Event that notes in `log` what it is asked, and lies one millisecond after the last."""

    log: list[str] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.log.append("event")
        self.at = self.log.count("event")

    def synchronize(self):
        self.log.append("wait")

    def elapsed_time(self, end):
        return float(end.at - self.at)


def test_on_cuda_each_call_finds_a_cold_cache_and_nothing_waits_before_the_last(monkeypatch):
    log = []
    cold = SimpleNamespace(sum=lambda: log.append("flush"))
    sizes = []

    def zeros(numel, device):
        sizes.append(4 * numel)
        return cold

    l2 = 100 * 2**20
    monkeypatch.setattr(Event, "log", log)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=l2))
    monkeypatch.setattr(torch, "zeros", zeros)
    variants = {name: lambda name=name: log.append(name) for name in ("a", "b")}
    seconds = timing.interleave(variants, rounds=2, device=torch.device("cuda"))
    call_a, call_b = (["flush", "event", name, "event"] for name in ("a", "b"))
    assert log == 2 * (call_a + call_b) + 4 * ["wait"]
    assert seconds == {"a": [1e-3] * 2, "b": [1e-3] * 2}
    assert sizes == [4 * l2]


@pytest.mark.parametrize(
    "script, told",
    [
        ("echo 1755, 1980, 2619, 2620", "1755 of 1980 MHz, memory 2619 of 2620 MHz"),
        ("echo no such device; exit 6", ""),
        ("echo", ""),
    ],
)
def test_tells_the_gpus_clocks_where_nvidia_smi_does(script, told, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n[ $2 = GPU-12-34 ] || exit 1\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34"))
    assert timing._gpu_clocks(torch.device("cuda")) == told


def test_spread_is_median_and_quartiles():
    assert timing.Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == timing.Spread(3.0, 2.0, 4.0)
    assert timing.Spread.of([7.0]) == timing.Spread(7.0, 7.0, 7.0)


FOREIGN = """
import torch
from torch import nn

def two():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))

def classifier():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class Raises(nn.Conv2d):
    def forward(self, x):
        return {}["missing"]

class Tires(nn.Conv2d):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.out_channels:
            raise OSError("not once more")
        return super().forward(x).mean((2, 3))

def third():
    return Tires(3, 3, 3)

def eighth():
    return Tires(3, 8, 3)

def on_meta():
    return nn.Conv2d(3, 8, 3, device="meta")

def raises():
    return Raises(3, 8, 3)

def no_parameters():
    return nn.Flatten()

class Dict(nn.Conv2d):
    def forward(self, x):
        return {"out": super().forward(x)}

def returns_a_dict():
    return Dict(3, 8, 3)

def leaves():
    raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("classifier", ""),
        ("two", "fused cannot run these settings: "),
        ("no_parameters", "fused cannot run these settings: "),
        ("third", "fused cannot run these settings: not once more"),
        ("eighth", "fused cannot run these settings: not once more"),
        ("on_meta", "fused cannot run these settings: Cannot copy out of meta tensor"),
        ("raises", "fused cannot run these settings: KeyError: 'missing'"),
        ("returns_a_dict", "fused cannot run these settings: "),
        ("leaves", "building it raised SystemExit: 3"),
    ],
)
def test_models_of_a_users_file(name, message, tmp_path, capsys):
    file = tmp_path / "models.py"
    file.write_text(FOREIGN)
    status = main(f"bench --model {file}:{name} --batch 2 --image-size 16 --repeat 2 --breakdown".split())
    error = capsys.readouterr().err
    assert status == (2 if message else 0) and message in error
    assert len(error.splitlines()) == bool(message)
