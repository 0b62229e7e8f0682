"""fastres sweep: what it measures, what it keeps, what it says."""

import errno
import io
import json
import os
import re

import pytest
import torch

from fastres import bench
from fastres.cli import main
from fastres.sweep.grid import Cell, Sweep, cells
from fastres.sweep.heat_map import html
from fastres.sweep.show import label, sentence, show

MACHINE = {
    "cpu": "a cpu",
    "cores": 2,
    "isa": "avx2",
    "amx": False,
    "gpu": "",
    "torch": "2.13.0",
    "fastres": "0.1.0",
}
SETTINGS = {"device": "cpu", "mode": "train", "against": "eager", "repeat": 3}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield before
    assert torch.get_num_threads() == before


def sweep(path, words="", batch="2", size="8"):
    """The exit status."""
    model = "--model cifar_resnet20 --repeat 3 --threads 1 --dtype fp32"
    return main(f"sweep {model} --batch {batch} --image-size {size} --out {path} {words}".split())


@pytest.fixture
def measured(monkeypatch):
    """The settings of what bench is asked to measure; it answers at once."""
    asked = []

    def measure(arguments, against, advance):
        asked.append((arguments.batch, arguments.image_size))
        times = {"fused": [1.0, 1.0], **{name: [1.2, 1.3] for name in against}}
        variants = {n: {"images_per_second": 1.0, "seconds_by_round": t} for n, t in times.items()}
        speedup = {name: {"median": 1.25, "low": 1.2, "high": 1.3} for name in against}
        return {"variants": variants, "speedup": speedup}

    monkeypatch.setattr(bench, "measure", measure)
    return asked


def speedups(*pairs) -> tuple[Sweep, list[Cell]]:
    """A sweep with quartiles of these, None for a cell that cannot run."""
    grid = cells(["m"], ["fp32"], [1], range(1, len(pairs) + 1), [8])
    result = Sweep(SETTINGS, MACHINE)
    for cell, pair in zip(grid, pairs, strict=True):
        if pair is None:
            result.results[cell] = {"error": "too large"}
        else:
            low, high = pair
            result.results[cell] = {
                "speedup": {"eager": {"median": (low + high) / 2, "low": low, "high": high}}
            }
    return result, grid


