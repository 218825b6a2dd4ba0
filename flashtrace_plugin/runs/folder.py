"""The folder of a run: what it is a run of, its results, and who may write them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.runs.lines import LineHead, head_of

_RESULTS = "results.jsonl"
_MANIFEST = "run.json"
_FORMAT = "flashtrace-run/1"


class Folder:
    """Open for one run: results are appended, written whole or not at all.

    path:  of the folder, made if it is not there
    about: what the run is one of; where the folder has results of another, it is refused
    done:  digests of the rows that have a result, by number
    failed: numbers of those whose result is a failure

    Raises InputError for a folder that cannot be written, holds something else or another run, or is in use.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any]) -> None:
        self.path = Path(path).expanduser()
        self.about = {"format": _FORMAT} | dict(about)
        self.done: dict[int, str] = {}
        self.failed: set[int] = set()
        self._lock = FileLock(self.path / ".lock")

    def __enter__(self) -> Folder:
        self._claim()
        try:
            self._check()
            for head, _ in _mended(self.path / _RESULTS):
                self._note(head)
            self._file = os.open(self.path / _RESULTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)
        self._lock.release()

    def append(self, lines: Iterable[bytes]) -> list[LineHead]:
        """Writes lines and waits until the disk has them; rows that have a result already are left out.

        Raises InputError where the disk takes no more; what was written before stays, and nothing is cut.
        """
        new = [(head, line) for line in lines if (head := head_of(line)) and head.number not in self.done]
        size = os.fstat(self._file).st_size
        try:
            _write_all(self._file, b"".join(line for _, line in new))
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise InputError(
                f"cannot write {self.path / _RESULTS}: {error.strerror}; {len(self.done)} results are saved. Make "
                "room and start the same run again, which goes on where this one stopped"
            ) from error
        for head, _ in new:
            self._note(head)
        return [head for head, _ in new]

    def know(self, fingerprint: str) -> None:
        """Notes the model that explains, once. Raises InputError if earlier results are another's."""
        known = self.about.get("fingerprint")
        if known not in (None, fingerprint):
            raise InputError(
                f"{self.path} holds results of another model under the same name: its weights or its tokenizer have "
                f"the fingerprint {known}, those of now {fingerprint}; use another folder"
            )
        if known is None:
            self.about["fingerprint"] = fingerprint
            self._save()

    def forget_failures(self) -> None:
        """Takes failures out of the results, so that these rows are tried again."""
        if not self.failed:
            return
        path, kept = self.path / _RESULTS, self.path / f"{_RESULTS}.new"
        with kept.open("wb") as file:
            for head, line in _mended(path):
                if not head.failed:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        os.close(self._file)
        kept.replace(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        for number in self.failed:
            del self.done[number]
        self.failed = set()

    def _note(self, head: LineHead) -> None:
        self.done[head.number] = head.digest
        if head.failed:
            self.failed.add(head.number)

    def _claim(self) -> None:
        """Makes the folder and locks it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"another run is writing {self.path}; wait for it, or use another folder") from error
        except OSError as error:
            raise InputError(f"cannot write the folder {self.path}: {error.strerror}; choose another one") from error

    def _check(self) -> None:
        """Refuses a folder of something else; notes what the run is one of in a new one."""
        if not (self.path / _MANIFEST).exists():
            others = sorted(p.name for p in self.path.iterdir() if p.name != ".lock" and not p.name.endswith(".new"))
            if others:
                raise InputError(f"{self.path} is no folder of a run: it has no {_MANIFEST}, but {others[0]}")
            self._save()
            return
        there = read_manifest(self.path)
        told = _differences(there, self.about)
        if told:
            raise InputError(
                f"{self.path} holds another run: {'; '.join(told)}. Use another folder, or the settings of that run"
            )
        self.about = there

    def _save(self) -> None:
        data = json.dumps(self.about, ensure_ascii=False, indent=1).encode()
        write_whole(self.path / _MANIFEST, data)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a folder's run is one of. Raises InputError for a folder of something else."""
    try:
        found = json.loads((path / _MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no folder of a run: {_MANIFEST} cannot be read ({error})") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise InputError(f"{path / _MANIFEST} is not of the format {_FORMAT}")
    return found


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. Raises InputError where that cannot be done."""
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def results(path: Path) -> Iterator[tuple[LineHead, bytes]]:
    """Heads and lines of a folder's results, in the order in which they were found; a cut last line is left out."""
    file = path / _RESULTS
    if not file.exists():
        return
    with file.open("rb") as lines:
        for i, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            head = head_of(line)
            if head is None:
                raise InputError(f"line {i} of {file} is no result of a run; was it edited?")
            yield head, line


def _mended(file: Path) -> Iterator[tuple[LineHead, bytes]]:
    """The same, and what follows the last whole line, which a killed run left, is cut off."""
    size = 0
    for head, line in results(file.parent):
        size += len(line)
        yield head, line
    if file.exists() and file.stat().st_size > size:
        os.truncate(file, size)


def _write_all(file: int, data: bytes) -> None:
    """A disk that is nearly full takes a part before it fails."""
    while data:
        data = data[os.write(file, data) :]


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two runs, in words."""
    pairs = {name: (there.get(name), here[name]) for name in ("version", "method", "model", "max_new_tokens")}
    settings = there.get("settings", {}), here["settings"]
    if there.get("method") == here["method"]:
        names = dict.fromkeys([*settings[0], *settings[1]])
        pairs |= {name: (settings[0].get(name), settings[1].get(name)) for name in names}
    return [f"{name} is {then!r} there and {now!r} here" for name, (then, now) in pairs.items() if then != now]
