"""What a folder of a run holds, so that lines of two models, versions or settings never mix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashtrace_plugin import __version__
from flashtrace_plugin.errors import InputError

_FORMAT = 1
"""Raised when lines change their meaning."""

_NAME = "manifest.json"
_WHERE = ("torch", "device", "threads")
"""What may change from one call to the next: it says where lines were computed first."""


def manifest(model: Any, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one run from another: format, version, model with the digest of its weights, and settings."""
    given = {"model": name, "weights": _weights_digest(model), "dtype": str(model.dtype).removeprefix("torch.")}
    return {"format": _FORMAT, "version": __version__} | given | dict(settings)


def open_folder(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Begins a folder, or goes on in one of the same run.

    Raises InputError for a folder of another run, naming what differs, for one that holds other files, and for one
    that cannot be written.
    """
    path = folder / _NAME
    if path.exists():
        known = manifest_of(folder)
        same = [key for key in {**known, **wanted} if key not in _WHERE]
        differ = [
            f"{key} {known.get(key)!r}, not {wanted.get(key)!r}" for key in same if known.get(key) != wanted.get(key)
        ]
        if differ:
            raise InputError(f"{folder} holds another run, of {'; '.join(differ)}; give another folder as out")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no run ({_NAME} is missing); give another folder as out")
    write_file(path, json.dumps(wanted, indent=1) + "\n")


def manifest_of(folder: Path) -> dict[str, Any]:
    """Raises InputError for a folder that holds no run."""
    try:
        found = json.loads((folder / _NAME).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} holds no run ({_NAME}: {error.strerror}); give a folder of `evaluate`") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / _NAME} is damaged ({error}); give another folder") from error
    if not isinstance(found, dict) or "model" not in found:
        raise InputError(f"{folder / _NAME} is none of a run; give a folder of `evaluate`")
    return found


def write_file(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all. Raises InputError where it cannot be written."""
    work = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work.write_text(text, encoding="utf-8")
        work.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); make room or give another folder") from error


def _weights_digest(model: Any) -> str:
    """First digits of a SHA-256 over the name, the shape and some numbers of every weight."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(weight.shape)} ".encode() + some)
    return digest.hexdigest()[:12]
