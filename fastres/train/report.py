"""What a run leaves to look at: metrics.csv, one row an epoch, and curves.png."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastres.files import replaced


@dataclass
class Epoch:
    """One row of metrics.csv; loss and accuracy are of the training images, seen with augmentation."""

    epoch: int
    learning_rate: float
    loss: float
    accuracy: float
    images_per_second: float


def write_metrics(epochs: list[Epoch], path: Path) -> None:
    """Anew each time and at once, so that a resumed run never repeats a row."""
    with replaced(path) as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Epoch)])
        writer.writeheader()
        writer.writerows(asdict(epoch) for epoch in epochs)


def draw_curves(epochs: list[Epoch], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    figure.suptitle(title)
    numbers = [epoch.epoch for epoch in epochs]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(
            numbers, [getattr(epoch, name) for epoch in epochs], marker="." if len(numbers) < 30 else None
        )
        axes.set(xlabel="epoch", ylabel=f"training {name}")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
