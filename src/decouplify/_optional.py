"""The optional packages, imported when first needed."""

from __future__ import annotations

import importlib
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
    """A bold left-aligned title with a smaller, greyer line of numbers under it."""
    n_lines = subtitle.count("\n") + 1
    ax.set_title(title, loc="left", fontweight="bold", pad=8 + 13 * n_lines)
    ax.annotate(
        subtitle, (0, 1), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9, color="0.35"
    )
