"""Whether the host is there, and new enough. Nothing of it is imported: that takes seconds."""

from importlib.metadata import PackageNotFoundError, version

_EXTRA = 'pip install "flashtrace-plugin[transformer-lens]"'
_OLDEST = (4, 3)
"""TransformerLens 4 has bridges only; before it, HookedTransformer processed weights and knew far fewer families."""


def require_host() -> None:
    """Raises ImportError without transformer-lens, or with one that is too old."""
    needs = f"flashtrace_lens needs transformer-lens {'.'.join(map(str, _OLDEST))} or newer"
    try:
        found = version("transformer-lens")
    except PackageNotFoundError as error:
        raise ImportError(f"{needs}: {_EXTRA}") from error
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        raise ImportError(
            f"{needs}, found {found}: {_EXTRA}. HookedTransformer is not supported; "
            "TransformerBridge.boot_transformers(name) replaces it"
        )
