"""A report's page: one file that needs no network, in light and dark, on paper and on a phone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any


def page(title: str, body: str, figures: Mapping[str, Any]) -> str:
    """The HTML.

    Args:
        title: of the window, plain text.
        body: HTML. It has an empty `<div id="...">` for each figure. A `<table class="sortable">` with a
            button in each cell of its head sorts by the cells' data-value or text.
        figures: plotly's, by the id of their place. A colour may be one of the page's ("--fused",
            "--stock", "--text", ...), which follows light and dark. layout.meta may have "views", [{"name",
            "traces": what differs in each trace}], of which the reader chooses one.
    """
    from plotly.offline import get_plotlyjs

    template = Template(files("fastres.profiler").joinpath("page.html").read_text("utf-8"))
    plots = json.dumps({name: _plain(figure) for name, figure in figures.items()}, separators=(",", ":"))
    return template.substitute(
        title=escaped(title), body=body, plotly=get_plotlyjs(), figures=plots.replace("</", "<\\/")
    )


def escaped(text: object) -> str:
    """Plain text, for use in HTML and in the text of figures, which understand some of it."""
    return escape(str(text))


def _plain(figure: dict) -> dict:
    """With what all figures of a page have in common."""
    axis = {"gridcolor": "--grid", "linecolor": "--line", "zerolinecolor": "--grid", "automargin": True}
    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "--text", "family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"bgcolor": "--raised", "font": {"color": "--text"}, "bordercolor": "--line"},
        "margin": {"l": 8, "r": 12, "t": 36, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "dragmode": False,
        **figure["layout"],
    }
    for name in ("xaxis", "yaxis"):
        layout[name] = {**axis, **layout.get(name, {})}
    return {"data": figure["data"], "layout": layout}
