"""A profile: what was measured, what follows from it, and its JSON."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from fastres.files import replaced
from fastres.profiler.limits import Limits
from fastres.timing import Machine, Spread, ratios

if TYPE_CHECKING:
    from fastres.profiler.compare import Comparison

VERSION = 1
_PARTS = (
    "settings",
    "machine",
    "limits",
    "whole_step",
    "profiled_step",
    "blocks",
    "rest",
    "memory",
    "memory_marks",
    "advice",
)
_SUMMED = ("seconds", "flops", "bytes", "bound", "saved_bytes")


def _sum(values: list):
    """Of numbers, or of dicts and lists of them, place by place."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _sum([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [sum(numbers) for numbers in zip(*values, strict=True)]
    return sum(values)


def _try(profile: Profile) -> None:
    """Make all that a profile is read for.

    Raises:
        Exception: of any type, where something in it is not as `to_json` writes it.
    """
    from fastres.profiler.report import body_and_figures

    data = profile.data
    json.dumps(data, allow_nan=False)
    directions = ["forward", *(["backward"] if data["settings"]["mode"] == "train" else [])]
    for row in profile.rows:
        if row.directions != directions or not (isinstance(row.block, str) and isinstance(row.name, str)):
            raise ValueError("an op has no name, or other passes than its mode")
    parts = [row.by_round(v, d) for row in profile.rows for v in profile.variants for d in directions]
    parts += [times for by_variant in data["rest"].values() for times in by_variant.values()]
    steps = [*data["whole_step"].values(), *data["profiled_step"].values()]
    if not (all(min(times) >= 0 for times in parts) and all(min(times) > 0 for times in steps)):
        raise ValueError("a time is not positive")
    body_and_figures(profile)
    profile.show(io.StringIO())
    if profile.rows:
        profile.compare(profile)


@dataclass(frozen=True)
class Row:
    """One op of a profile, or a whole block.

    Attributes:
        block, name: where it is; the name is "" for the whole block.
        data: its part of the JSON; of a block, the sums of those of its ops.
    """

    block: str
    name: str
    data: dict

    @classmethod
    def total(cls, block: str, ops: list[dict]) -> Row:
        """The whole of a block."""
        numbers = {key: _sum([op[key] for op in ops]) for key in _SUMMED if all(key in op for op in ops)}
        return cls(block, "", numbers)

    @property
    def directions(self) -> list[str]:
        return list(self.data["flops"])

    def by_round(self, variant: str, *directions: str) -> list[float]:
        """Seconds of each round, of all directions or of those given."""
        seconds = self.data["seconds"][variant]
        return [sum(times) for times in zip(*(seconds[d] for d in directions or seconds), strict=True)]

    def seconds(self, variant: str, *directions: str) -> float:
        return median(self.by_round(variant, *directions))

    def speedup(self) -> Spread:
        """stock's time / fused's, round by round."""
        return Spread.of(
            [
                a / b if b else 1.0
                for a, b in zip(self.by_round("stock"), self.by_round("fused"), strict=True)
            ]
        )

    def saved_bytes(self, variant: str) -> int:
        """Kept for the backward pass."""
        return self.data.get("saved_bytes", {}).get(variant, 0)

    @property
    def ran(self) -> str:
        """The fused op; or that stock's layers did, and why."""
        return f"stock: {self.data['reason']}" if self.data["reason"] else self.data["ran"]

    def called(self, variant: str) -> list[str]:
        """PyTorch's ops that took an op's time, forward before backward."""
        by_direction = self.data.get("called", {}).get(variant, {})
        return list(dict.fromkeys(name for names in by_direction.values() for name in names))

    @property
    def bound(self) -> float:
        """Seconds that the machine's limits allow."""
        return sum(self.data["bound"].values())

    @property
    def lost(self) -> float:
        """Seconds above the bound, of the fused variant."""
        return max(self.seconds("fused") - self.bound, 0.0)


class Profile:
    """What :func:`fastres.profile` measured. Its str is a summary; `show()` prints a table.

    Args:
        data: the content of the JSON file.
    """

    def __init__(self, data: dict) -> None:
        self.data = data

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """A profile that was written by `to_json`.

        Raises:
            ValueError: it is none, or is damaged.
            OSError: it cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            version = data["fastres_profile"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}: is no profile that `fastres profile --json` wrote") from None
        if version != VERSION:
            raise ValueError(f"{path}: is of version {version!r} of the profiles, expected {VERSION}")
        missing = [part for part in _PARTS if part not in data]
        if missing:
            raise ValueError(f"{path}: is a profile without {', '.join(missing)}")
        profile = cls(data)
        try:
            _try(profile)
        except Exception:  # whatever may be missing or of another type
            raise ValueError(f"{path}: is a damaged profile, which cannot be shown") from None
        return profile

    @property
    def rows(self) -> list[Row]:
        """All ops, in the order of the forward."""
        return [Row(block["name"], op["name"], op) for block in self.data["blocks"] for op in block["ops"]]

    @property
    def blocks(self) -> list[Row]:
        """All blocks, in the order of the forward."""
        return [Row.total(block["name"], block["ops"]) for block in self.data["blocks"]]

    @property
    def variants(self) -> list[str]:
        """Those that were timed op by op: fused and stock."""
        return list(self.data["profiled_step"])

    @property
    def limits(self) -> Limits:
        return Limits.of(self.data["limits"])

    @property
    def machine(self) -> Machine:
        return Machine(**{field.name: self.data["machine"][field.name] for field in fields(Machine)})

    def speedup(self, against: str = "stock") -> Spread:
        """Of the whole step, timed outside the profiler: `against`'s time / fused's, round by round."""
        return Spread.of(ratios(self.data["whole_step"], against, "fused"))

    def agreement(self, variant: str) -> float:
        """The sum over all parts / the whole step's time outside the profiler."""
        return Spread.of(
            [
                a / b
                for a, b in zip(
                    self.data["profiled_step"][variant], self.data["whole_step"][variant], strict=True
                )
            ]
        ).median

    def saved_bytes(self, variant: str) -> int:
        """Kept for the backward pass."""
        return sum(row.saved_bytes(variant) for row in self.rows)

    @property
    def title(self) -> str:
        """What was measured."""
        settings = self.data["settings"]
        shape = "x".join(map(str, settings["input"]))
        return ", ".join(
            [
                settings["model"],
                settings["mode"],
                shape,
                *(settings[s] for s in ("dtype", "layout", "device")),
            ]
        )

    def __str__(self) -> str:
        return "\n".join([self.title, str(self.machine), *self.data["advice"]])

    __repr__ = __str__

    def show(self, file=None) -> None:
        """Print a table of the blocks and one of the ops, those first that lose most against the bound."""
        from fastres.profiler.table import show

        show(self, file)

    def compare(self, other: Profile) -> Comparison:
        """What became of this profile's times in the other one.

        Raises:
            ValueError: one is of training and one of inference, or they have no op in common.
        """
        from fastres.profiler.compare import compare

        return compare(self, other)

    def to_html(self, path: str | Path) -> None:
        """Write a report to look at: one file, which needs no network.

        Raises:
            OSError: as of open.
        """
        from fastres.profiler.report import html

        text = html(self)
        with replaced(Path(path)) as file:
            file.write(text)

    def to_json(self, path: str | Path) -> None:
        """Write it.

        Raises:
            OSError: as of open.
        """
        with replaced(Path(path)) as file:
            json.dump(self.data, file, indent=1)
            file.write("\n")
