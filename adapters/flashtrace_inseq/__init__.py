"""The methods of ``flashtrace_plugin`` in Inseq, selectable by name.

    import inseq, flashtrace_inseq

    model = inseq.load_model(name_or_model, "flashtrace")  # or "ifr", "recursive", "heta"
    out = model.attribute(prompt, prompt + generation, hops=1)
    out.show()                                 # one column for the whole answer
    out.show(hop=1)                            # where the mass is after one hop through the reasoning
    flashtrace_inseq.attributions(out)         # all numbers, as flashtrace_plugin.Attribution

Importing the package registers the methods; Inseq has no other way to find them.
"""

try:
    import inseq  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "inseq":
        raise
    raise ImportError(
        "flashtrace_inseq needs Inseq; install it with: pip install 'flashtrace-plugin[inseq]'"
    ) from error

from flashtrace_inseq.registration import register, warn_if_taken

warn_if_taken()

# Defining a method registers it, so the names are looked at first.
from flashtrace_inseq.heta import HETAAttribution  # noqa: E402
from flashtrace_inseq.methods import FlashTraceAttribution, IFRAttribution, RecursiveTokenAttribution  # noqa: E402
from flashtrace_inseq.outputs import FlashTraceSequenceOutput, attributions, portable  # noqa: E402

register()

__all__ = [
    "FlashTraceAttribution",
    "FlashTraceSequenceOutput",
    "HETAAttribution",
    "IFRAttribution",
    "RecursiveTokenAttribution",
    "attributions",
    "portable",
]
