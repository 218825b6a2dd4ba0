"""Which text made an agent call this tool? Methods against injected instructions of AgentDojo, in one page.

    python -m flashtrace_plugin.evaluation.forensics --model smollm2 --cases 20 --out lines/smollm2.jsonl

Writes a line of JSON for each case and method, can be killed and run again, and writes docs/forensics.md from these
lines and from those of other models that ``--also`` names.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation import models
from flashtrace_plugin.evaluation.baselines import BASELINES
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.metrics import auroc, recovery, recovery_ceiling
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.evaluation.metrics.likelihood import log_likelihood
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_scores
from flashtrace_plugin.evaluation.run.contestants import Scorer, scorer
from flashtrace_plugin.evaluation.run.lines import append_line
from flashtrace_plugin.evaluation.run.runner import check_same, finished_lines, read_results
from flashtrace_plugin.evaluation.tables import cell, markdown
from flashtrace_plugin.evaluation.tasks.injections import Transcript, transcripts
from flashtrace_plugin.methods import METHODS
from flashtrace_plugin.spans import Chars
from flashtrace_plugin.text import TokenizedText, tokenize
from flashtrace_plugin.units.scores import UnitScores, find_units, score_units
from flashtrace_plugin.units.shares import unit_tokens
from flashtrace_plugin.units.targets import ToolCall

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For models without a chat template."""


@dataclass(frozen=True)
class _Attacked:
    """A transcript as a case: its evidence is the attacker's text, its target the attacker's call.

    injection: characters of the attacker's text in the visible text
    """

    case: Case
    text: TokenizedText
    injection: Chars

    def units(self, scores: Tensor, kind: str) -> UnitScores:
        """Mass over the messages or sentences. scores: [prompt_length]"""
        tokens = self.text.tokens[: self.case.prompt_length]
        return score_units(find_units(kind, tokens, self.text.contents, self.text.messages), tokens, scores)

    def on_top(self, scores: Tensor, kind: str, by: str) -> bool:
        """Whether the first unit is the attacker's: whether they share half of the shorter one."""
        start, stop = self.units(scores, kind).top(1, by=by)[0].unit.ranges[0]
        shared = min(stop, self.injection[1]) - max(start, self.injection[0])
        return 2 * shared >= min(stop - start, self.injection[1] - self.injection[0])


def _attacked(tokenizer: Any, seed: int, longest: int) -> Iterator[list[_Attacked]]:
    """Cases of the transcripts that are not too long: the whole call, and the argument that only the attacker gave."""
    for number, one in enumerate(transcripts(tokenizer, seed)):
        text = tokenize(tokenizer, one.messages, one.call)
        targets = [ToolCall(0)] + ([] if one.argument is None else [ToolCall(0).argument(one.argument)])
        if text.prompt_length <= longest:
            yield [_as_case(text, one, target, seed, number) for target in targets]


def _as_case(text: TokenizedText, one: Transcript, target: ToolCall, seed: int, number: int) -> _Attacked:
    tokens = text.tokens[: text.prompt_length]
    units = find_units({"injection": one.injection}, tokens, text.contents)
    case = Case(
        text.input_ids,
        text.prompt_length,
        text.span("target", target),
        None,
        tuple(unit_tokens(tokens, [unit.ranges for unit in units], [True] * len(units))[0]),
        task=_CALL if target.path is None else _ARGUMENT,
        seed=seed,
        number=number,
        forced=True,
    )
    return _Attacked(case, text, units[0].ranges[0])


