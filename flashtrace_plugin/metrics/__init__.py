"""How good an attribution is: evidence it should find, and deletions it should predict.

:func:`bootstrap` needs scipy, from the extra ``flashtrace-plugin[evaluation]``.
"""

from flashtrace_plugin.metrics.bootstrap import Estimate, bootstrap
from flashtrace_plugin.metrics.deletion import DeletionCurve, deletion_curve, mas, rise
from flashtrace_plugin.metrics.evidence import dsa, f1, recovery
from flashtrace_plugin.metrics.likelihood import log_likelihood
from flashtrace_plugin.metrics.scores import Scores, ranking

__all__ = [
    "DeletionCurve",
    "Estimate",
    "Scores",
    "bootstrap",
    "deletion_curve",
    "dsa",
    "f1",
    "log_likelihood",
    "mas",
    "ranking",
    "recovery",
    "rise",
]
