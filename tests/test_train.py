"""The training program: data, resuming to the bit, atomic checkpoints, the files it leaves, its errors."""

import argparse
import csv
import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from fastres import cli
from fastres.train import checkpoint, command, data, loop, report
from fastres.train.graph import GraphedStep

SETTINGS = dict(arch="cifar_resnet20", epochs=3, batch_size=16, lr=0.05)


@pytest.fixture(scope="module")
def few():
    """Digits enough for a few batches."""
    digits = data.digits()
    digits.train, digits.test = (TensorDataset(*part[:48]) for part in (digits.train, digits.test))
    return digits


@pytest.fixture
def folder_of_images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            size = (40 + 3 * i, 50, 3)
            pixels = torch.randint(0, 128, size, generator=generator) + (100 if name == "dog" else 0)
            Image.fromarray(pixels.byte().numpy()).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def weights(run):
    return torch.cat([value.flatten().double() for value in run.model.state_dict().values()])


def test_digits_are_real_and_the_held_out_ones_are_never_trained_on():
    digits = data.digits()
    assert len(digits.train) + len(digits.test) == 1797
    train, test = (
        {image.numpy().tobytes() for image in part.tensors[0]} for part in (digits.train, digits.test)
    )
    assert not train & test
    counts = torch.bincount(digits.test.tensors[1], minlength=10)
    assert counts.min() >= 34 and len(digits.test) == counts.sum()
    again = data.digits()
    assert torch.equal(again.test.tensors[0], digits.test.tensors[0])


def test_shifted_moves_each_image_by_itself_and_at_most_so_far():
    images = torch.zeros(64, 1, 9, 9)
    images[:, :, 4, 4] = 1
    moved = data.shifted(images, torch.Generator().manual_seed(0), pixels=2)
    assert moved.shape == images.shape and torch.equal(moved.sum((1, 2, 3)), torch.ones(64))
    rows, columns = moved[:, 0].flatten(1).argmax(1) // 9, moved[:, 0].flatten(1).argmax(1) % 9
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resumed_at_an_epochs_end_equals_uninterrupted(dtype, few, tmp_path):
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


class RunAgain:
    """In place of CUDA graphs: what was captured is run once more, with what its inputs then hold."""

    def __init__(self):
        self.aside = self.captured = self.replayed = 0

    def run_aside(self, run):
        self.aside += 1
        return run()

    def capture(self, run):
        self.captured += 1

        def replay():
            self.replayed += 1
            return run()

        return replay


def test_a_captured_step_is_replayed_on_each_whole_batch(few, tmp_path):
    settings = loop.Settings(**SETTINGS | dict(batch_size=20), cuda_graph=True)  # 20, 20 and 8 images
    plain, graphed = (loop.Run(settings, few, tmp_path / name) for name in ("plain", "graphed"))
    plain._step = plain._train_step
    graphs = RunAgain()
    graphed._step = GraphedStep(graphed._train_step, graphs)
    for run in (plain, graphed):
        torch.manual_seed(1)
        run.train()
    assert (graphs.aside, graphs.captured, graphs.replayed) == (3, 1, 3)
    assert torch.equal(weights(plain), weights(graphed))
    assert [epoch.loss for epoch in plain.epochs] == [epoch.loss for epoch in graphed.epochs]


def test_a_run_with_a_graph_continues_without(few, tmp_path):
    settings = loop.Settings(**SETTINGS, cuda_graph=True)
    graphed = loop.Run(settings, few, tmp_path)
    graphed._step = GraphedStep(graphed._train_step, RunAgain())
    graphed.train()
    plain = loop.Run(dataclasses.replace(settings, cuda_graph=False), few, tmp_path)
    plain.resume()
    assert torch.equal(weights(plain), weights(graphed))
    plain._train_epoch(0, None)
    assert all(isinstance(group["lr"], float) for group in plain.optimizer.param_groups)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_trains_with_a_cuda_graph(tmp_path, capsys):
    arguments = f"train --device cuda --cuda-graph --epochs 2 --out {tmp_path}/run"
    assert cli.main(arguments.split()) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("held-out accuracy ")


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


def test_learning_rate_warms_up_and_ends_near_zero(few, tmp_path):
    run = loop.Run(loop.Settings(**SETTINGS | dict(epochs=20, lr=1.0)), few, tmp_path)
    rates = [run._learning_rate(epoch / 10) for epoch in range(201)]
    assert rates[0] == 0.01 and max(rates) == rates[20] == 1.0 and rates[200] < 1e-9
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_metrics_are_rewritten_not_appended(tmp_path):
    epoch = report.Epoch(1, 0.1, 2.0, 0.5, 100.0)
    for _ in range(2):
        report.write_metrics([epoch], tmp_path / "metrics.csv")
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


