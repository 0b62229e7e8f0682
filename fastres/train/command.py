"""`fastres train`: arguments, progress on the terminal, exit status."""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastres import models
from fastres.errors import did_you_mean, first_line
from fastres.timing import usable_cores
from fastres.train.data import DataError, digits, image_folder
from fastres.train.loop import (
    CHECKPOINT,
    CURVES,
    METRICS,
    DivergedError,
    FolderError,
    Progress,
    ResumeError,
    Run,
    Settings,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--arch", default="cifar_resnet20", help="one of fastres.models (default: %(default)s)")
    add("--data", help="a folder with a folder of images for each class (default: scikit-learn's digits)")
    add("--epochs", type=int, default=30, help="times each image is trained on (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images a step (default: %(default)s)")
    add("--lr", type=float, default=0.1, help="peak learning rate (default: %(default)s)")
    add(
        "--warmup",
        type=float,
        help="epochs until the peak learning rate, at most a quarter of all (default: 2; 8 where the model "
        "has a hundred layers or more, which diverge or stand still otherwise)",
    )
    add("--image-size", type=int, help="side of the images of --data (default: 32 for cifar_*, else 224)")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast (default: %(default)s)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default here: %(default)s)",
    )
    add(
        "--cuda-graph",
        action="store_true",
        help="capture a step into a CUDA graph and replay it: less time between a small model's kernels",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the first weights, the order of the images and their augmentation (default: %(default)s)",
    )
    add("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    add("--out", default="runs/train", help="folder of the results (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out")
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument(
        "--fused", dest="fused", action="store_true", default=True, help="fused layers (default)"
    )
    layers.add_argument("--stock", dest="fused", action="store_false", help="PyTorch's own layers")


def run(arguments: argparse.Namespace) -> int:
    try:
        settings = _settings(arguments)
        data = (
            digits()
            if arguments.data is None
            else image_folder(Path(arguments.data), _image_size(arguments))
        )
        training = Run(settings, data, Path(arguments.out))
        if arguments.resume:
            training.resume()
        training.open_folder()
        layers = "fused" if settings.fused else "stock"
        print(
            f"{settings.arch} ({layers}, {settings.dtype}, {settings.device}) on {data.description}: "
            f"{len(data.train)} images to train on, {len(data.test)} held out"
        )
        if training.previous is not None:
            print(f"the run that is there goes to {training.previous}; --resume goes on with one")
        with _shown_progress(settings.epochs) as progress:
            training.train(progress)
        accuracy = training.evaluate()
    except (DataError, ResumeError, FolderError) as error:
        print(f"fastres train: {error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"fastres train: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"fastres train: out of memory at --batch-size {arguments.batch_size}, take a smaller one: "
            f"{first_line(error)}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        goes_on = (Path(arguments.out) / CHECKPOINT).exists()
        how = "the same command with --resume goes on" if goes_on else "no epoch was finished"
        print(f"\nfastres train: interrupted; {how}", file=sys.stderr)
        return 130
    print(f"results in {arguments.out}: {CHECKPOINT}, {METRICS}, {CURVES}")
    print(f"held-out accuracy {accuracy:.4f}")
    return 0


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # On the CPU PyTorch's error has no type of its own.
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "bad_alloc"))


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.arch not in models.list_models():
        names = models.list_models()
        hint = did_you_mean(arguments.arch, names, otherwise=f"there are {', '.join(names)}")
        raise DataError(f"--arch {arguments.arch}: there is no such model; {hint}")
    most_workers = 4 * usable_cores()
    for name, least, most in (
        ("epochs", 1, 2**31 - 1),
        ("batch_size", 2, 2**31 - 1),
        ("image_size", 32, 2**15),
        ("workers", 0, most_workers),
    ):
        value = getattr(arguments, name)
        if value is None or least <= value <= most:
            continue
        expected = f"{least} or more" if value < least else f"at most {most}"
        raise DataError(f"--{name.replace('_', '-')} {value}: expected {expected}")
    if not 0 <= arguments.seed < 2**32:
        raise DataError(f"--seed {arguments.seed}: expected 0 to 2**32-1")
    for name in ("data", "out"):
        if getattr(arguments, name) == "":
            raise DataError(f"--{name} '': expected a folder")
    if arguments.image_size is not None and arguments.data is None:
        raise DataError("--image-size is of the images of --data: give --data as well")
    if not 0 < arguments.lr < float("inf"):
        raise DataError(f"--lr {arguments.lr}: expected a number above 0")
    if arguments.warmup is not None and not 0 <= arguments.warmup < float("inf"):
        raise DataError(f"--warmup {arguments.warmup:g}: expected a number of 0 or more")
    if arguments.arch.startswith("cifar_") is False and arguments.data is None:
        raise DataError(
            f"--arch {arguments.arch} takes images of three channels: give --data, a folder of images"
        )
    _check_device(arguments.device)
    if arguments.cuda_graph and not arguments.device.startswith("cuda"):
        raise DataError(f"--cuda-graph needs --device cuda, this run is on {arguments.device}")
    folder = Path(arguments.out)
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise DataError(f"--out {arguments.out}: {error.strerror}") from error
    if not existing.is_dir():
        raise DataError(f"--out {arguments.out}: {existing} is a file, not a folder")
    names = ("arch", "epochs", "batch_size", "lr", "dtype", "seed", "fused", "device", "workers")
    warmup = _warmup(arguments.arch) if arguments.warmup is None else arguments.warmup
    return Settings(**{name: getattr(arguments, name) for name in (*names, "cuda_graph")}, warmup=warmup)


def _warmup(arch: str) -> float:
    """Epochs. He et al. 2015, section 4.2: 110 layers do not begin to converge at the rate that 56 do."""
    depth = re.search(r"\d+", arch)
    return 8.0 if depth and int(depth[0]) >= 100 else Settings.warmup


def _image_size(arguments: argparse.Namespace) -> int:
    return arguments.image_size or (32 if arguments.arch.startswith("cifar_") else 224)


def _check_device(name: str) -> None:
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise DataError(f"--device {name}: expected cpu or cuda")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise DataError(f"--device {name} cannot be used: {first_line(error)}") from error


@contextmanager
def _shown_progress(epochs: int) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line an epoch."""
    if not sys.stdout.isatty():
        started = time.perf_counter()

        def line(epoch: int, done: int, total: int, loss: float, rate: float) -> None:
            if done >= total - 1:
                seconds = time.perf_counter() - started
                print(
                    f"epoch {epoch + 1}/{epochs}  loss {loss:.4f}  {rate:.0f} images/s  {seconds:.0f} s",
                    flush=True,
                )

        yield line
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} images/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns) as bar:
        task = bar.add_task("train", total=None, epoch=f"1/{epochs}", loss=float("nan"), rate=0.0)

        def update(epoch: int, done: int, total: int, loss: float, rate: float) -> None:
            bar.update(
                task,
                total=epochs * total,
                completed=epoch * total + done,
                epoch=f"{epoch + 1}/{epochs}",
                loss=loss,
                rate=rate,
            )

        yield update
