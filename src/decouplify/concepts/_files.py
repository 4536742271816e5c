"""Reading pictures, label pictures and tables, with errors that say which file and which line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import import_optional

Size = tuple[int, int]


def read_pixels(path: Path, where: str, size: Size | None = None) -> NDArray[np.uint8]:
    """A picture in colour, uint8, shape (H, W, 3).

    Args:
        path: The file.
        where: What names the file, for the error.
        size: Height and width to scale to; its own if not given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a picture.
    """
    picture = _open(path, where).convert("RGB")
    if size is not None and picture.size != size[::-1]:
        picture = picture.resize(size[::-1], import_optional("PIL.Image", "reading pictures").Resampling.BILINEAR)
    return np.array(picture, dtype=np.uint8)  # a copy, because torch wants to be able to write


def read_values(path: Path, where: str) -> NDArray[np.uint8]:
    """The stored values of a picture, shape (H, W) or (H, W, bands); palettes are not looked up.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a picture of 8-bit values.
    """
    picture = _open(path, where)
    values = np.asarray(picture)
    if values.dtype != np.uint8:
        raise ValueError(f"{path} ({where}) holds {values.dtype} values ({picture.mode}), wanted 8 bits per band")
    return values


def _open(path: Path, where: str) -> Any:
    image_module = import_optional("PIL.Image", "reading pictures")
    try:
        picture = image_module.open(path)
        picture.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; it is named by {where}") from None
    except (OSError, SyntaxError) as error:  # a broken PNG raises the latter
        raise ValueError(f"{path} ({where}) is not a picture that can be read: {error}") from error
    return picture


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with their line numbers.

    Args:
        path: The file; its first line names the columns, in any order.
        columns: Columns that must be there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column is missing, or a row is longer or shorter than the header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        if missing := [column for column in columns if column not in header]:
            raise ValueError(f"{path}, line 1: no column {', '.join(missing)}; found {', '.join(header) or 'nothing'}")
        for row in reader:
            if None in row or None in row.values():  # where DictReader puts surplus cells, and what it fills up with
                more_or_fewer = "more" if None in row else "fewer"
                raise ValueError(
                    f"{path}, line {reader.line_num}: {more_or_fewer} cells than the {len(header)} of the header"
                )
            yield reader.line_num, row


def as_integer(text: str, what: str, where: str) -> int:
    """The text as a number.

    Raises:
        ValueError: If it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: {what} is {text!r}, wanted an integer") from None
