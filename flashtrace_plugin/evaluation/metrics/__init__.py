"""How good an attribution is: evidence it should find, and deletions it should predict.

:func:`bootstrap` and :func:`robustness` need scipy, from the extra ``flashtrace-plugin[evaluation]``.
"""

from flashtrace_plugin.evaluation.metrics.bootstrap import Estimate, bootstrap
from flashtrace_plugin.evaluation.metrics.deletion import DeletionCurve, deletion_curve, mas, rise
from flashtrace_plugin.evaluation.metrics.detection import auroc, recovery_ceiling
from flashtrace_plugin.evaluation.metrics.evaluation import Evaluation, evaluate
from flashtrace_plugin.evaluation.metrics.evidence import dsa, f1, recovery
from flashtrace_plugin.evaluation.metrics.flow import mass_by_hop
from flashtrace_plugin.evaluation.metrics.likelihood import log_likelihood
from flashtrace_plugin.evaluation.metrics.paired import paired
from flashtrace_plugin.evaluation.metrics.patching import Patching, patch_effects, patching
from flashtrace_plugin.evaluation.metrics.scores import Scores, ranking
from flashtrace_plugin.evaluation.metrics.soft import SoftFaithfulness, soft_faithfulness
from flashtrace_plugin.evaluation.metrics.specificity import specificity
from flashtrace_plugin.evaluation.metrics.stability import robustness, sensitivity
from flashtrace_plugin.evaluation.metrics.sufficiency import Sufficiency, sufficiency

__all__ = [
    "DeletionCurve",
    "Estimate",
    "Evaluation",
    "Patching",
    "Scores",
    "SoftFaithfulness",
    "Sufficiency",
    "auroc",
    "bootstrap",
    "deletion_curve",
    "dsa",
    "evaluate",
    "f1",
    "log_likelihood",
    "mas",
    "mass_by_hop",
    "paired",
    "patch_effects",
    "patching",
    "ranking",
    "recovery",
    "recovery_ceiling",
    "rise",
    "robustness",
    "sensitivity",
    "soft_faithfulness",
    "specificity",
    "sufficiency",
]
