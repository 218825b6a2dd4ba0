"""docs/methods.md is what the methods declare, and they are where the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashtrace_plugin
from flashtrace_plugin.methods import METHODS, page
from flashtrace_plugin.methods.registry import BUILT_IN

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


def test_the_page_is_up_to_date():
    assert page.page() == PAGE.read_text(encoding="utf-8"), "stale; run python -m flashtrace_plugin.methods.page"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_host_has_the_method_under_that_name(name):
    cls = METHODS[name]
    assert getattr(flashtrace_plugin, cls.__name__) is cls
    assert hasattr(pytest.importorskip("flashtrace_captum"), cls.__name__)
    assert callable(getattr(pytest.importorskip("flashtrace_lens"), name))
    pytest.importorskip("flashtrace_inseq")
    import inseq

    assert name in inseq.list_feature_attribution_methods()
