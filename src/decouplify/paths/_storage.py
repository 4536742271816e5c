"""Path sets as directories of plain .npy files, written whole or not at all."""

from __future__ import annotations

import json
import mmap
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

MANIFEST = "manifest.json"
FORMAT = "decouplify.pathset"
FORMAT_VERSION = 1
ARRAYS = ("bits", "margins", "ids", "labels", "preds", "conf")
_SCATTERED_ROWS = 256
_OUR_FILES = {MANIFEST, *(f"{name}.npy" for name in ARRAYS)}


class GrowingNpy:
    """A two-dimensional .npy file that grows row by row, without knowing the final number of rows.

    The header is written twice, first for no rows, at the end for all of them. NumPy leaves room in it for this.

    Args:
        path: The file to write.
        dtype: Element type.
        n_columns: Length of every row.
    """

    def __init__(self, path: Path, dtype: DTypeLike, n_columns: int) -> None:
        self._dtype = np.dtype(dtype)
        self._n_columns = n_columns
        self._n_rows = 0
        self._file = path.open("wb")
        self._write_header()
        self._data_start = self._file.tell()

    def _write_header(self) -> None:
        self._file.seek(0)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._n_rows, self._n_columns)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, rows: NDArray[Any]) -> None:
        """Write more rows, shape (n, n_columns)."""
        assert rows.dtype == self._dtype
        assert rows.shape[1:] == (self._n_columns,)
        self._file.write(np.ascontiguousarray(rows).tobytes())
        self._n_rows += len(rows)

    def close(self) -> None:
        """Write the final number of rows into the header."""
        if not self._file.closed:
            self._write_header()
            assert self._file.tell() == self._data_start
            self._file.close()

    def __enter__(self) -> GrowingNpy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def check_target(target: Path) -> None:
    """Raise unless the directory is absent, empty, or a path set and nothing else.

    A path set is replaced as a whole, so a directory that also holds other files is refused: they would be lost.

    Raises:
        FileExistsError: If something else is there.
    """
    if not target.exists():
        return
    advice = "give another directory, or remove it yourself"
    if not target.is_dir():
        raise FileExistsError(f"cannot write a path set to {target}: it is a file; {advice}")
    present = {entry.name for entry in target.iterdir()}
    if present and not is_path_set(target):
        raise FileExistsError(f"cannot write a path set to {target}: it holds files but no path set; {advice}")
    if foreign := sorted(present - _OUR_FILES):
        listed = ", ".join(foreign[:5])
        raise FileExistsError(
            f"cannot replace the path set in {target}: it also holds other files ({listed}); {advice}"
        )


def is_path_set(directory: Path) -> bool:
    """Whether the directory holds a finished path set."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """An empty sibling directory to write into, which becomes ``target`` if the block ends without an error.

    An interrupted block leaves ``target`` as it was. If the last renaming fails, the finished files are kept and the
    error says where.
    """
    target = target.resolve()
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    stage.mkdir()
    try:
        yield stage
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _publish(stage, target)


def _publish(stage: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    try:
        check_target(target)
        # A directory cannot be renamed over another one that is not empty, so the old one steps aside first.
        if target.exists():
            target.replace(old)
        stage.replace(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.replace(target)
        raise OSError(f"{error}; the finished path set was left in {stage}") from error
    shutil.rmtree(old, ignore_errors=True)


def write_array(directory: Path, name: str, array: NDArray[Any] | None) -> None:
    """Write one array of a path set, if it has that array."""
    if array is not None:
        np.save(directory / f"{name}.npy", array, allow_pickle=False)


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write the manifest: last of all, because a directory without one is not a path set."""
    whole = {"format": FORMAT, "format_version": FORMAT_VERSION, **content}
    (directory / MANIFEST).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a path set.

    Raises:
        FileNotFoundError: If the directory holds no manifest.
        ValueError: If the manifest is of another format or of a newer version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is not a path set: it has no {MANIFEST} (a run that ended early leaves none)"
        )
    if not is_path_set(directory):
        raise ValueError(f"{path} does not describe a path set: wanted a JSON object with format {FORMAT!r}")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this decouplify reads {FORMAT_VERSION}; "
            "update decouplify or record again"
        )
    return manifest


def read_array(directory: Path, name: str, mmap: bool) -> NDArray[Any] | None:
    """One array of a path set, mapped from disk if asked, ``None`` if the set has no such array."""
    path = directory / f"{name}.npy"
    if not path.is_file():
        return None
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an array ({error}); copy or record the path set again") from error
    return array


def forget_pages(array: NDArray[Any]) -> None:
    """Give back the memory through which a mapped file was just read.

    A file that is read once from end to end would otherwise stay in this process until something needs the memory, and
    a set of paths larger than what a job was granted would count against it. The file itself stays as it is.
    """
    mapped = getattr(array, "_mmap", None)  # where np.memmap, and every view of one, keeps its map
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def take_rows(array: NDArray[Any], rows: NDArray[np.intp]) -> NDArray[Any]:
    """A copy of the rows of an array that may be mapped from a file.

    A few at a time: touching one row maps up to half a megabyte around it.
    """
    taken = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for start in range(0, len(rows), _SCATTERED_ROWS):
        taken[start : start + _SCATTERED_ROWS] = array[rows[start : start + _SCATTERED_ROWS]]
        forget_pages(array)
    return taken
