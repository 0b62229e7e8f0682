"""`fastres train`: its options, and what it says when something is wrong."""

import argparse
import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastres import cli
from fastres.train import command, loop


def test_a_training_that_diverges_ends_there(tmp_path, capsys):
    assert cli.main(f"train --epochs 3 --batch-size 512 --lr 1e30 --out {tmp_path}".split()) == 1
    printed = capsys.readouterr()
    assert re.fullmatch(
        r"fastres train: the loss of epoch 1 is (nan|inf), so the training has diverged; "
        r"start it anew with a lower --lr than 1e\+30\n",
        printed.err,
    )
    assert "epoch 2/3" not in printed.out and "held-out" not in printed.out


@pytest.mark.parametrize("bytes_wanted", [2**50, None], ids=["on the CPU", "on a GPU"])
def test_too_little_memory_is_told_with_the_batch_size(bytes_wanted, tmp_path, capsys, monkeypatch):
    def fail(run, images, labels):
        if bytes_wanted is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        torch.empty(bytes_wanted, dtype=torch.uint8)

    monkeypatch.setattr(loop.Run, "_train_step", fail)
    assert cli.main(["train", "--epochs", "1", "--batch-size", "32", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("fastres train: out of memory at --batch-size 32, take a smaller one: ")
    assert len(printed.splitlines()) == 1


def test_another_error_of_a_step_is_not_taken_for_that(tmp_path, monkeypatch):
    def fail(run, images, labels):
        raise RuntimeError("the size of tensor a must match")

    monkeypatch.setattr(loop.Run, "_train_step", fail)
    with pytest.raises(RuntimeError, match="the size of tensor a"):
        cli.main(["train", "--epochs", "1", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "words, epochs",
    [
        ("", 2.0),
        ("--arch cifar_resnet56", 2.0),
        ("--arch cifar_resnet110", 8.0),
        ("--arch cifar_resnet110 --warmup 0.5", 0.5),
        ("--warmup 0", 0.0),
    ],
)
def test_deep_models_warm_up_longer(words, epochs):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command._settings(parser.parse_args(words.split())).warmup == epochs


BAD = {
    "--arch resnet5": "there is no such model; did you mean resnet50?",
    "--arch resnet18": "give --data",
    "--data /nowhere": "--data /nowhere: there is no such folder",
    "--epochs 0": "--epochs 0: expected 1 or more",
    "--batch-size 1": "--batch-size 1: expected 2 or more",
    "--batch-size 99999999999999999999": "--batch-size 99999999999999999999: expected at most 2147483647",
    "--workers 100000": "--workers 100000: expected at most ",
    "--lr nan": "--lr nan: expected a number above 0",
    "--warmup -1": "--warmup -1: expected a number of 0 or more",
    "--arch RESNET5O": "there is no such model; did you mean resnet50?",
    "--device tpu9": "--device tpu9: expected cpu or cuda",
    "--device meta": "--device meta: expected cpu or cuda",
    "--device cpu --cuda-graph": "--cuda-graph needs --device cuda, this run is on cpu",
    "--device cuda:x": "--device cuda:x cannot be used: ",
    "--seed -1": "--seed -1: expected 0 to 2**32-1",
    "--seed 4294967296": "--seed 4294967296: expected 0 to 2**32-1",
    "--image-size 32": "--image-size is of the images of --data: give --data as well",
    "--data=": "--data '': expected a folder",
    "--resume": "there is no",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_get_one_sentence(arguments, tmp_path, capsys):
    assert cli.main(["train", *arguments.split(), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert BAD[arguments] in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_out_that_is_empty_is_refused(capsys):
    assert cli.main(["train", "--out", ""]) == 2
    assert capsys.readouterr().err == "fastres train: --out '': expected a folder\n"


def test_options_of_a_number_say_what_it_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--epochs EPOCHS", "--batch-size BATCH_SIZE", "--seed SEED"):
        assert f"{option} " in text and f"{option} (default" not in text


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(f"train --out {tmp_path}/file/run".split()) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["/proc/fastres/run", "/dev/null/run", "x" * 300])
def test_out_that_cannot_be_written_is_refused_before_training(out, capsys):
    assert cli.main(["train", "--out", out]) == 2
    printed = capsys.readouterr()
    assert f"--out {out}: " in printed.err and len(printed.err.splitlines()) == 1
    assert not printed.out


@pytest.mark.parametrize("writer", ["checkpoint.save", "report.write_metrics", "report.draw_curves"])
def test_a_disk_that_fills_up_while_training(writer, tmp_path, capsys, monkeypatch):
    module, name = writer.split(".")
    write, calls = getattr(getattr(loop, module), name), []

    def fill_up(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(getattr(loop, module), name, fill_up)
    assert cli.main(f"train --epochs 3 --batch-size 512 --out {tmp_path}".split()) == 2
    error = capsys.readouterr().err
    assert f"--out {tmp_path}: cannot write there: No space left on device" in error
    assert len(error.splitlines()) == 1


def test_interrupted_by_the_keyboard(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastres", "train", "--epochs", "1000", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "interrupted; the same command with --resume" in error and "Traceback" not in error
    assert set(torch.load(tmp_path / "checkpoint.pt")) >= {"model", "optimizer", "random", "epochs"}
