"""Images with the places lit where a filter is active."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import import_optional
from decouplify.concepts.data import Pixels, resize_nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OUTLINE = (255, 214, 0)
_SIDE = 200  # pixels at least, or the outline would cover what it surrounds


def overlay(pixels: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The image with everything outside the mask darkened, and the mask outlined.

    Returns:
        Shape (m H, m W, 3): a small image is enlarged by a whole number m.
    """
    times = -(-_SIDE // min(pixels.shape[:2]))
    shown = pixels.repeat(times, axis=0).repeat(times, axis=1)
    shown = np.broadcast_to(shown, (*shown.shape[:2], 3)) if shown.shape[2] == 1 else shown[..., :3]
    where = resize_nearest(mask, (shown.shape[0], shown.shape[1]))
    lit = np.where(where[..., None], shown, shown // 4)
    lit[_edge(where)] = _OUTLINE
    return lit


def _edge(where: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Places of the mask that touch a place outside, shape (H, W)."""
    padded = np.pad(where, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return where & ~inside


def picture_grid(n_rows: int, n_columns: int) -> tuple[Figure, NDArray[Any]]:
    """A figure, unknown to pyplot, of small axes without ticks, shape (n_rows, n_columns)."""
    figure = import_optional("matplotlib.figure", "plotting").Figure(
        figsize=(1.7 * n_columns + 0.4, 1.9 * n_rows + 0.6), layout="constrained"
    )
    axes: NDArray[Any] = figure.subplots(n_rows, n_columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def show(ax: Axes, pixels: Pixels, title: str = "") -> None:
    """Draw one picture with a line of text above it."""
    ax.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255)
    ax.set_title(title, fontsize=8)
