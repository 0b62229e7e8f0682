"""Two profiles beside each other: what changed beyond the noise that they report themselves.

A time's noise is the standard error of its median, from the deviation of its rounds. Few rounds tell little
of their own noise, so no row counts as quieter than the typical one. A change is real where the interval of
b / a, three standard errors to each side, leaves 1 out.

Where both profiles come from one machine and one PyTorch, stock's layers are the same code in both,
whatever the versions of fastres. What they differ by, in the median over the rows, is the machine's
(clocks, neighbours), and is taken off before fused times are compared. How much they scatter around it is
noise between the profiles, which no round of either could see: no row counts as quieter than this either.
The whole step is compared by its ratio to stock's, round by round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, stdev

from fastres.profiler.result import Profile
from fastres.timing import ratios

Pair = tuple[list[float], list[float]]  # times by round, a's and b's

_ERRORS = 3.0  # standard errors to each side of an interval
_LEAST_NOISE = 0.01  # a round's relative standard deviation
_UNKNOWN_NOISE = 0.1  # of a single round
_LEAST_SHARE = 1e-3  # of a step that a row must take to tell of the machine's speed


@dataclass(frozen=True)
class Change:
    """One time in both profiles.

    Attributes:
        block: where it is; "" for the whole step.
        op, direction: what it is; "" for all of the block's.
        a, b: seconds, medians.
        ratio, low, high: b / a and its interval.
    """

    block: str
    op: str
    direction: str
    a: float
    b: float
    ratio: float
    low: float
    high: float

    @property
    def slower(self) -> bool:
        return self.low > 1

    @property
    def faster(self) -> bool:
        return self.high < 1

    def __str__(self) -> str:
        name = " ".join(filter(None, (self.block, self.op, self.direction))) or "the whole step"
        return f"{name} ({self.ratio - 1:+.0%})"


@dataclass(frozen=True)
class Comparison:
    """Of the profiles a and b.

    Attributes:
        differences: in settings and machine, "batch: 16, 32".
        drift: how much slower b's machine was, by stock's layers; 1.0 where that cannot be told.
        step: of the whole step.
        blocks: one each, in the order of the forward.
        ops: one each for every direction.
        missing: what only one of the two has.
    """

    differences: list[str]
    drift: float
    step: Change
    blocks: list[Change]
    ops: list[Change]
    missing: list[str]

    def slower_than(self, percent: float) -> list[Change]:
        """The step and the blocks that became slower by more than so much, beyond the noise."""
        return [c for c in (self.step, *self.blocks) if c.slower and c.ratio > 1 + percent / 100]

    def sentence(self) -> str:
        """What changed."""
        step = self.step
        changed = [c for c in self.blocks if c.slower or c.faster]
        if not (changed or step.slower or step.faster):
            words = ["Nothing changed beyond the noise."]
            if self.missing:
                words = ["Of the ops that both have, nothing changed beyond the noise."]
        elif step.slower or step.faster:
            value = max(step.ratio, 1 / step.ratio)
            words = [f"The step became {value:.2f}x {'slower' if step.slower else 'faster'}."]
        else:
            words = ["The step is as fast as before, within the noise."]
        for name in ("slower", "faster"):
            found = sorted((c for c in changed if getattr(c, name)), key=lambda c: -abs(c.b - c.a))
            if found:
                words.append(f"{name.capitalize()} beyond the noise: {', '.join(map(str, found))}.")
        for place in ("only in a", "only in b"):
            count = sum(line.startswith(f"{place}: ") for line in self.missing)
            if count:
                words.append(f"{count} {'op is' if count == 1 else 'ops are'} {place}.")
        return " ".join(words)


def compare(a: Profile, b: Profile) -> Comparison:
    """What became of a's times in b.

    Raises:
        ValueError: one is of training and one of inference, or they have no op in common.
    """
    modes = [p.data["settings"]["mode"] for p in (a, b)]
    if modes[0] != modes[1]:
        raise ValueError(f"one profile is of mode {modes[0]}, the other of mode {modes[1]}")
    rows = [{(row.block, row.name): row for row in profile.rows} for profile in (a, b)]
    both = [key for key in rows[0] if key in rows[1]]
    if not both:
        models = " and ".join(str(p.data["settings"]["model"]) for p in (a, b))
        raise ValueError(f"the profiles, of {models}, have no op in common")
    differences = _differences(a, b)
    same_stock = all(difference.startswith("fastres: ") for difference in differences)
    blocks = dict.fromkeys(block for block, _ in both)
    ops = {(*key, d): ([key], [d]) for key in both for d in rows[0][key].directions}

    def times(variant: str, keys: list[tuple[str, str]], directions: Sequence[str]) -> Pair:
        """Sums over some rows."""
        a, b = (
            [sum(t) for t in zip(*(found[key].by_round(variant, *directions) for key in keys), strict=True)]
            for found in rows
        )
        return a, b

    def changes(places: dict[tuple[str, str, str], tuple[list, list]]) -> tuple[float, list[Change]]:
        """The machine's drift, and a change for each place."""
        fused = {place: times("fused", *of) for place, of in places.items()}
        drift, scatter = 1.0, 0.0
        if same_stock:
            drift, scatter = _drift([times("stock", *of) for of in places.values()])
        noises = [median(_noise(pair[i]) for pair in fused.values()) for i in (0, 1)] if fused else []
        found = []
        for place, pair in fused.items():
            ratio, error = _ratio(pair, noises)
            found.append(_change(*place, pair, ratio / drift, max(error, scatter)))
        return drift, found

    drift, of_ops = changes(ops)
    _, of_blocks = changes({(b, "", ""): ([key for key in both if key[0] == b], []) for b in blocks})
    return Comparison(
        differences,
        drift,
        _step(a, b, with_stock=same_stock),
        of_blocks,
        of_ops,
        [f"only in a: {' '.join(key)}" for key in rows[0] if key not in rows[1]]
        + [f"only in b: {' '.join(key)}" for key in rows[1] if key not in rows[0]],
    )


