"""The optional packages, imported when first needed."""

from __future__ import annotations

import importlib
import textwrap
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def import_optional(module: str, purpose: str, extra: str = "analysis") -> ModuleType:
    """The named module.

    Args:
        module: Full name, for instance ``"sklearn.manifold"``.
        purpose: What needs it, the start of the error message.
        extra: The extra of decouplify that installs it.

    Raises:
        ImportError: If the package is not installed, naming the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("sklearn", "scikit-learn").replace("PIL", "pillow")
        raise ImportError(f'{purpose} needs {package}; install it with: pip install "decouplify[{extra}]"') from error


def new_axes(width: float, height: float) -> Axes:
    """Axes of a new figure, size in inches.

    The figure is not registered with pyplot: drawing in a loop leaves no open figures behind.
    """
    figure = import_optional("matplotlib.figure", "plotting").Figure(figsize=(width, height), layout="constrained")
    return figure.subplots()


def write_title(ax: Axes, title: str, subtitle: str) -> None:
    """A bold left-aligned title with smaller, greyer lines of numbers under it, broken where the figure ends."""
    lines = [part for line in subtitle.split("\n") for part in textwrap.wrap(line, _letters_that_fit(ax)) or [""]]
    ax.set_title(title, loc="left", fontweight="bold", pad=8 + 13 * len(lines))
    text = "\n".join(lines)
    ax.annotate(
        text, (0, 1), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9, color="0.35"
    )


def _letters_that_fit(ax: Axes) -> int:
    """Letters of nine points over one column of axes; a longer line would squeeze the axes to make room for itself."""
    figure, place = ax.get_figure(root=True), ax.get_subplotspec()
    n_columns = 1 if place is None else place.get_gridspec().ncols
    width = 6.0 if figure is None else figure.get_figwidth()
    return max(30, int(13 * width / n_columns))
