"""A profile as a page of HTML."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from fastres.profiler.page import escaped, page
from fastres.profiler.result import Profile, Row
from fastres.timing import Spread, too_few

_MOST_POINTS = 1500  # of a line of memory over time
_COLOURS = {"fused": "--fused", "stock": "--stock"}


def html(profile: Profile) -> str:
    """The whole page."""
    return page(f"fastres profile: {profile.title}", *body_and_figures(profile))


def body_and_figures(profile: Profile) -> tuple[str, dict[str, dict]]:
    """What the page consists of."""
    rounds = profile.data["settings"]["repeat"]
    body = [
        f"<h1>{escaped(profile.title)}</h1>",
        f'<p class="faint">{escaped(profile.machine)}</p>',
        _headline(profile),
        _list(profile.data["advice"]),
        _figure(
            "blocks",
            "Blocks, fused and stock",
            f"Milliseconds: medians and quartiles of {rounds} rounds in which fused and stock took turns.",
        ),
        _figure(
            "roofline",
            "Against the machine's limits",
            "Each op of the fused step: FLOPs to a byte that must move, and the FLOPs a second that it "
            "reached. The lines are what this machine was measured to do at best.",
        ),
        _figure(
            "memory",
            "Memory over a step",
            "Megabytes above those at its begin. These steps ran under PyTorch's profiler.",
        ),
        _section(
            "All ops",
            "Those that lose most against the limit come first; a press on a title sorts by it. ± is half "
            "the distance of the quartiles. What PyTorch saw are the ops that took at least a twentieth of "
            "the fused time.",
            _table(profile),
        ),
        _section("The rest of the step", "", _rest(profile)),
        _section("The machine", "", _limits(profile)),
    ]
    figures = {"blocks": _blocks(profile), "roofline": _roofline(profile), "memory": _memory(profile)}
    return "\n".join(body), figures


# ---------------------------------------------------------------------------------------------------------
# words and numbers


def _section(title: str, text: str, content: str) -> str:
    text = f'<p class="faint">{escaped(text)}</p>' if text else ""
    return f"<section><h2>{escaped(title)}</h2>{text}{content}</section>"


def _figure(name: str, title: str, text: str) -> str:
    return _section(title, text, f'<figure><div id="{name}"></div></figure>')


def _headline(profile: Profile) -> str:
    whole = {v: median(times) for v, times in profile.data["whole_step"].items()}
    images = profile.data["settings"]["input"][0]
    parts = []
    for against in profile.data["settings"]["against"]:
        spread = profile.speedup(against)
        faster = spread.median >= 1
        low, high = sorted((spread.low, spread.high) if faster else (1 / spread.low, 1 / spread.high))
        value = spread.median if faster else 1 / spread.median
        times = f"{_ms(whole['fused'])} against {_ms(whole[against])} ms a step"
        speeds = f"{images / whole['fused']:.1f} against {images / whole[against]:.1f} images/s"
        verdict = f"{value:.2f}× {'faster' if faster else 'slower'}</b> than {escaped(against)}"
        unknown = too_few(len(profile.data["whole_step"]["fused"]))
        if unknown:
            verdict = f"{spread.median:.2f}× as fast</b> as {escaped(against)} ({unknown})"
            low, high = spread.low, spread.high
        elif spread.includes(1):
            verdict = f"As fast</b> as {escaped(against)}, within the noise: {value:.2f}×"
        parts.append(
            f"<div><b>{verdict}, {low:.2f} to {high:.2f}<br><small>{times}, {speeds}</small></div>"
        )
    fused, stock = profile.saved_bytes("fused"), profile.saved_bytes("stock")
    if stock:
        kept = f"{_mb(fused)} against {_mb(stock)} MB kept for the backward pass"
        parts.append(f"<div><b>{fused / stock:.2f}×</b> of what stock keeps<br><small>{kept}</small></div>")
    return f'<div class="headline">{"".join(parts)}</div>'


def _list(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escaped(sentence)}</li>' for sentence in sentences)}</ul>"


def _table(profile: Profile) -> str:
    directions = profile.rows[0].directions if profile.rows else []
    titles = [
        ("block", True),
        ("op", True),
        ("ran", True),
        ("PyTorch saw", True),
        *((f"{d} ms", False) for d in directions),
        ("ms", False),
        ("± ms", False),
        ("stock ms", False),
        ("stock / fused", False),
        ("GFLOP", False),
        ("MB must move", False),
        ("limit ms", False),
        ("of the limit", False),
        ("lost ms", False),
        *([("MB kept", False), ("stock MB kept", False)] if "backward" in directions else []),
    ]
    head = "".join(
        f'<th scope="col"{_TEXT if text else ""}{_SORTED if title == "lost ms" else ""}>'
        f'<button type="button">{escaped(title)}</button></th>'
        for title, text in titles
    )
    rows = "\n".join(_cells(row, directions) for row in sorted(profile.rows, key=lambda row: -row.lost))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All ops"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )


_TEXT = ' class="text"'
_SORTED = ' aria-sort="descending"'


def _cells(row: Row, directions: list[str]) -> str:
    fused, spread = row.seconds("fused"), Spread.of(row.by_round("fused"))
    numbers = [
        *((row.seconds("fused", d) * 1e3, ".2f") for d in directions),
        (fused * 1e3, ".2f"),
        ((spread.high - spread.low) / 2 * 1e3, ".2f"),
        (row.seconds("stock") * 1e3, ".2f"),
        (row.speedup().median, ".2f"),
        (sum(row.data["flops"].values()) / 1e9, ".2f"),
        (sum(row.data["bytes"].values()) / 1e6, ".1f"),
        (row.bound * 1e3, ".2f"),
        (row.bound / fused if fused else 0.0, ".0%"),
        (row.lost * 1e3, ".2f"),
    ]
    if "backward" in directions:
        numbers += [(row.saved_bytes(v) / 1e6, ".1f") for v in ("fused", "stock")]
    texts = [
        f'<td class="text">{escaped(row.block)}</td><td class="text">{escaped(row.name)}</td>',
        f'<td class="text{" reason" if row.data["reason"] else ""}">{escaped(row.ran)}</td>',
        f'<td class="text called">{escaped(", ".join(row.called("fused")))}</td>',
    ]
    cells = "".join(f'<td data-value="{value:.6g}">{value:{form}}</td>' for value, form in numbers)
    return f"<tr>{''.join(texts)}{cells}</tr>"


def _rest(profile: Profile) -> str:
    lines = []
    for name, by_variant in profile.data["rest"].items():
        times = (f"{variant} {_ms(median(seconds))} ms" for variant, seconds in by_variant.items())
        lines.append(f"{name}: {', '.join(times)}")
    for variant in profile.variants:
        share = f"{profile.agreement(variant):.1%}"
        lines.append(f"{variant}: all parts together take {share} of the step's time outside the profiler")
    return _list(lines)


def _limits(profile: Profile) -> str:
    limits = profile.limits
    copies = ", ".join(f"{level.speed / 1e9:.0f} GB/s in {name}" for name, level in limits.copy.items())
    flops = ", ".join(f"{speed / 1e9:.0f} GFLOP/s in {dtype}" for dtype, speed in limits.flops.items())
    return (
        f"<p>{escaped(f'Copies reach {copies}; products of matrices reach {flops}.')}</p>"
        "<p>An op's limit is the longer of two times: its FLOPs at the speed of a product of matrices, and "
        "the bytes of its inputs and outputs, each moved once, at the speed of a copy of that size.</p>"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _mb(bytes: float) -> str:
    return f"{bytes / 1e6:.0f}"


# ---------------------------------------------------------------------------------------------------------
# figures


def _blocks(profile: Profile) -> dict:
    blocks = profile.blocks
    directions = blocks[0].directions if blocks else []
    views = [("both", directions)] if len(directions) > 1 else []
    views += [(direction, [direction]) for direction in directions]

    def bars(variant: str, of: list[str]) -> dict:
        spreads = [Spread.of([time * 1e3 for time in block.by_round(variant, *of)]) for block in blocks]
        return {
            "x": [s.median for s in spreads],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [s.high - s.median for s in spreads],
                "arrayminus": [s.median - s.low for s in spreads],
                "color": "--text",
                "thickness": 1,
                "width": 2,
            },
        }

    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "name": variant,
                "y": [escaped(block.block) for block in blocks],
                "marker": {"color": _COLOURS[variant]},
                "hovertemplate": "%{y}, " + variant + ": %{x:.2f} ms<extra></extra>",
                **bars(variant, directions),
            }
            for variant in profile.variants
        ],
        "layout": {
            "height": 90 + 34 * len(blocks),
            "barmode": "group",
            "bargap": 0.25,
            "xaxis": {"title": {"text": "ms"}, "rangemode": "tozero"},
            "yaxis": {"autorange": "reversed", "type": "category"},
            "meta": {
                "views": [
                    {"name": name, "traces": [bars(variant, of) for variant in profile.variants]}
                    for name, of in views
                ]
            },
        },
    }


def _roofline(profile: Profile) -> dict:
    dtype = profile.data["settings"]["dtype"]
    peak, points = profile.limits.flops[dtype], []
    for row in profile.rows:
        for direction in row.directions:
            seconds = row.seconds("fused", direction)
            flops, bytes = row.data["flops"][direction], row.data["bytes"][direction]
            if flops and bytes and seconds:
                points.append((direction, flops / bytes, flops / seconds, row, seconds))
    densities = [density for _, density, *_ in points] or [1.0]
    low, high = min(densities) / 2, max(*densities, peak / profile.limits.copy["memory"].speed) * 2
    roofs = []
    for name, level in profile.limits.copy.items():
        corner = peak / level.speed
        xs = [low, corner, high] if low < corner < high else [low, high]
        roofs.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": escaped(f"{name}, {level.speed / 1e9:.0f} GB/s"),
                "x": xs,
                "y": [min(peak, x * level.speed) / 1e9 for x in xs],
                "line": {"color": "--faint", "width": 1.5, "dash": _DASHES[len(roofs) % len(_DASHES)]},
                "hoverinfo": "name",
            }
        )
    marks = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": direction,
            "x": [density for d, density, *_ in points if d == direction],
            "y": [speed / 1e9 for d, _, speed, *_ in points if d == direction],
            "text": [
                f"{escaped(row.block)} {escaped(row.name)}, {direction}<br>{seconds * 1e3:.2f} ms, "
                f"{row.data['bound'][direction] / seconds:.0%} of the limit"
                for d, _, _, row, seconds in points
                if d == direction
            ],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": colour, "symbol": symbol, "size": 9, "opacity": 0.8},
        }
        for direction, colour, symbol in (
            ("forward", "--fused", "circle"),
            ("backward", "--other", "diamond"),
        )
        if any(d == direction for d, *_ in points)
    ]
    ticks = [digit * 10.0**power for power in range(-4, 8) for digit in (1, 2, 5)]
    log = {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {
        "data": [*roofs, *marks],
        "layout": {
            "height": 460,
            "xaxis": {**log, "title": {"text": "FLOP / byte"}},
            "yaxis": {**log, "title": {"text": f"GFLOP/s, {escaped(dtype)}"}},
            "hovermode": "closest",
        },
    }


_DASHES = ("dot", "dash", "solid")


def _memory(profile: Profile) -> dict:
    lines = []
    for variant, points in profile.data["memory"].items():
        points = points[:: max(1, len(points) // _MOST_POINTS)] + points[-1:]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": variant,
                "x": [time for time, _ in points],
                "y": [bytes / 1e6 for _, bytes in points],
                "line": {"color": _COLOURS[variant], "shape": "hv", "width": 2},
                "hovertemplate": variant + ", %{x:.0f} ms: %{y:.0f} MB<extra></extra>",
            }
        )
    marks = [
        (variant, time, word)
        for variant, found in profile.data["memory_marks"].items()
        for time, word in found
    ]
    return {
        "data": lines,
        "layout": {
            "height": 340,
            "xaxis": {"title": {"text": "ms"}},
            "yaxis": {"title": {"text": "MB"}, "rangemode": "tozero"},
            "shapes": [
                {
                    "type": "line",
                    "x0": time,
                    "x1": time,
                    "y0": 0,
                    "y1": 1,
                    "yref": "paper",
                    "line": {"color": _COLOURS[variant], "width": 1, "dash": "dot"},
                }
                for variant, time, _ in marks
            ],
            "annotations": [
                {
                    "x": time,
                    "y": 0.02 + 0.08 * index,
                    "yref": "paper",
                    "xanchor": "left",
                    "yanchor": "bottom",
                    "showarrow": False,
                    "text": f" {variant}: {escaped(word)}",
                    "font": {"size": 11, "color": "--faint"},
                }
                for index, (variant, time, word) in enumerate(marks)
            ],
        },
    }
