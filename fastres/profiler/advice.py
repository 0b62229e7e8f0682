"""What a profile says, in sentences: only what was measured."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from fastres.profiler.result import Profile
from fastres.timing import too_few

_MOST = 3  # blocks' groups that are told of
_AGREES_WITHIN = 0.05  # of the step
_BEATEN, _FEW = 0.95, 0.1  # a limit, and passes that beat theirs by chance


def advice(profile: Profile) -> list[str]:
    """Sentences, the last of which says where to look next."""
    sentences = []
    for against in profile.data["settings"]["against"]:
        speedup = profile.speedup(against)
        value, spread = speedup.median, f"({speedup.low:.2f}x to {speedup.high:.2f}x)"
        unknown = too_few(len(profile.data["whole_step"]["fused"]))
        if unknown:
            sentences.append(f"Fused is {value:.2f}x as fast as {against}; {unknown}.")
        elif speedup.includes(1):
            sentences.append(f"Fused is as fast as {against}, within the noise {spread}.")
        elif value > 1:
            sentences.append(f"Fused is {value:.2f}x faster than {against} {spread}.")
        else:
            spread = f"({1 / speedup.high:.2f}x to {1 / speedup.low:.2f}x)"
            sentences.append(f"Fused is {1 / value:.2f}x slower than {against} {spread}.")
    sentences += _doubts(profile)
    unfused = [row for row in profile.rows if row.data["reason"]]
    if unfused:
        share = sum(row.seconds("fused") for row in unfused) / _total(profile)
        sentences.append(
            f"{len(unfused)} ops run unfused and take {share:.0%} of the step; the first: "
            f"{unfused[0].block} {unfused[0].name}: {unfused[0].data['reason']}."
        )
    groups = defaultdict(list)
    for row in profile.rows:
        groups[row.block.rpartition(".")[0] or row.block].append(row)
    worst = sorted(groups.items(), key=lambda item: -sum(row.lost for row in item[1]))[:_MOST]
    for name, rows in worst:
        time, bound = sum(row.seconds("fused") for row in rows), sum(row.bound for row in rows)
        if time > 0:
            above = f", {(time - bound) * 1e3:.1f} ms above it" if time > bound else ""
            sentences.append(
                f"{time / _total(profile):.0%} of the step is {name}: {_kind(profile, rows)}, at "
                f"{min(bound / time, 1):.0%} of the machine's limit{above}."
            )
    rows = sorted(profile.rows, key=lambda row: -row.lost)
    if rows:
        row = rows[0]
        lost = {d: row.seconds("fused", d) - row.data["bound"][d] for d in row.directions}
        where = max(lost, key=lost.get)
        part = f", {lost[where] * 1e3:.1f} of them {where}" if len(lost) > 1 else ""
        sentences.append(
            f"Look next at {row.block} {row.name}: of all ops it loses most, {row.lost * 1e3:.1f} ms{part}."
        )
    return [sentence for sentence in sentences if sentence]


def _doubts(profile: Profile) -> list[str]:
    """What is not to be taken at its word."""
    sentences = []
    for variant in profile.variants:
        agreement = profile.agreement(variant)
        if abs(agreement - 1) > _AGREES_WITHIN:
            sentences.append(
                f"Watched piece by piece, {variant} takes {agreement:.2f}x its time in one go: take the "
                "pieces' times as shares."
            )
    passes = [
        (row.seconds("fused", d), row.data["bound"][d]) for row in profile.rows for d in row.directions
    ]
    faster = sum(time < _BEATEN * bound for time, bound in passes)
    if faster > _FEW * len(passes):
        sentences.append(
            f"{faster} of {len(passes)} passes were faster than the limits, which were measured while the "
            "machine was busier: measure again on a quiet one."
        )
    return sentences


def _total(profile: Profile) -> float:
    return median(profile.data["profiled_step"]["fused"])


def _kind(profile: Profile, rows) -> str:
    """Which limit most of the bound is made of."""
    limits, dtype = profile.limits, profile.data["settings"]["dtype"]
    by_memory = sum(
        row.data["bound"][d]
        for row in rows
        for d in row.directions
        if row.data["bound"][d] > row.data["flops"][d] / limits.flops[dtype]
    )
    return "memory-bound" if 2 * by_memory > sum(row.bound for row in rows) else "compute-bound"
