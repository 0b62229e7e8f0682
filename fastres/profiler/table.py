"""A profile as a table in the terminal."""

from __future__ import annotations

from statistics import median

from rich.console import Console
from rich.table import Table

from fastres.profiler.compare import Comparison
from fastres.profiler.result import Profile, Row
from fastres.timing import Spread

_WIDTH = 200  # of a file or a pipe: nothing is cut


def show(profile: Profile, file=None) -> None:
    """Print it: the blocks in order, then the ops, those first that lose most against the limit."""
    console = _console(file)
    console.print(profile.title)
    console.print(str(profile.machine))
    console.print(_blocks(profile, console))
    console.print()
    console.print(_ops(profile, console))
    console.print()
    _footer(console, profile)


def show_comparison(comparison: Comparison, file=None) -> None:
    """Print the step, all blocks and the ops that changed."""
    console = _console(file)
    for line in (*comparison.differences, *comparison.missing):
        console.print(line)
    if comparison.drift != 1:
        console.print(
            f"Stock's layers took {comparison.drift:.2f}x as long in b as in a, which b / a leaves out.",
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("block", "op", ""):
        _add_text(table, title)
    for title in ("a ms", "b ms", "b / a", "interval", "change"):
        table.add_column(title, justify="right")
    ops = [change for change in comparison.ops if change.slower or change.faster]
    for change in (comparison.step, *comparison.blocks, *ops):
        table.add_row(
            change.block or "whole step",
            change.op,
            change.direction,
            f"{change.a * 1e3:.2f}",
            f"{change.b * 1e3:.2f}",
            f"{change.ratio:.2f}x",
            f"{change.low:.2f} to {change.high:.2f}",
            "slower" if change.slower else "faster" if change.faster else "within the noise",
        )
    console.print(table)
    console.print()
    console.print(comparison.sentence())


def _console(file) -> Console:
    console = Console(file=file, highlight=False, markup=False)  # names are not to be read as such
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def _blocks(profile: Profile, console: Console) -> Table:
    blocks = profile.blocks
    return _fitting(["block"], [[block.block] for block in blocks], blocks, console)


def _ops(profile: Profile, console: Console) -> Table:
    rows = sorted(profile.rows, key=lambda row: -row.lost)
    texts = [[row.block, row.name, row.ran] for row in rows]
    return _fitting(["block", "op", "ran"], texts, rows, console)


# In the order in which they are left out of a table that is too wide.
_DISPENSABLE = (
    "GFLOP", "MB to move", "± ms", "bound ms", "reached", "backward ms", "forward ms", "stock/fused",
    "stock ms",
)  # fmt: skip


def _fitting(titles: list[str], texts: list[list[str]], rows: list[Row], console: Console) -> Table:
    """Of the rows' numbers, behind their texts: of as many as the width has place for."""
    numbers, wide = [_numbers(row) for row in rows], console.options.update_width(10_000)
    table = _table(titles, texts, numbers)
    for title in _DISPENSABLE:
        if console.measure(table, options=wide).maximum <= console.width:
            break
        for row in numbers:
            row.pop(title, None)
        table = _table(titles, texts, numbers)
    return table


def _table(titles: list[str], texts: list[list[str]], numbers: list[dict[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        _add_text(table, title)
    for title in numbers[0] if numbers else ():
        table.add_column(title, justify="right", no_wrap=True)
    for text, row in zip(texts, numbers, strict=True):
        table.add_row(*text, *row.values())
    return table


def _add_text(table: Table, title: str) -> None:
    """A column of text, which is never cut: a block's name stays whole, others go on in the next line."""
    width = {"op": 34, "ran": 24}.get(title)
    table.add_column(title, max_width=width, no_wrap=title == "block", overflow="fold")


def _numbers(row: Row) -> dict[str, str]:
    """By the titles of their columns."""
    fused, stock = row.seconds("fused"), row.seconds("stock")
    spread = Spread.of(row.by_round("fused"))
    return {
        **{f"{d} ms": f"{row.seconds('fused', d) * 1e3:.2f}" for d in row.directions},
        "± ms": f"{(spread.high - spread.low) / 2 * 1e3:.2f}",
        "stock ms": f"{stock * 1e3:.2f}",
        "stock/fused": f"{row.speedup().median:.2f}x" if fused else "",
        "GFLOP": f"{sum(row.data['flops'].values()) / 1e9:.2f}",
        "MB to move": f"{sum(row.data['bytes'].values()) / 1e6:.1f}",
        "bound ms": f"{row.bound * 1e3:.2f}",
        "reached": f"{row.bound / fused:.0%}" if fused else "",
        "lost ms": f"{row.lost * 1e3:.2f}",
    }


def _footer(console: Console, profile: Profile) -> None:
    data = profile.data
    for name, by_variant in data["rest"].items():
        times = ", ".join(f"{v} {median(t) * 1e3:.2f} ms" for v, t in by_variant.items())
        console.print(f"{name}: {times}")
    if data["settings"]["device"] == "cuda":
        console.print("Each step begins with a cold L2 cache; its parts follow each other.")
    for variant in profile.variants:
        saved = f", {profile.saved_bytes(variant) / 1e6:.0f} MB kept for the backward pass"
        whole = median(data["whole_step"][variant])
        console.print(
            f"{variant}: {whole * 1e3:.1f} ms a step, {data['settings']['input'][0] / whole:.1f} images/s, "
            f"the sum of the parts is {profile.agreement(variant):.1%} of it"
            f"{saved if data['settings']['mode'] == 'train' else ''}"
        )
    console.print()
    for sentence in data["advice"]:
        console.print(sentence)
