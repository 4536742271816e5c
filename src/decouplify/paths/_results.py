"""What all results of this package can do: be printed, turned into plain data, drawn, and written to a file."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decouplify.paths._layout import LayerSpec
from decouplify.paths._text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LayeredResult", "Result"]


class Result(ABC):
    """Base of the frozen results: a summary in words, all numbers as plain data, one picture."""

    @abstractmethod
    def summary(self) -> str:
        """The result in words and tables."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers, as JSON can hold it."""

    @abstractmethod
    def plot(self, ax: Axes | None = None) -> Axes:
        """The picture.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """

    def save(self, path: str | Path, **drawing: Any) -> Path:
        """Write the result to a file; the suffix says as what.

        Args:
            path: ``.json`` for all numbers, ``.txt`` for the summary, or a suffix of pictures such as ``.png``,
                ``.svg`` or ``.pdf`` for the plot.
            **drawing: For a picture, what ``plot`` shall be called with, such as ``class_names`` of a map.

        Returns:
            The absolute path.

        Raises:
            ValueError: If there is no such kind of file.
        """
        target = Path(path).resolve()
        if target.suffix == ".json":
            target.write_text(json.dumps(self.to_dict(), allow_nan=False) + "\n", encoding="utf-8")
        elif target.suffix == ".txt":
            target.write_text(self.summary() + "\n", encoding="utf-8")
        else:
            self._save_picture(target, drawing)
        return target

    def _save_picture(self, target: Path, drawing: Mapping[str, Any]) -> None:
        figure = self.plot(**drawing).get_figure(root=True)
        assert figure is not None
        known = sorted(figure.canvas.get_supported_filetypes())
        if target.suffix.lstrip(".") not in known:
            raise ValueError(f"save: {target.name} given, wanted a name that ends in .json, .txt, .{', .'.join(known)}")
        figure.savefig(target, dpi=144, bbox_inches="tight")


class LayeredResult(Result):
    """Base of the results that hold arrays over the filters of several layers, side by side."""

    layers: tuple[LayerSpec, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        layers = [{"name": layer.name, "depth": layer.depth, "n_filters": layer.n_filters} for layer in self.layers]
        return {name: plain(value) for name, value in vars(self).items()} | {"layers": layers}
