"""A sweep in the terminal: a heat map for each model, dtype and number of threads, and a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastres.bench import in_words
from fastres.sweep.grid import Cell, Sweep
from fastres.timing import too_few

_STYLES = {"faster": "black on green3", "slower": "white on red3"}


def show(sweep: Sweep, grid: list[Cell], file=None) -> None:
    """Print them."""
    console = Console(file=file, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    for title, against, matrix in maps(sweep, grid):
        console.print(f"\n{title}: {against}'s time / fused's", style="bold")
        console.print(_heat_map(matrix, sweep.settings["repeat"]))
    for cell, reason in sweep.errors(grid):
        console.print(f"{cell}: {reason}")
    console.print()
    for against in against_of(sweep):
        console.print(sentence(sweep, grid, against))


def maps(sweep: Sweep, grid: list[Cell]) -> Iterator[tuple[str, str, dict[tuple[int, int], dict]]]:
    """A title, the stock variant, and the speed-ups by batch and image size, for each heat map."""
    groups: dict[tuple[str, str, int], dict[tuple[int, int], dict]] = {}
    for cell in grid:
        place = groups.setdefault((cell.model, cell.dtype, cell.threads), {})
        place[cell.batch, cell.image_size] = sweep.results[cell]
    for (model, dtype, threads), matrix in groups.items():
        for against in against_of(sweep):
            yield (
                f"{model}, {dtype}, {threads} thread{'s' if threads > 1 else ''}",
                against,
                {place: result.get("speedup", {}).get(against, {}) for place, result in matrix.items()},
            )


def label(speedup: dict[str, float], rounds: int) -> str:
    """What a cell says, faster and slower alike."""
    words = _in_words(speedup, rounds)
    return f"{speedup['median']:.2f}x {words}" if speedup else words


def _in_words(speedup: dict[str, float], rounds: int) -> str:
    if not speedup:
        return "cannot run"
    words = "noise unknown" if too_few(rounds) else in_words(speedup)
    return "within the noise" if words.startswith("as fast") else words


def sentence(sweep: Sweep, grid: list[Cell], against: str) -> str:
    """How often fused is faster, how often slower."""
    if len(sweep.errors(grid)) == len(grid):
        return f"Fused and {against} can run in no cell."
    if unknown := too_few(sweep.settings["repeat"]):
        return f"Whether fused is faster than {against} cannot be told: {unknown}."
    found: dict[str, list[tuple[float, Cell]]] = {"faster": [], "slower": [], "noise": [], "failed": []}
    for cell in grid:
        speedup = sweep.results[cell].get("speedup", {}).get(against)
        words = "failed" if speedup is None else in_words(speedup)
        found[words if words in found else "noise"].append((speedup["median"] if speedup else 0.0, cell))
    parts = []
    faster, slower = found["faster"], found["slower"]
    if faster:
        parts.append(f"faster in {len(faster)} (median {median(ratio for ratio, _ in faster):.2f}x)")
    if slower:
        ratio, cell = min(slower, key=lambda pair: pair[0])
        parts.append(f"slower in {len(slower)} (worst {ratio:.2f}x: {cell})")
    if found["noise"]:
        parts.append(f"within the noise in {len(found['noise'])}")
    if found["failed"]:
        parts.append(f"unable to run in {len(found['failed'])}")
    cells = f"{len(grid)} cell{'s' if len(grid) > 1 else ''}"
    return f"Of {cells}, fused is against {against} {', '.join(parts)}."


def against_of(sweep: Sweep) -> list[str]:
    return list(dict.fromkeys(filter(None, sweep.settings["against"].split(","))))


def _heat_map(matrix: dict[tuple[int, int], dict], rounds: int) -> Table:
    sizes = list(dict.fromkeys(size for _, size in matrix))
    table = Table(box=None, pad_edge=False)
    table.add_column("batch", justify="right")
    for size in sizes:
        table.add_column(f"{size} px", justify="center")
    for batch in dict.fromkeys(batch for batch, _ in matrix):
        texts = []
        for size in sizes:
            speedup = matrix[batch, size]
            style = _STYLES.get(_in_words(speedup, rounds), "") if speedup else "dim"
            quartiles = f" ({speedup['low']:.2f} to {speedup['high']:.2f})" if speedup else ""
            texts.append(Text(f" {label(speedup, rounds)}{quartiles} ", style=style))
        table.add_row(str(batch), *texts)
    return table
