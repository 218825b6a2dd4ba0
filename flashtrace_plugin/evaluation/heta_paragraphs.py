"""HETA's mixed paragraphs as one token to explain: a sentence that distracts, one that holds the answer, a question.

The answer is put into the model's mouth in one of several forms, and only its first token is the target.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.metrics import dsa, recovery
from flashtrace_plugin.evaluation.tasks.text_sample import prompt_offsets
from flashtrace_plugin.spans import Chars, Span
from flashtrace_plugin.text import render, tokenize

FORMS = {
    "question": "{paragraph} Question: {question} Answer:",
    "completion": "{paragraph} {question} The answer is the",
    "chat": "{paragraph} {question}",
}
"""How a model is asked; in a chat it begins its answer with “The answer is the”."""

_Example = Mapping[str, Any]
"""One entry of the file, see :mod:`flashtrace_plugin.evaluation.tasks.paragraphs`."""


def diagonal(examples: Sequence[_Example], seed: int) -> list[_Example]:
    """Every narrative once and every support once, in pairs that no other seed below their number has."""
    by_pair = {(e["narrative_id"], e["sciq_id"]): e for e in examples}
    narratives, supports = (sorted(set(ids)) for ids in zip(*by_pair, strict=True))
    random.Random("paragraphs").shuffle(supports)
    return [by_pair[pair] for pair in zip(narratives, supports[seed:] + supports[:seed], strict=True)]


def paragraph_case(tokenizer: Any, example: _Example, form: str) -> Case:
    """The answer's first token explained by the evidence words of the support against the narrative."""
    narrative, support = example["narrative_segment"], example["sciq_support_segment"]
    prompt = _prompt_of(tokenizer, example, form)
    first, second = prompt.index(narrative), prompt.index(support)
    words = [(second + m.start(), second + m.end()) for m in re.finditer(r"\S+", support)]
    text = tokenize(tokenizer, prompt, " " + example["answer"])
    _, offsets = prompt_offsets(tokenizer, prompt)

    def over(*ranges: Chars) -> tuple[int, ...]:
        return tuple(i for i, (a, b) in enumerate(offsets) if any(a < stop and start < b for start, stop in ranges))

    n = text.prompt_length
    return Case(
        text.input_ids[: n + 1],
        n,
        Span(n, n + 1),
        None,
        evidence=over(*(words[i] for i in example["important_word_indices_in_sciq_support"])),
        distractors=over((first, first + len(narrative))),
        segment=over((second, second + len(support))),
        forced=True,
    )


def _prompt_of(tokenizer: Any, example: _Example, form: str) -> str:
    """Begins with the model's begin token: as the attention sink it must be in neither segment."""
    paragraph = f"{example['narrative_segment']} {example['sciq_support_segment']}"
    text = FORMS[form].format(paragraph=paragraph, question=example["question"])
    if form == "chat":
        text = render(tokenizer, [{"role": "user", "content": text}])[0] + "The answer is the"
    begin = tokenizer.bos_token or ""
    added = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return ("" if added else begin) + text.removeprefix(begin)


def agreement(case: Case, scores: Tensor) -> dict[str, float]:
    """Metrics over the paragraph alone, about three tenths of which are evidence, and its share of all mass."""
    inside = sorted({*case.distractors, *case.segment})
    gold = [inside.index(i) for i in case.evidence]
    return {
        "recovery": recovery(scores[inside], gold, fraction=0.3),
        "DSA": dsa(scores, case.evidence, case.distractors, evidence_segment=case.segment),
        "inside": float(scores[inside].sum() / scores.sum()),
    }


@torch.no_grad()
def answered(model: Any, case: Case) -> dict[str, float]:
    """The probability of the target's token, and 1 where it is the likeliest."""
    logits = model(case.input_ids[None, :-1].to(model.device)).logits[0, -1].float()
    answer = int(case.input_ids[-1])
    return {"p": float(logits.softmax(-1)[answer]), "answered": float(logits.argmax() == answer)}
