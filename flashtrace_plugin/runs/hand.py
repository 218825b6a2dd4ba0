"""What workers have in hand, so that a row which kills them is told by its number and takes no other with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from flashtrace_plugin.runs.buckets import Bucket
from flashtrace_plugin.runs.lines import line_of_failure
from flashtrace_plugin.runs.rows import Failure

_NAME = ".in-hand"


class Hand:
    """Notes in a folder which buckets and rows were begun and not ended, by workers that have died since.

    folder: of the results; every worker that sees it knows what killed the others
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / _NAME

    def empty(self) -> None:
        """Forgets what an earlier run had in hand."""
        shutil.rmtree(self.path, ignore_errors=True)

    def explained(self, bucket: Bucket, lines: Callable[[Bucket], list[bytes]]) -> list[bytes]:
        """Lines of a bucket: together the first time; each row by itself, and not a second time, if a worker died."""
        note = self.path / f"bucket-{bucket[0].number}"
        apart = self._begin(note)
        found = [line for row in bucket for line in self._alone([row], lines)] if apart else lines(bucket)
        note.unlink(missing_ok=True)
        return found

    def _alone(self, bucket: Bucket, lines: Callable[[Bucket], list[bytes]]) -> list[bytes]:
        [row] = bucket
        note = self.path / f"row-{row.number}"
        if self._begin(note):
            reason = (
                "a worker died twice with this row in hand, the second time with no other; was it short of memory?"
            )
            return [line_of_failure(Failure(row.number, row.digest, row.id, "WorkerDied", reason))]
        found = lines(bucket)
        note.unlink(missing_ok=True)
        return found

    def _begin(self, note: Path) -> bool:
        """Whether it was begun before and not ended."""
        before = note.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        note.touch()
        return before
