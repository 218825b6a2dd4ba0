"""The methods of ``flashtrace_plugin`` under their names in Inseq's registries, also those registered later.

Inseq finds methods by walking the subclasses of ``FeatureAttribution``, so a method is registered once its class
exists. Two classes with one name are picked from at random, hence the look before a class is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from inseq.attr import FeatureAttribution
from inseq.data import Aggregator
from inseq.models import FRAMEWORKS_MAP, HuggingfaceModel
from inseq.utils.id_utils import INSEQ_ID_MAP
from torch import nn

from flashtrace_inseq.heta import TokenByToken
from flashtrace_inseq.methods import PluginAttribution
from flashtrace_inseq.recursion import WithBase
from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.heta import HETA
from flashtrace_plugin.methods.recursive import RecursiveAttribution
from flashtrace_plugin.methods.registry import METHODS

_AGGREGATORS = ("hops", "parts", "recursive")

_SPECIAL: Mapping[type[Method], type[PluginAttribution]] = {HETA: TokenByToken, RecursiveAttribution: WithBase}
"""Methods that do otherwise in Inseq than the rest, with what their classes are made of."""

CLASSES: dict[str, type[PluginAttribution]] = {}
"""The classes that were made, by the name of their method."""


def register() -> None:
    """Makes a class of every method there is and will be, and tells ``inseq.explain`` all names.

    Its table is built before any plugin is imported. Another of Inseq's tables has the loader of ``load_model``.
    """
    METHODS.subscribe(_adapt)
    FRAMEWORKS_MAP["hf_transformers"] = _Loader
    known = Aggregator.available_classes()
    # A name of both kinds is explained as the method, which tells of the aggregator.
    INSEQ_ID_MAP.update({name: known[name] for name in _AGGREGATORS if name not in CLASSES})


class _Loader(HuggingfaceModel):
    """Inseq's loader, which would take a bridge of TransformerLens for a path."""

    @staticmethod
    def load(model: Any, *args: Any, **options: Any) -> HuggingfaceModel:
        """As in Inseq. Raises UnsupportedModelError for a bridge, and for the model inside one."""
        modules = model.modules() if isinstance(model, nn.Module) else ()
        if any(type(module).__module__.startswith("transformer_lens.") for module in modules):
            raise UnsupportedModelError(
                "Inseq runs Hugging Face models, and this one is made of a TransformerBridge; load the model that "
                "the bridge was made from, or attribute through it: flashtrace_lens.flashtrace(bridge, tokens, …)"
            )
        return HuggingfaceModel.load(model, *args, **options)


def _adapt(core: type[Method]) -> None:
    """Makes the class of a method; one that is registered again, as a notebook's cell does, takes its own place."""
    if core.name not in CLASSES:
        warn_if_taken([core.name], ())
        base = next((base for method, base in _SPECIAL.items() if issubclass(core, method)), PluginAttribution)
        name = core.__name__.removesuffix("Attribution") + "Attribution"
        CLASSES[core.name] = type(name, (base,), {"__module__": __package__, "method_name": core.name})
    made = CLASSES[core.name]
    made.core = core
    made.__doc__ = made.explanation()
    INSEQ_ID_MAP[core.name] = FeatureAttribution.available_classes()[core.name]


def warn_if_taken(methods: Iterable[str] = METHODS, aggregators: Iterable[str] = _AGGREGATORS) -> None:
    """Warns when another package has registered one of the names."""
    _warn("method", methods, FeatureAttribution.available_classes())
    _warn("aggregator", aggregators, Aggregator.available_classes())


def _warn(kind: str, names: Iterable[str], known: Mapping[str, type]) -> None:
    for name in names:
        owner = known[name].__module__ if name in known else __package__
        if owner.partition(".")[0] != __package__:
            warnings.warn(
                f"the {kind} {name!r} is already registered in Inseq by {owner}; with two of that name Inseq picks "
                "one of them at random. Import only one of the two packages",
                stacklevel=3,
            )
