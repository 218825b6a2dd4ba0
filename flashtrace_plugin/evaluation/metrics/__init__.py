"""How good an attribution is: evidence it should find, and deletions it should predict.

:func:`bootstrap` and :func:`robustness` need scipy, from the extra ``flashtrace-plugin[evaluation]``.
"""

from flashtrace_plugin.evaluation.metrics.bootstrap import Estimate, bootstrap
from flashtrace_plugin.evaluation.metrics.deletion import DeletionCurve, deletion_curve, mas, rise
from flashtrace_plugin.evaluation.metrics.evaluation import Evaluation, evaluate
from flashtrace_plugin.evaluation.metrics.evidence import dsa, f1, recovery
from flashtrace_plugin.evaluation.metrics.likelihood import log_likelihood
from flashtrace_plugin.evaluation.metrics.scores import Scores, ranking
from flashtrace_plugin.evaluation.metrics.soft import SoftFaithfulness, soft_faithfulness
from flashtrace_plugin.evaluation.metrics.stability import robustness, sensitivity

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
