"""Where rows come from: JSON lines, Parquet, a Hugging Face data set, or what Python has. All are streamed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.runs.rows import COLUMNS, Given, given, unreadable

_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class DataSet:
    """Rows of an input, in its order.

    rows:   a file of JSON lines or Parquet, a folder or name of a Hugging Face data set, or rows as mappings
    names:  what columns are called in the input, where they are called otherwise: ``{"prompt": "question"}``
    split, subset: of a Hugging Face data set
    """

    rows: str | Path | Iterable[Mapping[str, Any]]
    names: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    subset: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(self.names.keys() - set(COLUMNS))
        if unknown:
            raise InputError(f"there is no column {', '.join(unknown)}; rows have {', '.join(COLUMNS)}")
        if self._file is None and not isinstance(self.rows, (str, Path)):
            self._no_split("rows that are given")
        elif self._file is not None:
            self._no_split("a file")
            _check_file(self._file)

    @property
    def name(self) -> str:
        """What the input is called."""
        return str(self.rows) if isinstance(self.rows, (str, Path)) else f"{type(self.rows).__name__} of rows"

    def __iter__(self) -> Iterator[Given]:
        if self._file is not None and self._file.suffix.lower() in _LINES:
            yield from _lines(self._file, self.names)
            return
        yield from (given(i, row, self.names) for i, row in enumerate(self._mappings()))

    def __len__(self) -> int:
        """Rows of the input. Raises TypeError where that is not known."""
        if self._file is None:
            return len(self.rows) if isinstance(self.rows, Sequence) and not isinstance(self.rows, str) else _unknown()
        if self._file.suffix.lower() in _LINES:
            with self._file.open("rb") as file:
                return sum(bool(line.strip()) for line in file)
        return _parquet(self._file).metadata.num_rows

    @property
    def _file(self) -> Path | None:
        """The file, if it is one: by its ending, because a hub's names have none."""
        if not isinstance(self.rows, (str, Path)):
            return None
        path = Path(self.rows).expanduser()
        return path if path.suffix.lower() in (*_LINES, ".parquet") or path.is_file() else None

    def _mappings(self) -> Iterable[Any]:
        if self._file is not None:
            return (row for batch in _parquet(self._file).iter_batches(256) for row in batch.to_pylist())
        return _data_set(str(self.rows), self.subset, self.split) if isinstance(self.rows, (str, Path)) else self.rows

    def _no_split(self, what: str) -> None:
        if self.split is not None or self.subset is not None:
            raise InputError(f"{what} has no split and no subset; leave both out")


def _unknown() -> int:
    raise TypeError("how many rows there are is not known before they are read")


def _check_file(path: Path) -> None:
    """Raises InputError for a file that is not there, cannot be read or is of another kind."""
    if path.suffix.lower() not in (*_LINES, ".parquet"):
        raise InputError(f"cannot read rows from {path}; give JSON lines (.jsonl), .parquet, or a data set's name")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _lines(path: Path, names: Mapping[str, str]) -> Iterator[Given]:
    """The rows of a file of JSON lines; those that are none are told, empty ones are left out."""
    number = 0
    with path.open("rb") as file:
        for i, line in enumerate(file, 1):
            if line.strip():
                yield _line(number, line.strip(), i, names)
                number += 1


def _line(number: int, line: bytes, place: int, names: Mapping[str, str]) -> Given:
    try:
        return given(number, json.loads(line.decode("utf-8-sig" if place == 1 else "utf-8")), names)
    except (ValueError, RecursionError) as error:
        return unreadable(number, line, f"line {place} is not JSON ({error})")


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"reading {path} needs pyarrow; pip install 'flashtrace-plugin[runs]'") from error
    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no Parquet file ({error})") from error


def _data_set(name: str, subset: str | None, split: str | None) -> Iterable[Any]:
    """A split of a data set: of the hub, or of a folder in one of the forms that ``datasets`` reads."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"the data set {name!r} needs datasets; pip install 'flashtrace-plugin[runs]'") from error
    folder = Path(name).expanduser()
    saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if saved and subset is not None:
        raise InputError(f"the saved data set {name!r} has no subsets; leave subset out")
    try:
        found = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(name, subset, streaming=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"cannot load the data set {name!r}: {' '.join(str(error).split())[:200]} (give a file, a folder or a "
            "name on the Hugging Face hub)"
        ) from error
    if not isinstance(found, Mapping):
        if split is not None:
            raise InputError(f"the data set {name!r} is one split by itself; leave split out")
        return found
    chosen = next(iter(found)) if split is None and len(found) == 1 else split
    if chosen not in found:
        raise InputError(f"the data set {name!r} has the splits {', '.join(found)}; choose one of them, got {split!r}")
    return found[chosen]
