"""Tables of pandas, which is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flashtrace_plugin.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


def as_frame(rows: Iterable[Any], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Rows as a table of pandas; ``columns`` are needed for rows without names. Raises InputError without pandas."""
    try:
        import pandas as pd
    except ImportError as error:
        raise InputError("to_frame() needs pandas; pip install 'flashtrace-plugin[evaluation]'") from error
    return pd.DataFrame(list(rows), columns=columns)