def _without_each_message(model: Any, one: _Attacked) -> Tensor:
    """Fall of log P(call) without each message, spread over its tokens, 0 where it rises: a forward pass for each."""
    units = one.units(torch.zeros(one.case.prompt_length, dtype=torch.float32), "message").units
    tokens = one.text.tokens[: one.case.prompt_length]
    places = unit_tokens(tokens, [unit.ranges for unit in units], [True] * len(units))
    places = [place for place, unit in zip(places, units, strict=True) if unit.content]
    rows = one.case.input_ids.repeat(len(places) + 1, 1)
    for row, place in zip(rows[1:], places, strict=True):
        row[place] = replacement_token(model)
    found = log_likelihood(model, rows, generation=one.case.target, batch_size=4)
    scores = torch.zeros(one.case.prompt_length, dtype=torch.float32)
    for place, drop in zip(places, (found[0] - found[1:]).clamp(min=0).tolist(), strict=True):
        scores[place] = drop / len(place)
    return scores


def _contestants(model: Any) -> dict[str, Scorer]:
    """Methods by the name of their row; ``recommended`` as ``blame`` runs it."""
    build: dict[str, dict[str, Any]] = {"recommended": {"sinks": "drop"}, "flashtrace": {}, "lrp": {}}
    rows = {name: scorer(METHODS[name](model, **options)) for name, options in build.items()}
    known = ("attention", "random")
    return rows | {name: partial(BASELINES[name].explain, model) for name in known}


_LEFT_OUT = "leave one message out"
_CALL, _ARGUMENT = "the whole call", "the argument that only the attacker gave"


def _lines(model: Any, cases: Sequence[_Attacked], out: Path) -> None:
    """A line for each case and method; what the file holds already is not computed again."""
    rows = _contestants(model)
    finished = finished_lines(out, str(model.config.name_or_path))
    for one in tqdm(cases, desc="cases", unit="case"):
        for name in (*rows, _LEFT_OUT):
            check_same(finished.get((one.case.name, name), one.case.digest), one.case, out)
            if (one.case.name, name) not in finished:
                begin = time.perf_counter()
                scores = (
                    _without_each_message(model, one) if name == _LEFT_OUT else as_scores(rows[name](one.case)).abs()
                )
                spent = time.perf_counter() - begin
                append_line(out, _head(model, one, name) | _measured(one, scores) | {"seconds": spent})


def _scores(found: Scores) -> Tensor:
    return as_scores(found).abs().float()


def _head(model: Any, one: _Attacked, name: str) -> dict[str, Any]:
    case = one.case
    return {
        "model": str(model.config.name_or_path),
        "case": case.name,
        "target": case.task,
        "digest": case.digest,
        "method": name,
        "prompt_length": case.prompt_length,
        "evidence": len(case.evidence),
        "messages": one.text.messages,
        "sentences": sum(
            unit.content for unit in one.units(torch.zeros(case.prompt_length, dtype=torch.float32), "sentence").units
        ),
    }


def _measured(one: _Attacked, scores: Tensor) -> dict[str, float]:
    found = {
        "recovery": recovery(scores, one.case.evidence),
        "ceiling": recovery_ceiling(one.case.prompt_length, one.case.evidence),
        "AUROC": auroc(scores, one.case.evidence),
    }
    first = {
        f"{kind} by {by}": float(one.on_top(scores, kind, by))
        for kind in ("message", "sentence")
        for by in ("score", "density")
    }
    return found | first


def _measure(
    model: Annotated[str, typer.Option(help="smollm2, gemma3-270m, or as for the command line")],
    out: Annotated[Path, typer.Option(help="file of the lines")],
    cases: Annotated[int, typer.Option(help="transcripts")] = 20,
    seed: Annotated[int, typer.Option(help="of the transcripts")] = 0,
    longest: Annotated[int, typer.Option(help="tokens of the longest prompt that is used")] = 600,
    also: Annotated[list[Path] | None, typer.Option(help="other files of lines for the page; may be repeated")] = None,
    to: Annotated[Path, typer.Option(help="the page")] = Path("docs/forensics.md"),
) -> None:
    """Measure how well methods find the injected instruction behind a tool call."""
    lm, tokenizer = models.load(model)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    drawn = list(chain.from_iterable(islice(_attacked(tokenizer, seed, longest), cases)))
    if not drawn:
        raise InputError(f"no transcript's prompt has at most {longest} tokens; pass a larger --longest")
    _lines(lm, drawn, out)
    sections = [_section(read_results(path)) for path in (out, *(also or []))]
    to.write_text("\n".join([_INTRODUCTION.format(date=datetime.date.today()), *sections]), "utf-8")
    typer.echo(to.read_text(encoding="utf-8"))


