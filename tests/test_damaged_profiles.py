"""What a file of `fastres profile --json` may have become, and is then refused in one sentence."""

import io
import json
import random
import re
from pathlib import Path

import pytest

from fastres import cli
from fastres.profiler import Profile
from fastres.profiler.report import html

KEPT = Path(__file__).with_name("profile.json")
DAMAGE = (None, [], {}, "x", "1", -1.0, 0, 10**400, float("nan"), float("inf"), [1.0], {"a": 1})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"a": 1}',
        '{"fastres_profile": 99}',
        '{"fastres_profile": 1}',
        pytest.param(50_000 * "[", id="deep"),
    ],
)
def test_refuses_a_file_that_is_no_profile(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="x.json: is "):
        Profile.read(path)


def _damaged(draw: random.Random) -> dict:
    """The kept profile with one part of it missing or another."""
    data = part = json.loads(KEPT.read_text())
    while True:
        key = draw.choice([*part]) if isinstance(part, dict) else draw.randrange(len(part))
        if not (isinstance(part[key], dict | list) and part[key] and draw.random() < 0.8):
            break
        part = part[key]
    if draw.random() < 0.3:
        del part[key]
    else:
        part[key] = draw.choice(DAMAGE)
    return data


def test_a_damaged_profile_is_refused_or_can_be_shown(tmp_path):
    kept, path, refused = Profile.read(KEPT), tmp_path / "x.json", 0
    for seed in range(60):
        path.write_text(json.dumps(_damaged(random.Random(seed))))
        try:
            result = Profile.read(path)
        except ValueError as error:
            refused += 1
            assert re.fullmatch(rf"{path}: is .*", str(error)), seed
            continue
        html(result)
        result.show(io.StringIO())
        for one, other in ((kept, result), (result, kept)):
            try:
                one.compare(other).sentence()
            except ValueError as error:
                assert re.search("of mode|no op in common", str(error)), seed
    assert 30 < refused < 58


@pytest.mark.parametrize(
    "old, new",
    [
        ('"stock":[0.0366', '"stock":[-0.0366'),
        ('"stock":[0.0366', '"stock":[NaN, 0.0366'),
        ('"fused":[0.0392', '"fused":[0.0, 0.0392'),
        ('"blocks":[', '"blocks":[{},'),
        pytest.param('"advice":[', '"advice":[' + 50_000 * "[", id="deep"),
    ],
)
def test_the_command_refuses_a_damaged_profile(old, new, tmp_path, capsys):
    path = tmp_path / "x.json"
    assert old in KEPT.read_text()
    path.write_text(KEPT.read_text().replace(old, new, 1))
    for words in (["--from", str(path)], ["--compare", str(KEPT), str(path)]):
        assert cli.main(["profile", *words]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"fastres profile: {path}: is ") and printed.err.count("\n") == 1
        assert not printed.out


def test_a_field_of_the_machine_that_is_not_known_is_passed_over(tmp_path):
    data = json.loads(KEPT.read_text())
    data["machine"]["socket"] = 1
    (tmp_path / "x.json").write_text(json.dumps(data))
    assert Profile.read(tmp_path / "x.json").machine == Profile.read(KEPT).machine
