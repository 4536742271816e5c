"""Small pictures of the images: kept while the network reads them, and laid out on one sheet for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from decouplify._optional import import_optional

__all__ = ["Sheet", "Watched"]

_SIDE = 64  # pixels; larger images are scaled down


class Watched:
    """A loader that remembers a small picture of every image that passes.

    Args:
        loader: Any loader that ``decouplify.record`` accepts.
        mean: Per channel, what was subtracted from pixels in [0, 1]. Without it and ``std`` the range of the first
            batch becomes black to white.
        std: Per channel, what they were divided by.
    """

    def __init__(self, loader: Iterable[Any], mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self._loader = loader
        self._black_white: tuple[Tensor, Tensor] | None = None
        if mean is not None and std is not None:
            self._black_white = -_channels(mean) / _channels(std), (1 - _channels(mean)) / _channels(std)
        self._pictures: list[NDArray[np.uint8]] = []

    def __getattr__(self, name: str) -> Any:  # data set, sampler and length, for those who ask the loader
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        for item in self._loader:
            images = item if isinstance(item, Tensor) else item[0] if isinstance(item, tuple | list) and item else None
            if isinstance(images, Tensor) and images.ndim == 4 and len(images):
                self._pictures.append(self._picture(images))
            yield item

    def pictures(self, n: int) -> NDArray[np.uint8] | None:
        """Pictures of the first n images, shape (n, H, W, C), C = 1 or 3; ``None`` if their sizes differ."""
        if len({part.shape[1:] for part in self._pictures}) != 1:
            return None
        return np.concatenate(self._pictures)[:n]

    @torch.no_grad()
    def _picture(self, images: Tensor) -> NDArray[np.uint8]:
        shown = images.detach().float().cpu()
        shown = shown if shown.shape[1] in (1, 3) else shown[:, :1]
        longest = max(shown.shape[2:])
        if longest > _SIDE:
            size = [max(1, round(_SIDE * side / longest)) for side in shown.shape[2:]]
            shown = F.interpolate(shown, size, mode="bilinear", antialias=True)
        if self._black_white is None:
            self._black_white = _channels(shown.amin((0, 2, 3))), _channels(shown.amax((0, 2, 3)))
        black, white = self._black_white
        scaled = 255 * (shown - black) / (white - black).clamp_min(1e-12)
        return scaled.round().clamp(0, 255).byte().movedim(1, -1).contiguous().numpy()


def _channels(values: Sequence[float] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32)[:, None, None]


@dataclass(frozen=True, eq=False)
class Sheet:
    """Pictures side by side in one image, so that a page holds one file instead of thousands.

    Attributes:
        url: The image as a data URL.
        place: Row of the path set to its place on the sheet.
        n_columns: Pictures per line.
        n_lines: Lines.
        small: Whether the pictures have so few pixels that enlarging should keep them sharp.
        aspect: Width / height of one picture.
    """

    url: str
    place: dict[int, int]
    n_columns: int
    n_lines: int
    small: bool
    aspect: float

    @classmethod
    def of(cls, pictures: NDArray[np.uint8], rows: Iterable[int]) -> Sheet:
        """The sheet with the pictures of the given rows.

        Args:
            pictures: Shape (N, H, W, C), C = 1 or 3.
            rows: Indices into ``pictures``, at least one; repeated ones are kept once.
        """
        chosen = list(dict.fromkeys(int(row) for row in rows))
        n_columns = int(np.ceil(np.sqrt(len(chosen))))
        n_lines = -(-len(chosen) // n_columns)
        height, width, channels = pictures.shape[1:]
        tiles = np.zeros((n_lines * n_columns, height, width, channels), np.uint8)
        tiles[: len(chosen)] = pictures[chosen]
        grid = tiles.reshape(n_lines, n_columns, height, width, channels).swapaxes(1, 2)
        url = _encode(grid.reshape(n_lines * height, n_columns * width, channels))
        place = {row: index for index, row in enumerate(chosen)}
        return cls(url, place, n_columns, n_lines, max(height, width) < _SIDE, width / height)

    def position(self, row: int) -> str:
        """Where a row's picture is, as a CSS background position."""
        line, column = divmod(self.place[row], self.n_columns)
        return f"{_percent(column, self.n_columns)} {_percent(line, self.n_lines)}"


def _percent(index: int, n: int) -> str:
    # CSS aligns the point at x % of the sheet with the point at x % of the window.
    return f"{100 * index / max(n - 1, 1):.4f}%"


def _encode(pixels: NDArray[np.uint8]) -> str:
    image = import_optional("PIL.Image", "a report", extra="report")
    file = io.BytesIO()
    image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB").save(file, "webp", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
