"""A profile as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fastres.profiler.result import Profile, Row

_WIDTH = 180  # of a file or a pipe: nothing is cut


def show(profile: Profile, file=None) -> None:
    """Print it, those ops first that lose most time against the machine's limit."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(profile.title, markup=False)
    console.print(str(profile.machine), markup=False)
    directions = profile.rows[0].directions if profile.rows else []
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("block")
    table.add_column("op", max_width=34)
    table.add_column("ran", max_width=18)
    for title in (
        *(f"{d} ms" for d in directions),
        "stock ms",
        "stock/fused",
        "bound ms",
        "reached",
        "lost ms",
    ):
        table.add_column(title, justify="right")
    for row in sorted(profile.rows, key=lambda row: -row.lost):
        table.add_row(*_cells(row, directions))
    console.print(table)
    _footer(console, profile)


def _cells(row: Row, directions: list[str]) -> list[str]:
    fused, stock = row.seconds("fused"), row.seconds("stock")
    return [
        row.block,
        row.name,
        row.data["ran"] if row.data["fused"] or not row.data["reason"] else f"stock: {row.data['reason']}",
        *(f"{row.seconds('fused', d) * 1e3:.2f}" for d in directions),
        f"{stock * 1e3:.2f}",
        f"{stock / fused:.2f}x" if fused else "",
        f"{row.bound * 1e3:.2f}",
        f"{row.bound / fused:.0%}" if fused else "",
        f"{row.lost * 1e3:.2f}",
    ]


def _footer(console: Console, profile: Profile) -> None:
    data = profile.data
    for name, by_variant in data["rest"].items():
        times = ", ".join(f"{v} {sorted(t)[len(t) // 2] * 1e3:.2f} ms" for v, t in by_variant.items())
        console.print(f"{name}: {times}")
    for variant in profile.variants:
        saved = f", {profile.saved_bytes(variant) / 1e6:.0f} MB kept for the backward pass"
        whole = sorted(data["whole_step"][variant])[len(data["whole_step"][variant]) // 2]
        console.print(
            f"{variant}: {whole * 1e3:.1f} ms a step, {data['settings']['input'][0] / whole:.1f} images/s, "
            f"the sum of the parts is {profile.agreement(variant):.1%} of it"
            f"{saved if data['settings']['mode'] == 'train' else ''}"
        )
    console.print()
    for sentence in data["advice"]:
        console.print(sentence, markup=False)
