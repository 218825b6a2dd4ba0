"""How good an attribution is: evidence it should find, and deletions it should predict.

:func:`bootstrap` and :func:`robustness` need scipy, from the extra ``flashtrace-plugin[evaluation]``.
"""

from flashtrace_plugin.metrics.bootstrap import Estimate, bootstrap
from flashtrace_plugin.metrics.deletion import DeletionCurve, deletion_curve, mas, rise
from flashtrace_plugin.metrics.evaluation import Evaluation, evaluate
from flashtrace_plugin.metrics.evidence import dsa, f1, recovery
from flashtrace_plugin.metrics.likelihood import log_likelihood
from flashtrace_plugin.metrics.scores import Scores, ranking
from flashtrace_plugin.metrics.soft import SoftFaithfulness, soft_faithfulness
from flashtrace_plugin.metrics.stability import robustness, sensitivity

__all__ = [
    "DeletionCurve",
    "Estimate",
    "Evaluation",
    "Scores",
    "SoftFaithfulness",
    "bootstrap",
    "deletion_curve",
    "dsa",
    "evaluate",
    "f1",
    "log_likelihood",
    "mas",
    "ranking",
    "recovery",
    "rise",
    "robustness",
    "sensitivity",
    "soft_faithfulness",
]
