"""A sweep as a page of heat maps."""

from __future__ import annotations

import math
from pathlib import Path

from fastres.files import replaced
from fastres.profiler.page import escaped, page
from fastres.sweep.grid import Cell, Sweep
from fastres.sweep.show import against_of, label, maps, sentence
from fastres.timing import Machine, too_few

# Blue is faster, red slower. All are light, in both schemes, so that the text on them is dark.
_COLOURS = [[0.0, "#e4695e"], [0.5, "#f3f1ec"], [1.0, "#6f9fe8"]]
_LEAST_RANGE = 1.1  # of the colours: smaller differences should not look large


def write(sweep: Sweep, grid: list[Cell], path: Path) -> None:
    """Write the page.

    Raises:
        OSError: as of open.
    """
    text = html(sweep, grid)
    with replaced(path) as file:
        file.write(text)


def html(sweep: Sweep, grid: list[Cell]) -> str:
    """The whole page."""
    drawn = list(maps(sweep, grid))
    most = max([_LEAST_RANGE, *(_distance(s) for *_, matrix in drawn for s in matrix.values() if s)])
    settings = ", ".join(f"{name} {value}" for name, value in sweep.settings.items())
    machine = Machine(**sweep.machine, threads=0, gpu_clocks="")
    where = (
        f"{machine.gpu or f'{machine.cpu}, {machine.cores} cores, {machine.isa}'}, torch {machine.torch}, "
        f"fastres {machine.fastres}"
    )
    body = [
        "<h1>fastres sweep: where is fused faster?</h1>",
        f'<p class="faint">{escaped(settings)}<br>{escaped(where)}</p>',
        *(f"<p><b>{escaped(sentence(sweep, grid, against))}</b></p>" for against in against_of(sweep)),
    ]
    figures = {}
    for index, (title, against, matrix) in enumerate(drawn):
        name = f"map{index}"
        body.append(
            f"<section><h2>{escaped(title)}: {escaped(against)}'s time / fused's</h2>"
            f'<figure><div id="{name}"></div></figure></section>'
        )
        figures[name] = _figure(matrix, most, sweep.settings["repeat"])
    if errors := sweep.errors(grid):
        lines = "".join(f"<li>{escaped(cell)}: {escaped(reason)}</li>" for cell, reason in errors)
        body.append(f"<section><h2>Cells that cannot run</h2><ul>{lines}</ul></section>")
    return page("fastres sweep", "\n".join(body), figures)


def _distance(speedup: dict[str, float]) -> float:
    """The larger of the ratio and its inverse."""
    return max(speedup["median"], 1 / speedup["median"])


def _figure(matrix: dict[tuple[int, int], dict], most: float, rounds: int) -> dict:
    sizes = list(dict.fromkeys(size for _, size in matrix))
    batches = list(dict.fromkeys(batch for batch, _ in matrix))
    known = not too_few(rounds)  # else all have the colour of neither
    rows = [[matrix[batch, size] for size in sizes] for batch in batches]
    words = [[label(s, rounds).replace(" ", "<br>", 2) for s in row] for row in rows]
    return {
        "data": [
            {
                "type": "heatmap",
                "x": [f"{size} px" for size in sizes],
                "y": [f"batch {batch}" for batch in batches],
                "z": [[math.log(s["median"]) * known if s else None for s in row] for row in rows],
                "zmin": -math.log(most),
                "zmax": math.log(most),
                "colorscale": _COLOURS,
                "showscale": False,
                "xgap": 3,
                "ygap": 3,
                "hoverinfo": "skip",
            }
        ],
        "layout": {
            "height": 70 + 64 * len(batches),
            "xaxis": {"type": "category", "side": "top", "showgrid": False},
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
            # Not the heat map's own text, which disappears from cells without a value.
            "annotations": [
                {
                    "x": f"{size} px",
                    "y": f"batch {batch}",
                    "text": words[j][i],
                    "showarrow": False,
                    "font": {"color": "#1f2328" if rows[j][i] else "--text", "size": 14},
                }
                for j, batch in enumerate(batches)
                for i, size in enumerate(sizes)
            ],
        },
    }
