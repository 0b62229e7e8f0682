"""Training a residual network to a held-out accuracy."""

import contextlib
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastres import models, sites
from fastres.cuda_graph import CudaGraphs, GraphedStep
from fastres.train import checkpoint, report
from fastres.train.data import Data, batches_of, shifted


class ResumeError(ValueError):
    """A checkpoint does not belong to this run; the message says why."""


class FolderError(Exception):
    """The run's folder cannot be written to; the message says why."""


class DivergedError(Exception):
    """The loss is no longer a finite number; the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """What a run computes; two runs of equal settings, data and machine give equal weights.

    Attributes:
        lr: peak learning rate, warmed up over `warmup` epochs and then lowered along a cosine.
        dtype: "fp32" or "bf16" (autocast; weights and statistics stay fp32).
        fused: run the fused ops, else the same model's stock layers.
        momentum, weight_decay: of SGD.
        cuda_graph: capture a step and replay it, see fastres.cuda_graph.
    """

    arch: str
    epochs: int
    batch_size: int
    lr: float
    dtype: str = "fp32"
    seed: int = 0
    fused: bool = True
    device: str = "cpu"
    workers: int = 0
    warmup: float = 2.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    cuda_graph: bool = False


# Called now and then, and at an epoch's end: epoch, images done in it, images in it, their mean loss so
# far, images a second.
Progress = Callable[[int, int, int, float, float], None]

# Between two of these calls, apart from an epoch's last: each waits for the device.
_PROGRESS_SECONDS = 0.1

# What may differ between a run and its continuation.
_FREE = {"workers", "device", "cuda_graph"}

CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.csv", "curves.png"

_KEYS = {"settings", "data", "model", "optimizer", "epochs", "random"}


class Run:
    """One training run in a folder: model, optimizer and all that a checkpoint holds."""

    def __init__(self, settings: Settings, data: Data, folder: Path) -> None:
        self.settings, self.data, self.folder = settings, data, folder
        for seed in (torch.manual_seed, numpy.random.seed, random.seed):
            seed(settings.seed)
        arguments = {"num_classes": len(data.classes)}
        if settings.arch.startswith("cifar_"):
            arguments["in_channels"] = data.channels
        model = models.get_model(settings.arch, **arguments)
        self.model = model.to(settings.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            _parameter_groups(self.model, settings.weight_decay),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=True,
            fused=True,
        )
        self.epochs: list[report.Epoch] = []
        self._step = self._train_step
        if settings.cuda_graph:
            self._step = GraphedStep(self._train_step, CudaGraphs(settings.device))

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / CHECKPOINT

    def resume(self) -> None:
        """Continue from the folder's checkpoint.

        Raises:
            ResumeError: there is none, or it is of a run with other settings or data.
        """
        if not self.checkpoint_path.exists():
            raise ResumeError(f"--resume: there is no {self.checkpoint_path}")
        try:
            # To where the states of random generators have to be; the others are copied to the device.
            state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        except Exception as error:
            # Not torch's own message, which tells to load the file with weights_only=False.
            raise ResumeError(f"--resume: {self.checkpoint_path} is damaged or no checkpoint") from error
        is_ours = isinstance(state, dict) and state.keys() >= _KEYS and isinstance(state["settings"], dict)
        if not is_ours:
            raise ResumeError(f"--resume: {self.checkpoint_path} is no checkpoint of fastres train")
        for name, value in asdict(self.settings).items():
            theirs = state["settings"].get(name)
            if name not in _FREE and theirs != value:
                raise ResumeError(
                    f"--resume: {self.checkpoint_path} was trained with {name} {theirs}, "
                    f"this run has {value}"
                )
        if state["data"] != self.data.fingerprint:
            raise ResumeError(
                f"--resume: {self.checkpoint_path} was trained on other images than "
                f"{self.data.description} has now, or on images of another size"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epochs = [report.Epoch(**epoch) for epoch in state["epochs"]]
            checkpoint.restore_random_states(state["random"])
        except Exception as error:  # whatever the broken values lead to
            raise ResumeError(f"--resume: {self.checkpoint_path} is damaged") from error

    def open_folder(self) -> None:
        """Make the folder, and see that files can be written there.

        Raises:
            FolderError: they cannot.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass

    def train(self, progress: Progress | None = None) -> None:
        """Train the epochs that are left, leaving a checkpoint, metrics.csv and curves.png after each.

        Those of another run that are in the folder go into one called `previous`.

        Raises:
            FolderError: they cannot be written.
            DivergedError: an epoch's loss is nan or infinite; what is left is of the epoch before it.
        """
        self.open_folder()
        if not self.epochs:  # so that a run that is interrupted in its first epoch can be resumed as well
            with self._writing():
                self._put_aside()
                self._save_checkpoint()
        for epoch in range(len(self.epochs), self.settings.epochs):
            trained = self._train_epoch(epoch, progress)
            if not math.isfinite(trained.loss):
                raise DivergedError(
                    f"the loss of epoch {trained.epoch} is {trained.loss}, so the training has diverged; "
                    f"start it anew with a lower --lr than {self.settings.lr:g}"
                )
            self.epochs.append(trained)
            with self._writing():
                self._save_checkpoint()
                report.write_metrics(self.epochs, self.folder / METRICS)
                title = f"{self.settings.arch} on {self.data.description}"
                report.draw_curves(self.epochs, title, self.folder / CURVES)

    @property
    def previous(self) -> Path | None:
        """Where the run in the folder is going to be kept, if this is not its continuation."""
        if self.epochs or not (self.folder / METRICS).exists():
            return None
        return self.folder / "previous"

    def _put_aside(self) -> None:
        previous = self.previous
        if previous is None:
            return
        previous.mkdir(exist_ok=True)
        for name in (CHECKPOINT, METRICS, CURVES):
            (previous / name).unlink(missing_ok=True)
            if (self.folder / name).exists():
                (self.folder / name).rename(previous / name)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            hint = "; once it can, --resume goes on from the last checkpoint" if self.epochs else ""
            raise FolderError(f"--out {self.folder}: cannot write there: {reason}{hint}") from error

    def _save_checkpoint(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "data": self.data.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "random": checkpoint.random_states(),
        }
        checkpoint.save(state, self.checkpoint_path)

    def _train_epoch(self, epoch: int, progress: Progress | None) -> report.Epoch:
        self.model.train()
        total, done, started = len(self.data.train), 0, time.perf_counter()
        shown = started
        loss_sum = torch.zeros((), device=self.settings.device)
        correct = torch.zeros((), device=self.settings.device)
        for images, labels in self._batches(total):
            lr = self._learning_rate(epoch + done / total)
            self._set_learning_rate(lr)
            loss, output = self._step(images, labels)
            done += len(labels)
            loss_sum += loss * len(labels)
            correct += (output.argmax(1) == labels).sum()
            now = time.perf_counter()
            if progress is not None and (now - shown >= _PROGRESS_SECONDS or done >= total - 1):
                shown = now
                progress(epoch, done, total, loss_sum.item() / done, done / (time.perf_counter() - started))
        loss, accuracy = loss_sum.item() / done, correct.item() / done
        return report.Epoch(epoch + 1, lr, loss, accuracy, done / (time.perf_counter() - started))

    def _train_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        with self._autocast(), self._layers():
            output = self.model(images)
            loss = F.cross_entropy(output.float(), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), output.detach()

    def _set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if not self.settings.cuda_graph:
                group["lr"] = lr
            elif isinstance(group["lr"], Tensor):  # which a captured step reads
                group["lr"].fill_(lr)
            else:
                group["lr"] = torch.tensor(lr, device=self.settings.device)

    def _batches(self, total: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's batches in a random order; none of a single image, which no batch norm takes."""
        size = self.settings.batch_size
        order = torch.randperm(total)
        if total % size == 1:
            order = order[:-1]
        if isinstance(self.data.train, TensorDataset):
            augmentation = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
            images, labels = self.data.train.tensors
            for part in order.split(size):
                yield self._to_device(shifted(images[part], augmentation), labels[part])
        else:
            seeds = torch.randint(2**31, (len(order),))
            sampler = list(zip(order.tolist(), seeds.tolist(), strict=True))
            for images, labels in batches_of(self.data.train, size, self.settings.workers, sampler):
                yield self._to_device(images, labels)

    def evaluate(self) -> float:
        """The share of the held-out images whose class is recognised."""
        self.model.eval()
        correct = 0
        with torch.inference_mode(), self._autocast(), self._layers():
            for images, labels in batches_of(self.data.test, 256, self.settings.workers):
                images, labels = self._to_device(images, labels)
                correct += (self.model(images).argmax(1) == labels).sum().item()
        return correct / len(self.data.test)

    def _to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        device = self.settings.device
        return images.to(device, memory_format=torch.channels_last), labels.to(device)

    def _autocast(self):
        return torch.autocast(
            torch.device(self.settings.device).type, torch.bfloat16, enabled=self.settings.dtype == "bf16"
        )

    def _layers(self):
        return contextlib.nullcontext() if self.settings.fused else sites.stock()

    def _learning_rate(self, epoch: float) -> float:
        settings = self.settings
        warmup = min(settings.warmup, settings.epochs / 4)
        if epoch < warmup:
            return settings.lr * max(epoch / warmup, 0.01)
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (settings.epochs - warmup)))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Norms and biases are not decayed (Goyal et al. 2017, arXiv:1706.02677, section 5.3)."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
