"""What a profile says, in sentences: only what was measured."""

from __future__ import annotations

from collections import defaultdict

from fastres.profiler.result import Profile

_MOST = 3  # blocks' groups that are told of


def advice(profile: Profile) -> list[str]:
    """Sentences, the last of which says where to look next."""
    sentences = []
    for against in profile.data["settings"]["against"]:
        speedup = profile.speedup(against)
        faster = "as fast as" if 0.995 <= speedup.median <= 1.005 else "faster than"
        value = speedup.median
        if value < 0.995:
            faster, value = "slower than", 1 / value
        sentences.append(f"Fused is {value:.2f}x {faster} {against}." if value != 1 else "")
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
            sentences.append(
                f"{time / _total(profile):.0%} of the step is {name}: {_kind(profile, rows)}, at "
                f"{bound / time:.0%} of the machine's limit; {(time - bound) * 1e3:.1f} ms above it."
            )
    rows = sorted(profile.rows, key=lambda row: -row.lost)
    if rows:
        row = rows[0]
        where = max(row.directions, key=lambda d: row.seconds("fused", d) - row.data["bound"][d])
        sentences.append(
            f"Look next at {row.block} {row.name}, {where}: of all ops it loses most, "
            f"{row.lost * 1e3:.1f} ms."
        )
    return [sentence for sentence in sentences if sentence]


def _total(profile: Profile) -> float:
    times = sorted(profile.data["profiled_step"]["fused"])
    return times[len(times) // 2]


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