def test_measures_every_cell_and_says_so(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    command_line = "sweep --model cifar_resnet20 --batch 2,3 --image-size 8 --dtype fp32,bf16 --repeat 3"
    assert main([*command_line.split(), "--out", str(path)]) == 0
    data = json.loads(path.read_text())
    assert [(c["cell"]["dtype"], c["cell"]["batch"]) for c in data["cells"]] == [
        ("fp32", 2),
        ("fp32", 3),
        ("bf16", 2),
        ("bf16", 3),
    ]
    for cell in data["cells"]:
        times = cell["result"]["seconds_by_round"]
        assert len(times["fused"]) == len(times["eager"]) == 3
        ratios = [stock / fused for stock, fused in zip(times["eager"], times["fused"], strict=True)]
        assert cell["result"]["speedup"]["eager"]["median"] == pytest.approx(sorted(ratios)[1])
    printed = capsys.readouterr().out
    assert printed.count("px") == 2 + printed.count("(worst") and "Of 4 cells, fused is against" in printed


def test_the_same_command_measures_only_what_is_missing(tmp_path, measured):
    path = tmp_path / "sweep.json"
    assert sweep(path, batch="2,3") == 0
    assert measured == [(2, 8), (3, 8)]
    assert sweep(path, batch="2,3,4", size="8,16") == 0
    assert measured[2:] == [(2, 16), (3, 16), (4, 8), (4, 16)]
    assert len(json.loads(path.read_text())["cells"]) == 6
    assert sweep(path, "--restart") == 0
    assert measured[6:] == [(2, 8)] and len(json.loads(path.read_text())["cells"]) == 1


def test_interrupted_it_keeps_what_was_measured(tmp_path, measured, monkeypatch, capsys):
    path, answer = tmp_path / "sweep.json", bench.measure

    def interrupted(arguments, *others):
        if arguments.batch == 4:
            raise KeyboardInterrupt
        return answer(arguments, *others)

    monkeypatch.setattr(bench, "measure", interrupted)
    assert sweep(path, batch="2,3,4,5") == 130
    assert f"interrupted; 2 of 4 cells are in {path}; the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(bench, "measure", answer)
    assert sweep(path, batch="2,3,4,5") == 0
    assert [batch for batch, _ in measured] == [2, 3, 4, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]


def test_a_cell_that_cannot_run_does_not_stop_the_others(tmp_path, measured, monkeypatch, capsys):
    answer = bench.measure

    def failing(arguments, *others):
        if arguments.batch == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")
        return answer(arguments, *others)

    monkeypatch.setattr(bench, "measure", failing)
    assert sweep(tmp_path / "sweep.json", batch="2,3,4") == 0
    printed = capsys.readouterr().out
    assert "batch 3, 8 px, fp32, 1 thread: DefaultCPUAllocator: can't allocate memory\n" in printed
    assert "faster in 2 (median 1.25x), unable to run in 1." in printed and "cannot run" in printed


def test_where_no_cell_can_run_the_command_fails(tmp_path, capsys):
    for _ in range(2):  # measured, and read from the file
        assert sweep(tmp_path / "sweep.json", batch="9" * 23) == 2
        assert capsys.readouterr().out.endswith("\nFused and eager can run in no cell.\n")


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds_are_not_called_faster_or_slower(rounds, monkeypatch):
    monkeypatch.setitem(SETTINGS, "repeat", rounds)
    result, grid = speedups((1.1, 1.3), (0.5, 0.7), None)
    noise = f"the noise of {rounds} round{'s' if rounds > 1 else ''} is not known"
    assert sentence(result, grid, "eager") == f"Whether fused is faster than eager cannot be told: {noise}."
    shown, page = io.StringIO(), html(result, grid)
    show(result, grid, shown)
    assert shown.getvalue().count("x noise unknown (") == 2
    assert "1.20x<br>noise<br>unknown" in page and '"z":[[0.0],[-0.0],[null]]' in page
    assert not re.search("faster [(i]|slower [(i]|x<br>(faster|slower)", shown.getvalue() + page)


@pytest.mark.parametrize("other", ["--mode infer", "--repeat 4", "--against compile"])
def test_refuses_to_go_on_with_other_settings(tmp_path, measured, capsys, other):
    path = tmp_path / "sweep.json"
    assert sweep(path) == 0
    kept = path.read_bytes()
    assert sweep(path, other, batch="2,3") == 2
    name = other.split()[0].removeprefix("--")
    error = capsys.readouterr().err
    assert f"was measured with {name} " in error and "--restart" in error and error.count("\n") == 1
    assert path.read_bytes() == kept and len(measured) == 1


def test_refuses_to_go_on_with_another_machines(tmp_path, measured, capsys):
    path = tmp_path / "sweep.json"
    assert sweep(path) == 0
    path.write_text(re.sub(r'"cpu": "[^"]*",', '"cpu": "another",', path.read_text()))
    assert sweep(path) == 2
    assert "was measured with cpu another in place of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"fastres_sweep": 1, "cells": [3]}',
        "\x00",
        "9" * 5000,
        '{"fastres_sweep": 1, "cells": 3}',
        pytest.param(50_000 * "[", id="deep"),
    ],
)
def test_leaves_a_file_that_is_no_sweep_alone(tmp_path, measured, capsys, content):
    path = tmp_path / "sweep.json"
    path.write_text(content)
    assert sweep(path) == 2
    assert "is no file that `fastres sweep` wrote" in capsys.readouterr().err
    assert path.read_text() == content and not measured


@pytest.mark.parametrize(
    "result",
    [
        "null",
        '"fast"',
        '"an error"',
        "{}",
        '{"error": null}',
        '{"speedup": {}}',
        '{"speedup": {"eager": 3}}',
        '{"speedup": {"eager": {}}, "images_per_second": {"eager": 1}}',
        '{"speedup": {"eager": {"low": 1, "high": 1}}, "images_per_second": {"eager": 1}}',
        '{"speedup": {"eager": {"low": 1, "median": 1, "high": 1}}, "images_per_second": {"eager": NaN}}',
    ],
)
def test_leaves_a_file_with_a_broken_cell_alone(tmp_path, measured, capsys, result):
    path = tmp_path / "sweep.json"
    assert sweep(path) == 0
    content = json.loads(path.read_text())
    content["cells"][0]["result"] = json.loads(result)
    path.write_text(json.dumps(content))
    assert sweep(path) == 2
    assert "is no file that `fastres sweep` wrote" in capsys.readouterr().err
    assert json.loads(path.read_text()) == content


def test_cells_are_compiled_one_like_the_other(tmp_path):
    """A forward is compiled anew for few sizes only; beyond, torch.compile would run as eager does."""
    path = tmp_path / "sweep.json"
    torch.compiler.reset()  # what other tests compiled
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        assert sweep(path, "--against compile", batch="2,3,4") == 0
    assert ["error" in cell["result"] for cell in json.loads(path.read_text())["cells"]] == [False] * 3