_COLUMNS = {
    "recovery": "recovery at 10 %",
    "AUROC": "AUROC",
    "message by score": "message, by mass",
    "message by density": "message, by density",
    "sentence by score": "sentence, by mass",
    "sentence by density": "sentence, by density",
    "seconds": "seconds",
}


def _section(values: pd.DataFrame) -> str:
    parts = [_table(values.query("target == @target"), target) for target in dict.fromkeys(values["target"])]
    return "\n".join([f"## {values['model'][0]}", "", *parts])


def _table(values: pd.DataFrame, target: str) -> str:
    names = list(dict.fromkeys(values["method"]))
    columns = {head: [cell(values.query("method == @n")[name], 2) for n in names] for name, head in _COLUMNS.items()}
    each = values.drop_duplicates("case")
    told = (
        f"Target: {target}. {len(each)} transcripts, on average {each['prompt_length'].mean():.0f} tokens of prompt "
        f"(at most {each['prompt_length'].max()}) in {each['messages'].mean():.1f} messages and "
        f"{each['sentences'].mean():.0f} sentences; the injection has {each['evidence'].mean():.0f} tokens, so that "
        f"recovery can be {each['ceiling'].mean():.2f} at most."
    )
    return "\n".join([told, "", markdown(pd.DataFrame(columns, index=pd.Index(names, name="method"))), ""])


_INTRODUCTION = """\
# Prompt injections: which text made the agent call this tool?

Transcripts from [AgentDojo](https://github.com/ethz-spylab/agentdojo) (arXiv:2406.13352): a user's task, its
ground-truth calls and their results, of which one holds an instruction of the attacker, and then the attacker's call.
The call is put into the model's mouth (teacher-forced): these small models would not make it by themselves. Each
method explains it, and is asked for the injected text. Much of a call is the form that all calls have, and its tool's
name stands in the list of tools as well, so the argument whose value stands in the injected text and nowhere else is
explained by itself too.

- Recovery at 10 %: how much of the injected text is among the tenth of the prompt's tokens with the highest scores.
- Message, sentence: share of the transcripts in which the unit with most mass (or most mass per token) is the injected
  one, that is, shares half of the shorter text with it.
- Seconds per case on one core of a shared machine, which only tell costs apart roughly.

Means with 95 % bootstrap intervals. Results of tools are cut to 480 characters, at most one call before and one after
the injected one is kept, and longer transcripts than told are left out. Models without a chat template read
`role: text`. `recommended` runs as in `blame`, without sinks.

Read of seed 0, prompts of at most 400 tokens, 10 transcripts on SmolLM2 and 7 on Gemma: for an argument, ask for the
argument. The first sentence by mass is then the injected one in 8 of 8 and 5 of 6 transcripts with `recommended`, the
first by density in all with `flashtrace`, at a quarter of the cost; the first message by mass is the injected one
in all by every method but chance and, once, mean attention. For the whole call no method tells much more than the
length of the messages does (see random). Leaving one message out finds the message too, and cannot tell its sentences.
The samples are few: look at the intervals.

Recovery stays below the .40 published for FlashTrace on AgentDojo, which is from a larger model, other transcripts and
another set-up, so that it says where the scale is and is no comparison. All of the injected text counts as evidence
here, its call for attention too. Written by `python -m flashtrace_plugin.evaluation.forensics` on {date}.
"""


if __name__ == "__main__":
    typer.run(_measure)
