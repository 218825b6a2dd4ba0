"""Simple explanations that a method has to beat, by name, each with its cost in forward passes."""

from flashtrace_plugin.evaluation.baselines.attention import ATTENTION
from flashtrace_plugin.evaluation.baselines.base import Baseline
from flashtrace_plugin.evaluation.baselines.gradients import GRADIENTS
from flashtrace_plugin.evaluation.baselines.perturbation import PERTURBATION
from flashtrace_plugin.evaluation.baselines.sampling import SAMPLING
from flashtrace_plugin.evaluation.baselines.simple import SIMPLE

BASELINES: dict[str, Baseline] = {**SIMPLE, **ATTENTION, **GRADIENTS, **PERTURBATION, **SAMPLING}
"""The baselines by name. IFR, AttnLRP and the exhaustive rollout are methods: ``ifr``, ``attnlrp``, ``recursive``."""

ALIASES = {
    "attnlrp": "lrp:rule=attn:hops=0",
    "exhaustive_rollout": "recursive:hops=1",
}
"""Methods of the field that are settings of methods here; spans as in FlashTrace, Eq. 30 and 31."""

__all__ = ["ALIASES", "BASELINES", "Baseline"]
