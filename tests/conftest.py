"""One thread per test process: the models are tiny, and two processes share the cores."""

import os
from importlib.util import find_spec

# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_terminal_summary(terminalreporter):
    """Says in the last lines what could not be tested here, for skips are easily overlooked."""
    from tests import browser

    told = {browser.missing(), None if find_spec("axe_playwright_python") else browser.MISSING_AXE} - {None}
    for reason in sorted(told):
        terminalreporter.write_line(f"NOT TESTED: {reason}", yellow=True)
