"""Progress bars on a terminal, and silence elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def shown(title: str, steps: int) -> Iterator[Callable[..., object]]:
    """A bar on stderr, while the context lasts.

    Yields:
        advance(steps=1, title=None) moves it on, and may give it another title.
    """
    if not sys.stderr.isatty():
        yield lambda steps=1, title=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda steps=1, title=None: bar.update(task, advance=steps, description=title)
