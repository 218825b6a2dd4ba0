"""The exceptions and warnings of the package; one base class, so that one ``except`` clause is enough."""


class FlashTraceError(ValueError):
    """Base class of every error that the package raises about its input or the model.

    The message gives the value, the bound it broke and the remedy.
    """


class SpanError(FlashTraceError):
    """A span is outside the text, empty, reversed, overlapping or cannot be found."""


class InputError(FlashTraceError):
    """Token ids, texts or options are not usable."""


class UnsupportedModelError(FlashTraceError):
    """The model's architecture cannot be decomposed, so it is refused instead of guessed at."""


class ClosureError(FlashTraceError):
    """The parts read from the model do not add up to its residual stream."""


class MethodError(FlashTraceError):
    """A method cannot be registered, or returned what no attribution can be."""


class CostError(FlashTraceError):
    """A run would take more than ``max_cost`` allows; ``estimate`` is the part of the message that tells how much."""

    def __init__(self, message: str, estimate: str = "") -> None:
        super().__init__(message)
        self.estimate = estimate


class CostWarning(UserWarning):
    """What was asked for will take long; the message tells how long."""


class ModelWarning(UserWarning):
    """An attribution is verified with a model of another name than the one it explains."""


class ReasoningWarning(UserWarning):
    """Hops through the reasoning were asked for, and none was found to follow."""
