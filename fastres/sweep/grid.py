"""The cells of a grid, and the file that keeps those that were measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from fastres.errors import SettingsError
from fastres.files import replaced

VERSION = 1


class SweepError(SettingsError):
    """The sweep that was asked for cannot be made; the message says why."""


@dataclass(frozen=True)
class Cell:
    """What differs from one measurement to another."""

    model: str
    dtype: str
    threads: int
    batch: int
    image_size: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.model}, batch {self.batch}, {self.image_size} px, {self.dtype}, {threads}"


def cells(
    models: Iterable[str],
    dtypes: Iterable[str],
    threads: Iterable[int],
    batches: Iterable[int],
    image_sizes: Iterable[int],
) -> list[Cell]:
    """All of the grid, each once."""
    return list(
        dict.fromkeys(Cell(*values) for values in product(models, dtypes, threads, batches, image_sizes))
    )


class Sweep:
    """What was measured so far.

    Args:
        settings: that all cells have in common.
        machine: likewise.

    Attributes:
        results: by cell; "source" of the model and {"error": why} for one that cannot run, else
            "images_per_second" and "seconds_by_round" by variant and "speedup" {median, low, high} by stock
            variant.
    """

    def __init__(self, settings: dict, machine: dict) -> None:
        self.settings = settings
        self.machine = machine
        self.results: dict[Cell, dict] = {}

    def read(self, path: Path) -> None:
        """Take over what a file has, so that the sweep goes on with the rest.

        Raises:
            SweepError: it is of other settings or another machine, or is no sweep's.
            OSError: it cannot be read.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data["fastres_sweep"]
            results = {Cell(**cell["cell"]): cell["result"] for cell in data["cells"]}
            kept = {**data["settings"], **data["machine"]}
            for result in results.values():
                _check(result, kept["against"].split(","))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise SweepError(f"{path}: is no file that `fastres sweep` wrote") from None
        if version != VERSION:
            raise SweepError(f"{path}: is of version {version} of the sweeps, expected {VERSION}")
        now = {**self.settings, **self.machine}
        other = [
            f"{name} {kept.get(name)} in place of {now[name]}"
            for name in now
            if kept.get(name) != now[name]
        ]
        if other:
            raise SweepError(f"{path}: was measured with {', '.join(other)}; --restart measures all anew")
        self.results.update(results)

    def errors(self, grid: Iterable[Cell]) -> list[tuple[Cell, str]]:
        """The cells that cannot run, and why."""
        results = ((cell, self.results[cell]) for cell in grid)
        return [(cell, result["error"]) for cell, result in results if "error" in result]

    def write(self, path: Path) -> None:
        """Replace the file.

        Raises:
            OSError: as of open.
        """
        data = {
            "fastres_sweep": VERSION,
            "settings": self.settings,
            "machine": self.machine,
            "cells": [{"cell": asdict(cell), "result": result} for cell, result in self.results.items()],
        }
        with replaced(path) as file:
            json.dump(data, file, indent=1)
            file.write("\n")


def _check(result: dict, against: list[str]) -> None:
    """
    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is no cell's.
    """
    if isinstance(result.get("error"), str):
        return
    for name in against:
        spread = [result["speedup"][name][key] for key in ("median", "low", "high")]
        if not all(0 < value < math.inf for value in (*spread, result["images_per_second"][name])):
            raise ValueError(f"{name} has a value that is not positive")
