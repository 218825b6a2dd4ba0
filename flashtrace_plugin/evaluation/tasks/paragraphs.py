"""Mixed paragraphs in the form of HETA's curated set: a narrative that distracts, a support, a question about it.

The file is the caller's; it holds ``examples``, each with the fields of ``_FIELDS``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.tasks.text_sample import TextSample
from flashtrace_plugin.spans import Chars

_TASK = "paragraphs"
_FIELDS = (
    "narrative_segment",
    "sciq_support_segment",
    "question",
    "answer",
    "important_word_indices_in_sciq_support",
)
_LEAD = "The answer is the"


def read_paragraphs(path: str | Path) -> tuple[TextSample, ...]:
    """All samples of a file, in its order. Raises InputError for what is no such file, naming the missing field."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); give a JSON file of mixed paragraphs") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); give a JSON file of mixed paragraphs") from error
    examples = data.get("examples") if isinstance(data, dict) else None
    if not examples:
        raise InputError(f"{path} holds no examples; expected an object with a list of them under 'examples'")
    return tuple(_sample(_complete(number, example, path)) for number, example in enumerate(examples))


def _complete(number: int, example: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    missing = [name for name in _FIELDS if name not in example]
    if missing:
        raise InputError(f"example {number} of {path} lacks {', '.join(missing)}; its fields must be {list(_FIELDS)}")
    return example


def _sample(example: Mapping[str, Any]) -> TextSample:
    """The answer from the evidence words of the support. Words are counted from 0, split at white space."""
    paragraph = f"{example['narrative_segment']} {example['sciq_support_segment']}"
    text = f"{paragraph} {example['question']} {_LEAD}"
    words = _words(example["sciq_support_segment"], len(example["narrative_segment"]) + 1)
    return TextSample(
        task=_TASK,
        prompt=text,
        expected=f" {example['answer']}",
        pattern=rf"(?i)\s*(?P<answer0>{re.escape(example['answer'])})\b",
        evidence=(tuple(words[i] for i in example["important_word_indices_in_sciq_support"]),),
        question=(len(paragraph) + 1, len(text)),
        parameters={name: example[name] for name in ("narrative_id", "sciq_id") if name in example},
    )


def _words(text: str, shift: int) -> list[Chars]:
    return [(shift + match.start(), shift + match.end()) for match in re.finditer(r"\S+", text)]
