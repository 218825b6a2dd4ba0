"""Which rows are left, in buckets of like length: what one call of a method explains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Union

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.runs.rows import Failure, Given, Row, digest_of, failed, row_of

Bucket = list[Union[Row, Failure]]
_MOST_CHARACTERS = 16 << 20
"""Characters that a window holds at most, whatever its rows: memory stays bounded."""
_BUCKET_CHARACTERS = 32 << 10
"""Characters of a bucket: long rows fill a device by themselves, and are saved one by one."""


@dataclass(frozen=True)
class Cut:
    """How rows are put together.

    batch:  rows that are explained in one call, at most
    window: rows that are read ahead and sorted by length
    """

    batch: int = 16
    window: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number of rows >= 1, got {value!r}")


def left(source: Iterable[Given], done: Mapping[int, str]) -> Iterator[Row | Failure]:
    """The rows that have no result yet; those that are no rows as failures.

    done: digests of the rows that have a result, by number

    Raises InputError for a row that has a result and is not what it was then.
    """
    first: dict[str, int] = {}  # digest of an id -> number of the row that has it
    for row in source:
        found = _checked(row, first)
        if row.number not in done:
            yield found
        elif done[row.number] != row.digest:
            raise InputError(
                f"row {row.number} of the input (id {found.id!r}) is not the one that the folder has a result of: it "
                "is another input, or was changed; use another folder"
            )


def _checked(row: Given, first: dict[str, int]) -> Row | Failure:
    name = None
    try:
        name = row.id
        before = first.setdefault(digest_of(name.encode("utf-8", "surrogatepass")), row.number)
        if before != row.number:
            raise InputError(f"row {before} has the same id; every row needs one of its own")
        return row_of(row, name)
    except InputError as error:
        return failed(row, error, name)


def buckets(rows: Iterable[Row | Failure], cut: Cut) -> Iterator[Bucket]:
    """Rows sorted by length within a window, the longest first: what is too much for a device shows at once."""
    held: Bucket = []
    characters = 0
    for row in rows:
        held.append(row)
        characters += row.size
        if len(held) >= cut.window or characters >= _MOST_CHARACTERS:
            yield from _sorted(held, cut.batch)
            held, characters = [], 0
    yield from _sorted(held, cut.batch)


def _sorted(held: Bucket, batch: int) -> Iterator[Bucket]:
    bucket: Bucket = []
    for row in sorted(held, key=lambda row: (-row.size, row.number)):
        if bucket and (len(bucket) >= batch or sum(r.size for r in bucket) + row.size > _BUCKET_CHARACTERS):
            yield bucket
            bucket = []
        bucket.append(row)
    if bucket:
        yield bucket
