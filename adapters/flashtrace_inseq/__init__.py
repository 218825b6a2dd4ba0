"""The methods of ``flashtrace_plugin`` in Inseq, selectable by name.

    import inseq, flashtrace_inseq

    model = inseq.load_model(name_or_model, "flashtrace")  # or "ifr", "recursive", "heta"
    out = model.attribute(prompt, prompt + generation, hops=1)
    out.show()                                 # one column for the whole answer
    out.show(hop=1)                            # where the mass is after one hop through the reasoning
    flashtrace_inseq.attributions(out)         # all numbers, as flashtrace_plugin.Attribution

    model.attribute(prompt, prompt + generation, method="recursive", base="saliency")   # recursion for any method
    flashtrace_inseq.recursive(stored, model.tokenizer, hops="auto")                    # and for a stored result

Importing the package registers the methods; Inseq has no other way to find them. A method that is registered later, by
``flashtrace_plugin.register_method``, is there from then on. ``inseq.explain(name)`` prints what a method takes.
"""

try:
    import inseq  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "inseq":
        raise
    raise ImportError(
        "flashtrace_inseq needs Inseq; install it with: pip install 'flashtrace-plugin[inseq]'"
    ) from error

from flashtrace_inseq.outputs import FailedSequenceOutput, FlashTraceSequenceOutput, attributions, failures, portable
from flashtrace_inseq.recursion import recursive
from flashtrace_inseq.registration import CLASSES, register, warn_if_taken

# Defining an aggregator registers it, so its name is looked at first; those of methods are as their classes are made.
warn_if_taken(methods=())

from flashtrace_inseq import aggregators  # noqa: E402, F401

register()

FlashTraceAttribution = CLASSES["flashtrace"]
IFRAttribution = CLASSES["ifr"]
RecursiveTokenAttribution = CLASSES["recursive"]
HETAAttribution = CLASSES["heta"]

__all__ = [
    "FailedSequenceOutput",
    "FlashTraceAttribution",
    "FlashTraceSequenceOutput",
    "HETAAttribution",
    "IFRAttribution",
    "RecursiveTokenAttribution",
    "attributions",
    "failures",
    "portable",
    "recursive",
]
