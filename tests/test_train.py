"""The training program: resuming to the bit, atomic checkpoints, the files it leaves."""

import contextlib
import csv
import dataclasses
import errno
import io
import random
import re
import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from training import SETTINGS, weights

from fastres import cli
from fastres.train import checkpoint, data, loop, report


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resumed_at_an_epochs_end_equals_uninterrupted(dtype, few, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_PROGRESS_SECONDS", 0)
    settings = loop.Settings(**SETTINGS, dtype=dtype)
    whole = loop.Run(settings, few, tmp_path / "whole")
    whole.train()

    class Stop(Exception):
        pass

    def stop(epoch, done, total, loss, rate):
        if epoch == 1 and done > total // 2:  # in the middle of the second epoch
            raise Stop

    broken = loop.Run(settings, few, tmp_path / "broken")
    with pytest.raises(Stop):
        broken.train(stop)
    torch.manual_seed(999)
    resumed = loop.Run(settings, few, tmp_path / "broken")
    resumed.resume()
    assert len(resumed.epochs) == 1
    resumed.train()
    assert torch.equal(weights(whole), weights(resumed))
    for ours, theirs in zip(whole.epochs, resumed.epochs, strict=True):
        assert (ours.epoch, ours.loss, ours.accuracy) == (theirs.epoch, theirs.loss, theirs.accuracy)


def test_same_seed_same_weights_other_seed_others(few, tmp_path):
    results = []
    for seed in (0, 0, 1):
        run = loop.Run(loop.Settings(**SETTINGS | dict(epochs=1), seed=seed), few, tmp_path)
        run.train()
        results.append(weights(run))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_stock_layers_train_alike(few, tmp_path):
    losses = []
    for fused in (True, False):
        run = loop.Run(loop.Settings(**SETTINGS, fused=fused), few, tmp_path)
        run.train()
        losses.append(run.epochs[0].loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_files_of_a_run(few, tmp_path):
    run = loop.Run(loop.Settings(**SETTINGS), few, tmp_path)
    run.train()
    rows = list(csv.DictReader(open(tmp_path / "metrics.csv")))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert float(rows[-1]["loss"]) == run.epochs[-1].loss
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 600 and len(image.getcolors(1 << 20)) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "curves.png",
        "metrics.csv",
    ]


def test_the_loss_that_is_shown_is_the_epochs_mean(tmp_path, capsys):
    assert cli.main(f"train --epochs 2 --batch-size 512 --out {tmp_path}".split()) == 0
    shown = re.findall(r"loss (\S+)", capsys.readouterr().out)
    rows = csv.DictReader(open(tmp_path / "metrics.csv"))
    assert shown == [f"{float(row['loss']):.4f}" for row in rows]


def test_progress_is_not_asked_of_the_device_at_each_step(few, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_PROGRESS_SECONDS", 1e9)
    seen = []
    run = loop.Run(loop.Settings(**SETTINGS), few, tmp_path)
    run.train(lambda epoch, done, total, loss, rate: seen.append((epoch, done, total)))
    assert [epoch for epoch, _, _ in seen] == list(range(run.settings.epochs))
    assert all(done == total for _, done, total in seen)


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_what_a_diverged_epoch_computed_is_not_kept(loss, few, tmp_path, monkeypatch):
    run = loop.Run(loop.Settings(**SETTINGS), few, tmp_path)
    train_epoch = run._train_epoch

    def diverge(epoch, progress):
        trained = train_epoch(epoch, progress)
        return trained if epoch == 0 else dataclasses.replace(trained, loss=float(loss))

    monkeypatch.setattr(run, "_train_epoch", diverge)
    with pytest.raises(loop.DivergedError, match=f"the loss of epoch 2 is {loss}"):
        run.train()
    assert len(torch.load(tmp_path / "checkpoint.pt")["epochs"]) == 1
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


def test_a_run_that_is_in_the_folder_is_put_aside(few, tmp_path):
    for epochs in (2, 1):
        run = loop.Run(loop.Settings(**SETTINGS | dict(epochs=epochs)), few, tmp_path)
        run.train()
    for folder, epochs in ((tmp_path, 1), (tmp_path / "previous", 2)):
        assert len(torch.load(folder / "checkpoint.pt")["epochs"]) == epochs
        assert len((folder / "metrics.csv").read_text().splitlines()) == epochs + 1
        assert (folder / "curves.png").exists()
    run = loop.Run(loop.Settings(**SETTINGS | dict(epochs=1)), few, tmp_path)
    run.resume()
    run.train()  # none of its epochs are left
    assert len(torch.load(tmp_path / "previous" / "checkpoint.pt")["epochs"]) == 2


@pytest.mark.parametrize(
    "key, value", [("settings", None), ("settings", []), ("optimizer", None), ("random", 3)]
)
def test_a_checkpoint_with_broken_values_is_refused(key, value, few, tmp_path):
    run = loop.Run(loop.Settings(**SETTINGS), few, tmp_path)
    run.train()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**state, key: value}, tmp_path / "checkpoint.pt")
    with pytest.raises(loop.ResumeError):
        loop.Run(loop.Settings(**SETTINGS), few, tmp_path).resume()


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"a": torch.ones(3)}, path)

    def crash(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save({"a": torch.zeros(3)}, path)
    assert torch.equal(torch.load(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_learning_rate_warms_up_and_ends_near_zero(few, tmp_path):
    run = loop.Run(loop.Settings(**SETTINGS | dict(epochs=20, lr=1.0)), few, tmp_path)
    rates = [run._learning_rate(epoch / 10) for epoch in range(201)]
    assert rates[0] == 0.01 and max(rates) == rates[20] == 1.0 and rates[200] < 1e-9
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_norms_and_biases_are_not_decayed(few, tmp_path):
    run = loop.Run(loop.Settings(**SETTINGS), few, tmp_path)
    decays = {p: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    for name, parameter in run.model.named_parameters():
        assert decays[parameter] == (loop.Settings.weight_decay if parameter.dim() > 1 else 0), name


def test_every_generator_is_restored():
    states, drawn = (
        checkpoint.random_states(),
        [random.random(), numpy.random.random(), torch.rand(()).item()],
    )
    checkpoint.restore_random_states(states)
    assert [random.random(), numpy.random.random(), torch.rand(()).item()] == drawn


def test_no_batch_has_a_single_image(few, tmp_path):
    few.train = TensorDataset(*few.train[:33])
    settings = loop.Settings(**{**SETTINGS, "batch_size": 16})
    sizes = [len(labels) for _, labels in loop.Run(settings, few, tmp_path)._batches(len(few.train))]
    assert sizes == [16, 16]


def test_metrics_are_rewritten_not_appended(tmp_path):
    epoch = report.Epoch(1, 0.1, 2.0, 0.5, 100.0)
    for _ in range(2):
        report.write_metrics([epoch], tmp_path / "metrics.csv")
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


def test_interrupted_in_the_first_epoch_it_can_be_resumed(few, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_PROGRESS_SECONDS", 0)
    settings = loop.Settings(**SETTINGS | dict(epochs=1))
    whole = loop.Run(settings, few, tmp_path / "whole")
    whole.train()

    def interrupt(epoch, done, total, loss, rate):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.Run(settings, few, tmp_path / "broken").train(interrupt)
    torch.manual_seed(999)
    resumed = loop.Run(settings, few, tmp_path / "broken")
    resumed.resume()
    resumed.train()
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {"settings": {}}])
def test_other_files_of_torch_save_are_no_checkpoint(content, few, tmp_path):
    torch.save(content, tmp_path / "checkpoint.pt")
    run = loop.Run(loop.Settings(**SETTINGS), few, tmp_path)
    with pytest.raises(loop.ResumeError, match="is no checkpoint of fastres train"):
        run.resume()


def test_the_largest_seed_is_taken(few, tmp_path):
    loop.Run(loop.Settings(**SETTINGS, seed=2**32 - 1), few, tmp_path)


def test_out_is_seen_to_take_files_before_a_resumed_training(few, tmp_path, monkeypatch):
    loop.Run(loop.Settings(**SETTINGS | dict(epochs=1)), few, tmp_path).train()

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.tempfile, "TemporaryFile", full)
    run = loop.Run(loop.Settings(**SETTINGS | dict(epochs=1)), few, tmp_path)
    run.resume()
    with pytest.raises(loop.FolderError, match="cannot write there: No space left on device; once it can"):
        run.open_folder()


def test_a_full_disk_is_an_os_error_whatever_the_archive_says(tmp_path):
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path; from fastres.train import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoint.save({'a': torch.ones(1_000_000)}, Path(sys.argv[1]) / 'checkpoint.pt')\n"
        "except OSError as error: print(error.strerror)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert run.stdout.strip() == "File too large", run.stderr
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_run_is_refused(few, tmp_path):
    loop.Run(loop.Settings(**SETTINGS | dict(epochs=1)), few, tmp_path).train()
    other = loop.Run(loop.Settings(**SETTINGS | dict(epochs=1, arch="cifar_plain20")), few, tmp_path)
    with pytest.raises(
        loop.ResumeError, match="trained with arch cifar_resnet20, this run has cifar_plain20"
    ):
        other.resume()
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(loop.ResumeError, match="is damaged or no checkpoint"):
        other.resume()


def test_a_short_run_recognises_most_held_out_digits(tmp_path, capsys):
    assert cli.main(f"train --epochs 4 --out {tmp_path}".split()) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("held-out accuracy ") and float(last.split()[-1]) > 0.9


def test_subset_of_test_images_gives_the_same_accuracy_in_any_batch(few, tmp_path):
    run = loop.Run(loop.Settings(**SETTINGS), few, tmp_path)
    whole = run.evaluate() * len(few.test)
    parts = 0.0
    held_out = few.test
    for start in range(0, len(held_out), 7):
        run.data = data.Data(
            few.train, Subset(held_out, range(start, min(start + 7, len(held_out)))), few.classes, 1, "", ""
        )
        parts += run.evaluate() * len(run.data.test)
    assert parts == pytest.approx(whole)


def test_a_run_is_resumed_on_the_same_images_alone(few, tmp_path):
    settings = loop.Settings(**SETTINGS)
    loop.Run(settings, few, tmp_path).train()
    with pytest.raises(loop.ResumeError, match="was trained on other images than other digits has now"):
        loop.Run(
            settings, dataclasses.replace(few, fingerprint="", description="other digits"), tmp_path
        ).resume()


@pytest.mark.parametrize("part", ["model", "optimizer", "epochs", "random"])
def test_a_checkpoint_with_a_broken_part(part, few, tmp_path):
    run = loop.Run(loop.Settings(**SETTINGS), few, tmp_path)
    run.train()
    state = torch.load(run.checkpoint_path)
    checkpoint.save(state | {part: {"what": "is this"}}, run.checkpoint_path)
    with pytest.raises(loop.ResumeError, match="checkpoint.pt is damaged"):
        loop.Run(loop.Settings(**SETTINGS), few, tmp_path).resume()


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"a": torch.ones(3)}, path)

    class Disk(io.RawIOBase):
        def write(self, data):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "replaced", lambda path, mode: contextlib.nullcontext(Disk()))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save({"a": torch.ones(3)}, path)
    assert torch.equal(torch.load(path)["a"], torch.ones(3))