def test_folder_of_images(folder_of_images):
    images = data.image_folder(folder_of_images, 32)
    assert images.classes == ["cat", "dog"] and len(images.train) == 16 and len(images.test) == 4
    assert not {path for path, _ in images.train.files} & {path for path, _ in images.test.files}
    image, label = images.train[0, 7]
    assert image.shape == (3, 32, 32) and label in (0, 1)
    assert torch.equal(images.test[1][0], images.test[1][0]), "held-out images are not augmented"
    crops = [images.train[0, seed][0] for seed in (7, 7, 8, 9)]
    assert torch.equal(crops[0], crops[1]) and not all(torch.equal(crops[0], crop) for crop in crops[2:])
    for part in ("train", "val"):
        (folder_of_images / part).mkdir()
        for name in ("cat", "dog"):
            target = folder_of_images / part / name
            target.mkdir()
            for path in list((folder_of_images / name).iterdir())[: 4 if part == "val" else 6]:
                path.rename(target / path.name)
    images = data.image_folder(folder_of_images, 32)
    assert (len(images.train), len(images.test)) == (12, 8)


def test_trains_on_a_folder_of_images(folder_of_images, tmp_path, capsys):
    arguments = (
        f"train --data {folder_of_images} --image-size 32 --epochs 1 --batch-size 8 --out {tmp_path}/run"
    )
    assert cli.main(arguments.split()) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("held-out accuracy ")


BAD = {
    "--arch resnet5": "there is no such model; did you mean resnet50?",
    "--arch resnet18": "give --data",
    "--data /nowhere": "--data /nowhere: there is no such folder",
    "--epochs 0": "--epochs 0: expected 1 or more",
    "--batch-size 1": "--batch-size 1: expected 2 or more",
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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut short", "no header", "empty"])
def test_broken_image_is_named(damage, workers, folder_of_images, tmp_path, capsys):
    path = folder_of_images / "cat" / "3.png"
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[: len(whole) // 2], "no header": whole[9:], "empty": b""}[damage])
    arguments = f"train --data {folder_of_images} --workers {workers} --epochs 1 --out {tmp_path}/run"
    assert cli.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert f"{path} is no image that can be read" in error and len(error.splitlines()) == 1


def test_weights_do_not_depend_on_the_number_of_workers(folder_of_images, tmp_path):
    results = []
    for workers in (0, 1, 2):
        settings = loop.Settings(**SETTINGS | dict(epochs=1, batch_size=4), workers=workers)
        run = loop.Run(settings, data.image_folder(folder_of_images, 32), tmp_path / "run")
        run.train()
        results.append(weights(run))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_interrupted_in_the_first_epoch_it_can_be_resumed(few, tmp_path):
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


def test_out_that_is_empty_is_refused(capsys):
    assert cli.main(["train", "--out", ""]) == 2
    assert capsys.readouterr().err == "fastres train: --out '': expected a folder\n"


def test_the_largest_seed_is_taken(few, tmp_path):
    loop.Run(loop.Settings(**SETTINGS, seed=2**32 - 1), few, tmp_path)


def test_options_of_a_number_say_what_it_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--epochs EPOCHS", "--batch-size BATCH_SIZE", "--seed SEED"):
        assert f"{option} " in text and f"{option} (default" not in text


def test_one_is_not_counted_in_the_plural(folder_of_images, tmp_path, capsys):
    def refusal():
        assert cli.main(f"train --data {folder_of_images} --out {tmp_path}/run".split()) == 2
        return capsys.readouterr().err

    for path in list((folder_of_images / "cat").iterdir())[1:]:
        path.unlink()
    assert "cat has 1 image, expected at least two" in refusal()
    for path in (folder_of_images / "cat").iterdir():
        path.unlink()
    assert "cat has no images, expected at least two" in refusal()
    (folder_of_images / "cat").rmdir()
    assert f"{folder_of_images} has 1 folder, expected at least two, one a class" in refusal()


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


def test_out_is_seen_to_take_files_before_a_resumed_training(few, tmp_path, monkeypatch):
    loop.Run(loop.Settings(**SETTINGS | dict(epochs=1)), few, tmp_path).train()

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.tempfile, "TemporaryFile", full)
    run = loop.Run(loop.Settings(**SETTINGS | dict(epochs=1)), few, tmp_path)
    run.resume()
    with pytest.raises(loop.FolderError, match="cannot write there: No space left on device; once it can"):
        run.open_folder()


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


def test_interrupted_by_the_keyboard(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastres", "train", "--epochs", "1000", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
    assert "interrupted; --resume" in error and "Traceback" not in error
    assert set(torch.load(tmp_path / "checkpoint.pt")) >= {"model", "optimizer", "random", "epochs"}


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
            few.train, Subset(held_out, range(start, min(start + 7, len(held_out)))), few.classes, 1, ""
        )
        parts += run.evaluate() * len(run.data.test)
    assert parts == pytest.approx(whole)
