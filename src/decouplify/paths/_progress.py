"""A progress bar, if there is someone to look at it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from decouplify._optional import import_optional


@contextmanager
def progress_bar(wanted: bool | None, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function that advances the bar by a number of images, and does nothing when no bar is shown.

    Args:
        wanted: Show it; ``None``: only if stderr is a terminal and rich is installed.
        title: Written in front of the bar.
        total: Number of images expected, ``None`` if unknown.

    Raises:
        ImportError: If a bar is wanted and rich is not installed.
    """
    if wanted is None:
        wanted = sys.stderr.isatty() and find_spec("rich") is not None
    if not wanted:
        yield lambda n: None
        return
    console = import_optional("rich.console", "a progress bar", extra="cli").Console(stderr=True)
    # Nothing stays on the terminal afterwards: the result says what was done.
    with import_optional("rich.progress", "a progress bar", extra="cli").Progress(
        console=console, transient=True
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)
