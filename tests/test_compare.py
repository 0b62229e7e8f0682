"""fastres profile --compare: real changes are named, noise is not."""

import copy
import json
import random
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import fastres
from fastres.cli import main
from fastres.profiler.result import Profile

KEPT = Path(__file__).with_name("profile.json")
ROUNDS = 5
_text = KEPT.read_text()


def kept() -> dict:
    """The kept profile's data."""
    return json.loads(_text)


def measured(
    seed: int, noise: float, machine: float = 1.0, slower: dict[str, float] | None = None
) -> Profile:
    """The kept profile's ops, as a machine of so much noise would time them.

    Args:
        noise: the standard deviation of a round's time over the time itself.
        machine: factor of all times.
        slower: factors of blocks' fused times.
    """
    draw = random.Random(seed)
    data = kept()

    def rounds(seconds: float) -> list[float]:
        return [seconds * machine * max(draw.gauss(1, noise), 0.2) for _ in range(ROUNDS)]

    steps = dict.fromkeys(("fused", "stock"), 0.0)
    for block in data["blocks"]:
        for op in block["ops"]:
            for variant, by_direction in op["seconds"].items():
                for direction, times in by_direction.items():
                    factor = (slower or {}).get(block["name"], 1.0) if variant == "fused" else 1.0
                    seconds = sorted(times)[len(times) // 2] * factor
                    steps[variant] += seconds
                    by_direction[direction] = rounds(seconds)
    for key in ("whole_step", "profiled_step"):
        data[key] = {variant: rounds(seconds) for variant, seconds in steps.items()}
    return Profile(data)


def changed(changes) -> list[str]:
    return [change.block for change in changes if change.slower or change.faster]


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("machine", [1.0, 1.3])
def test_two_profiles_of_the_same_differ_by_no_more_than_their_noise(noise, machine):
    rows = found = steps = 0
    for seed in range(30):
        comparison = measured(seed, noise).compare(measured(1000 + seed, noise, machine))
        rows += len(comparison.ops)
        found += len(changed(comparison.ops))
        steps += len(changed([comparison.step]))
    assert rows > 1000 and found <= 0.05 * rows and steps <= 2


@pytest.mark.parametrize("machine", [1.0, 1.3])
@pytest.mark.parametrize("block", ["stem", "layer1.1", "layer3.0"])
def test_a_block_that_became_a_fifth_slower_is_named(block, machine):
    named = []
    for seed in range(20):
        a, b = measured(seed, 0.03), measured(1000 + seed, 0.03, machine, {block: 1.2})
        named += changed(a.compare(b).blocks)
        assert named.count(block) == seed + 1
    assert len(named) - named.count(block) <= 0.05 * 20 * 10


def test_the_intervals_hold_the_true_ratio():
    inside = total = 0
    for seed in range(30):
        slower = {"layer2.0": 1.2, "layer2.1": 0.8}
        for change in measured(seed, 0.05).compare(measured(1000 + seed, 0.05, 1.1, slower)).blocks:
            inside += change.low <= slower.get(change.block, 1.0) <= change.high
            total += 1
    assert inside >= 0.95 * total


def test_faster_is_told_too():
    comparison = measured(0, 0.01).compare(measured(1, 0.01, slower={"layer2.1": 0.7}))
    assert changed(comparison.blocks) == ["layer2.1"]
    assert "Faster beyond the noise: layer2.1 (-3" in comparison.sentence()
    assert comparison.slower_than(0) == []


def test_another_machine_is_named_and_its_speed_not_taken_off():
    a, b = measured(0, 0.01), measured(1, 0.01, machine=1.5)
    b.data["machine"]["cpu"] = "another"
    b.data["settings"]["input"][0] = 16
    comparison = a.compare(b)
    assert [line.split(":")[0] for line in comparison.differences] == ["input", "cpu"]
    assert comparison.drift == 1.0 and comparison.step.slower
    assert len(comparison.slower_than(30)) == 1 + len(comparison.blocks)


def test_a_machine_that_became_slower_is_told_from_a_version_that_did():
    a, b = measured(0, 0.01), measured(1, 0.01, machine=1.3, slower={"layer2.1": 1.3})
    b.data["machine"]["fastres"] = "9.9"
    comparison = a.compare(b)
    assert [line.split(":")[0] for line in comparison.differences] == ["fastres"]
    assert comparison.drift == pytest.approx(1.3, rel=0.03)
    assert changed(comparison.slower_than(10)) == ["layer2.1"]


def test_a_single_round_tells_little(monkeypatch):
    monkeypatch.setitem(globals(), "ROUNDS", 1)
    steps = blocks = 0
    for seed in range(50):
        comparison = measured(seed, 0.05).compare(measured(1000 + seed, 0.05))
        steps += len(changed([comparison.step]))
        blocks += len(changed(comparison.blocks))
    assert steps <= 2 and blocks <= 0.05 * 50 * 10


def test_what_only_one_has_is_named():
    a, b = measured(0, 0.01), measured(1, 0.01)
    b.data["blocks"][3]["name"] = "layer9.9"
    comparison = a.compare(b)
    ops = len(a.data["blocks"][3]["ops"])
    assert len([line for line in comparison.missing if line.startswith("only in a: layer1.2")]) == ops
    assert len([line for line in comparison.missing if line.startswith("only in b: layer9.9")]) == ops
    assert "layer9.9" not in [change.block for change in comparison.blocks]
    assert comparison.sentence() == (
        "Of the ops that both have, nothing changed beyond the noise. "
        "3 ops are only in a. 3 ops are only in b."
    )
    del b.data["blocks"][3]["ops"][1:]
    assert a.compare(b).sentence().endswith("3 ops are only in a. 1 op is only in b.")
    b.data["blocks"] = a.data["blocks"]
    assert a.compare(b).sentence() == "Nothing changed beyond the noise."


class Pause(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, input):
        time.sleep(self.seconds)
        return input


class Block(nn.Module):
    """It sleeps before it convolves."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.pause = Pause(seconds)
        self.conv1 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn1(self.conv1(self.pause(x))) + x)


def test_a_block_that_is_made_slower_is_named_end_to_end(tmp_path, capsys, one_thread, quick_limits):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    input = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    for path, slowed in zip(paths, (0.03, 0.075), strict=True):
        model = nn.Sequential(*(Block(slowed if index == 2 else 0.03) for index in range(4)))
        fastres.profile(model, input, mode="infer", repeat=5).to_json(path)
    assert main(["profile", "--compare", *map(str, paths), "--fail-above", "20"]) == 1
    printed = capsys.readouterr().out
    last, sentence = printed.splitlines()[-1], printed.splitlines()[-2]
    assert last.startswith("Slower by more than 20 %: 2 (+")
    assert "Slower beyond the noise: 2 (+" in sentence and sentence.count("(") == 1
    assert main(["profile", "--compare", str(paths[0]), str(paths[0]), "--fail-above", "0"]) == 0
    assert "Nothing changed beyond the noise." in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# what cannot be compared


@pytest.mark.parametrize(
    "words, message",
    [
        (["--compare", str(KEPT), "missing.json"], "missing.json"),
        (["--compare", str(KEPT), __file__], "is no profile"),
        (["--compare", str(KEPT), str(KEPT), "--fail-above", "-1"], "-1: expected 0 or more"),
        (
            ["--compare", str(KEPT), str(KEPT), "--fail-above", "nan"],
            "nan: expected 0 or more",
        ),
        (["--fail-above", "5"], "--fail-above: goes with --compare"),
        (["--compare", str(KEPT), str(KEPT), "--json", "x.json"], "--compare: only prints"),
    ],
)
def test_refuses_in_one_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_refuses_profiles_without_a_common_op(capsys, tmp_path):
    paths = {name: tmp_path / f"{name}.json" for name in ("empty", "foreign")}
    data = kept()
    for block in data["blocks"]:
        block["name"] = f"foreign.{block['name']}"
    Profile(data).to_json(paths["foreign"])
    Profile({**data, "blocks": []}).to_json(paths["empty"])
    for a, b in ((KEPT, paths["empty"]), (paths["foreign"], KEPT), (paths["empty"], paths["empty"])):
        assert main(["profile", "--compare", str(a), str(b), "--fail-above", "5"]) == 2
        printed = capsys.readouterr()
        assert "have no op in common" in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_refuses_training_beside_inference(capsys, tmp_path):
    other = Profile(kept())
    other.data["settings"]["mode"] = "infer"
    for row in other.rows:
        for times in (row.data["flops"], row.data["bytes"], row.data["bound"]):
            del times["backward"]
    other.to_json(tmp_path / "infer.json")
    assert main(["profile", "--compare", str(KEPT), str(tmp_path / "infer.json")]) == 2
    assert "of mode train" in capsys.readouterr().err


class CallsTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.GELU()

    def forward(self, x):
        return self.act(self.conv(self.act(x)))


def test_each_call_of_a_module_counts():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), CallsTwice())
    before = fastres.profile(model, torch.randn(2, 3, 16, 16), repeat=2)
    acts = [row for row in before.rows if "act" in row.name]
    assert [row.name for row in acts] == ["1.act", "1.act #2"]
    data = copy.deepcopy(before.data)
    (first,) = (op for block in data["blocks"] for op in block["ops"] if op["name"] == "1.act")
    for times in first["seconds"]["fused"].values():
        times[:] = [time * 1000 for time in times]
    assert acts[0].block in changed(before.compare(Profile(data)).blocks)
