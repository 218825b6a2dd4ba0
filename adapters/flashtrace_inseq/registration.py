"""Names in Inseq's registries.

Inseq finds methods by walking the subclasses of ``FeatureAttribution``, so a method is registered once its class
exists. Two classes with one name are picked from at random, hence the look before the classes are defined.
"""

from __future__ import annotations

import warnings

from inseq.attr import FeatureAttribution
from inseq.data import Aggregator
from inseq.utils.id_utils import INSEQ_ID_MAP

METHOD_NAMES = ("flashtrace", "ifr", "recursive", "heta")
AGGREGATOR_NAMES = ("hops", "parts")


def warn_if_taken() -> None:
    """Warns when another package has registered one of the names."""
    _warn("method", METHOD_NAMES, FeatureAttribution.available_classes())
    _warn("aggregator", AGGREGATOR_NAMES, Aggregator.available_classes())


def _warn(kind: str, names: tuple[str, ...], known: dict[str, type]) -> None:
    for name in names:
        owner = known[name].__module__ if name in known else __package__
        if owner.partition(".")[0] != __package__:
            warnings.warn(
                f"the {kind} {name!r} is already registered in Inseq by {owner}; with two of that name Inseq picks "
                "one of them at random. Import only one of the two packages",
                stacklevel=3,
            )


def register() -> None:
    """Makes the names known to ``inseq.explain``, whose table is built before any plugin is imported."""
    for names, known in (
        (METHOD_NAMES, FeatureAttribution.available_classes()),
        (AGGREGATOR_NAMES, Aggregator.available_classes()),
    ):
        INSEQ_ID_MAP.update({name: known[name] for name in names})