def _step(a: Profile, b: Profile, with_stock: bool) -> Change:
    steps = a.data["whole_step"], b.data["whole_step"]
    ratio, error = _ratio(
        [ratios(s, "fused", "stock") if with_stock else s["fused"] for s in steps], (0, 0)
    )
    return _change("", "", "", [step["fused"] for step in steps], ratio, error)


def _change(block: str, op: str, direction: str, pair: Sequence, ratio: float, error: float) -> Change:
    a, b = (median(times) for times in pair)
    width = math.exp(_ERRORS * error)
    return Change(block, op, direction, a, b, ratio, low=ratio / width, high=ratio * width)


def _differences(a: Profile, b: Profile) -> list[str]:
    found = []
    for part in ("settings", "machine"):
        one, other = a.data[part], b.data[part]
        found += [
            f"{name}: {one.get(name)}, {other.get(name)}"
            for name in {**one, **other}
            if name not in ("repeat", "against", "gpu_clocks") and one.get(name) != other.get(name)
        ]
    return found


def _drift(stock: list[Pair]) -> tuple[float, float]:
    """How much slower stock's rows are in b, and how much the logarithms of that scatter."""
    medians = [(median(a), median(b)) for a, b in stock]
    least = _LEAST_SHARE * sum(a for a, _ in medians)
    logarithms = [math.log(b / a) for a, b in medians if min(a, b) > least]
    if not logarithms:
        return 1.0, 0.0
    centre = median(logarithms)
    return math.exp(centre), 1.483 * median(abs(value - centre) for value in logarithms)


def _ratio(pair: Sequence[list[float]], typical: Sequence[float]) -> tuple[float, float]:
    """Of the medians, b's to a's, and the standard error of its logarithm."""
    a, b = (median(times) for times in pair)
    if not min(a, b) > 0:
        return 1.0, math.inf
    errors = (
        1.253 * max(_noise(times), noise, _LEAST_NOISE) / math.sqrt(len(times))
        for times, noise in zip(pair, typical, strict=True)
    )
    return b / a, math.hypot(*errors)


def _noise(times: list[float]) -> float:
    """The relative standard deviation of a round."""
    if len(times) == 1:
        return _UNKNOWN_NOISE
    return stdev(times) / median(times) if median(times) else 0.0