def test_measures_stock_with_the_best_of_cudnns_algorithms(tmp_path, monkeypatch):
    seen, interleave = [], bench.interleave

    def noting(*arguments):
        seen.append(torch.backends.cudnn.benchmark)
        return interleave(*arguments)

    monkeypatch.setattr(bench, "interleave", noting)
    assert sweep(tmp_path / "sweep.json") == 0
    assert seen == [True] and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    "words, message",
    [
        ("--batch 0", "--batch 0: expected whole numbers of 1 or more"),
        ("--batch 2,x", "--batch x: expected whole numbers"),
        ("--batch 2,,3", "--batch '2,,3': expected values with commas between them"),
        ("--image-size -8", "--image-size -8: expected whole numbers"),
        ("--dtype fp8", "--dtype fp8: expected fp32, bf16 or fp32,bf16"),
        ("--threads 9999", "--threads 9999: expected at most"),
        ("--model resnet51", "--model resnet51: there is no such model; did you mean resnet"),
        ("--against stock", "--against 'stock': expected one or more of eager"),
        ("--repeat 0", "--repeat 0: expected 1 or more"),
        ("--out /", "--out /: cannot write there"),
        ("--html missing/x.html", "--html missing/x.html: cannot write there"),
        ("--html ./sweep.json", "--out and --html: both are one file"),
    ],
)
def test_refuses_in_one_sentence(words, message, measured, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = words.split()[0]
    assert main(["sweep", *words.replace(f"{option} ", f"{option}=").split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastres sweep: {message}") and error.count("\n") == 1
    assert not measured and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sweep.json", "page.html"])
def test_a_full_disk_is_told_with_the_files_name(name, tmp_path, measured, monkeypatch, capsys):
    path, fsync = tmp_path / name, os.fsync

    def full(file):
        if name in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr("os.fsync", full)
    assert sweep(tmp_path / "sweep.json", f"--html {tmp_path / 'page.html'}") == 2
    error = capsys.readouterr().err
    assert f"No space left on device: '{path}'\n" in error and error.count("\n") == 1


def test_says_faster_and_slower_alike():
    result, grid = speedups((1.1, 1.3), (1.3, 1.5), (0.9, 1.1), (0.8, 0.9), (0.5, 0.7), None)
    labels = [label(result.results[cell].get("speedup", {}).get("eager", {}), 3) for cell in grid]
    assert labels == [
        "1.20x faster",
        "1.40x faster",
        "1.00x within the noise",
        "0.85x slower",
        "0.60x slower",
        "cannot run",
    ]
    assert sentence(result, grid, "eager") == (
        "Of 6 cells, fused is against eager faster in 2 (median 1.30x), slower in 2 "
        "(worst 0.60x: m, batch 5, 8 px, fp32, 1 thread), within the noise in 1, unable to run in 1."
    )
    assert sentence(*speedups((1.1, 1.3)), "eager") == (
        "Of 1 cell, fused is against eager faster in 1 (median 1.20x)."
    )
    page = html(result, grid)
    assert all(text.replace(" ", "<br>", 2) in page for text in labels)


def test_the_page_in_a_browser(browser, tmp_path):
    result, grid = speedups((1.1, 1.3), (0.8, 0.9), None)
    path = tmp_path / "sweep.html"
    path.write_text(html(result, grid), encoding="utf-8")
    wrong, asked = [], []
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#map0 .annotation")
    assert page.locator("#map0 .annotation").count() == 3
    texts = page.locator("#map0 .annotation text").evaluate_all(
        "all => all.map((e) => [e.textContent, getComputedStyle(e).fontSize])"
    )
    assert [text for text, _ in texts] == ["1.20xfaster", "0.85xslower", "cannotrun"]
    assert len({size for _, size in texts}) == 1
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert not wrong and asked == [path.as_uri()]
    page.close()


def test_a_users_file_that_was_edited_is_measured_again(tmp_path, measured):
    file, path = tmp_path / "model.py", tmp_path / "sweep.json"
    command_line = (
        f"sweep --model {file}:build,cifar_resnet20 --batch 2 --image-size 8 --threads 1 --dtype fp32"
    )
    for number, (channels, calls) in enumerate([(4, 2), (4, 0), (8, 1), (8, 0)]):
        measured.clear()
        file.write_text(f"import torch\ndef build():\n    return torch.nn.Conv2d(3, {channels}, 3)\n")
        assert main([*command_line.split(), "--repeat", "2", "--out", str(path)]) == 0, number
        assert len(measured) == calls, number
