"""What the classes of registered methods share. The numbers are those of flashtrace_plugin."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from flashtrace_captum.base import TokenAttribution, TokenScores, refuse_unknown
from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.methods.base import Method, options_of
from flashtrace_plugin.methods.options import Declared
from flashtrace_plugin.positions import Positions
from flashtrace_plugin.spans import Span
from flashtrace_plugin.text import Located, TokenizedText

_PER_CALL = frozenset({"hops"})
"""Options that ``attribute`` takes, because they change from call to call; the others are the constructor's."""


class MethodAttribution(TokenAttribution):
    """A registered method in Captum; :func:`flashtrace_captum.classes.class_of` makes the class of each.

    method: the method of flashtrace_plugin
    """

    method: ClassVar[type[Method]]

    def __init__(self, forward_func: Any, tokenizer: Any = None, **options: Any) -> None:
        super().__init__(forward_func)
        self._refuse_unknown(options, call=False)
        # Refuses a model or an option now, not at the first call, and reads options that can be read only once.
        made = self.method(forward_func, tokenizer, **options)
        checked = vars(made.driving) | vars(made.options)
        self.tokenizer = tokenizer
        self.options = {name: checked[name] for name in options}
        self.format = made.driving.format

    @classmethod
    def get_name(cls) -> str:
        """A class that is called like its method has a name, as FlashTrace; others are split into words by Captum."""
        return cls.__name__ if cls.__name__.lower() == cls.method.name else super().get_name()

    def text_scores(
        self,
        text: TokenizedText,
        target: Positions | str | None = None,
        reasoning: Positions | str | None = None,
        **options: Any,
    ) -> tuple[Located, TokenScores]:
        """As :meth:`TokenAttribution.text_scores`, by the method itself."""
        if type(self).token_scores is not MethodAttribution.token_scores:
            return super().text_scores(text, target, reasoning, **options)  # a subclass that changes the scores
        found = self._made(options).attribute_text(text, target=target, reasoning=reasoning)
        return Located(found.target, found.reasoning), _as_token_scores(found)

    def token_scores(
        self, input_ids: Tensor, *, prompt_length: int, target: Span, reasoning: Span | None = None, **options: Any
    ) -> TokenScores:
        """Scores of one sequence, see :meth:`TokenAttribution.token_scores`."""
        found = self._made(options).attribute_ids(
            input_ids, prompt_length=prompt_length, target=target, reasoning=reasoning
        )
        return _as_token_scores(found)

    def _made(self, options: dict[str, Any]) -> Method:
        """The method with the options of this call."""
        self._refuse_unknown(options, call=True)
        return self.method(self.forward_func, self.tokenizer, **self.options, **options)

    def _refuse_unknown(self, options: dict[str, Any], *, call: bool) -> None:
        takes, elsewhere = ([one.name for one in options_for(self.method, call=c)] for c in (call, not call))
        refuse_unknown(type(self).__name__, options, takes, elsewhere, call=call)


def options_for(method: type[Method], *, call: bool) -> list[Declared]:
    """The options of a method that ``attribute`` takes (``call``), or its constructor."""
    return [one for one in options_of(method) if (one.name in _PER_CALL) == call]


def _as_token_scores(found: Attribution) -> TokenScores:
    """What Captum's inputs need of an attribution."""
    return TokenScores(found.totals, found.components.get("per_token"), found)
