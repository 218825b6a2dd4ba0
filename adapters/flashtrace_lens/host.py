"""Whether the host is there, and new enough. Nothing of it is imported: that takes seconds."""

from importlib.metadata import PackageNotFoundError, version

EXTRA = 'pip install "flashtrace-plugin[transformer-lens]"'
OLDEST = 4
"""TransformerLens 4 has bridges only; before it, HookedTransformer processed weights and knew far fewer families."""


def require_host() -> None:
    """Raises ImportError without transformer-lens, or with one that is too old."""
    try:
        found = version("transformer-lens")
    except PackageNotFoundError as error:
        raise ImportError(f"flashtrace_lens needs transformer-lens {OLDEST} or newer: {EXTRA}") from error
    if int(found.split(".")[0]) < OLDEST:
        raise ImportError(
            f"flashtrace_lens needs transformer-lens {OLDEST} or newer, found {found}: {EXTRA}. HookedTransformer "
            "is not supported; TransformerBridge.boot_transformers(name) replaces it"
        )
