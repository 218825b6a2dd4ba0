"""``python -m flashtrace_plugin.demo``: a question in four steps, answered by the bundled model, explained in Inseq.

The task tells which tokens of the prompt are the evidence, so the explanation can be checked.
"""

from __future__ import annotations

import argparse
import textwrap
from math import log
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flashtrace_plugin import Recommended, reasoner
from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.cli.output import use_any_terminal
from flashtrace_plugin.evaluation import tasks
from flashtrace_plugin.evaluation.tasks import Sample
from flashtrace_plugin.report.marks import percent

HOPS = 4
SEED = 1
_SOURCES = 5
LENGTH = 128
_CALL = f"""\
import flashtrace_inseq, inseq
from flashtrace_plugin import reasoner
model = inseq.load_model(str(reasoner.path()), "recommended")
out = model.attribute(prompt, hops={HOPS})
"""
"""What :func:`explained` does, printed for the reader."""


def main(arguments: list[str] | None = None) -> None:
    """Asks, explains, prints, and writes the report."""
    parser = argparse.ArgumentParser(
        prog="python -m flashtrace_plugin.demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=SEED, help="which question (default: %(default)s)")
    parser.add_argument("--html", type=Path, default=Path("demo.html"), help="the report (default: %(default)s)")
    given = parser.parse_args(arguments)
    sample = tasks.make("variable_tracking", given.seed, hops=HOPS, chains=3, length=LENGTH)
    use_any_terminal()
    console = Console(highlight=False, markup=False)
    attribution = explained(sample)
    tell(sample, attribution, console)
    console.print("\n\nThe same in Python, through Inseq", style="bold")
    console.print(f"\n{textwrap.indent(_CALL, '  ')}", style="dim")
    _write_report(sample, attribution, given.html)
    console.print(f"Report: {given.html.absolute().as_uri()}", soft_wrap=True)


def explained(sample: Sample) -> Attribution:
    """Lets the reasoner answer and explains the answer, both through Inseq."""
    import flashtrace_inseq  # first, because it says what to install where Inseq is missing

    # isort: split
    import inseq
    from transformers import logging

    logging.disable_progress_bar()
    model: Any = inseq.load_model(str(reasoner.path()), "recommended")
    out = model.attribute(sample.prompt, hops=HOPS, show_progress=False)
    return flashtrace_inseq.attributions(out)[0]


def tell(sample: Sample, attribution: Attribution, console: Console) -> None:
    """Prints question, thinking, answer, the sentences that led to it, and how that was checked."""
    thinking = "nothing" if attribution.reasoning is None else attribution.text(attribution.reasoning)
    answer = attribution.text(attribution.target).strip()
    verdict = "right" if answer == sample.answer else f"wrong, it is {sample.answer}"
    for heading, text in (
        (_STORY, sample.prompt),
        ("The model thought", thinking),
        ("and answered", f"{answer} ({verdict})"),
    ):
        console.print(textwrap.fill(heading, 78), style="bold")
        console.print(textwrap.indent(textwrap.fill(text.strip(), 76), "  "), "\n", sep="")
    console.print(f"Which sentences of the text made it answer {answer}?", style="bold")
    console.print("\n".join(sources(sample, attribution)), "\n", sep="")
    console.print("How do we know?", style="bold")
    for text in (found(sample, attribution), what_removal_does(attribution)):
        console.print(textwrap.indent(textwrap.fill(text, 76), "  "), "\n", sep="")


_STORY = (
    "A small language model read this text. A statement such as 'v8 12' says that v8 is 12, and other sentences are "
    "noise. The question at the end is what a variable stands for; it takes four statements, one after the other, to "
    "tell."
)


def sources(sample: Sample, attribution: Attribution) -> list[str]:
    """A line for each of the sentences with the largest shares, those of the chain marked."""
    best = attribution.by("step").top(_SOURCES)
    return [
        f"  {percent(one.share):>8s}  {'█' * max(1, round(20 * one.share)):20s}  {one.unit.text}"
        f"{'  (needed)' if one.unit.text.rstrip(' ;') in sample.evidence_text else ''}"
        for one in best
    ]


def what_removal_does(attribution: Attribution) -> str:
    """What happens to the probability of what the model wrote without its sources, against random ones."""
    result = attribution.verify(reasoner.load()[0], unit="step")
    count, drop, random = len(result.named[-1]), float(result.drop[-1]), result.random_drop[:, -1]
    held = "so these are what it drew on" if result.holds else "so this explanation does not hold"
    return (
        f"By trying it out. Without the {count} sentences that have most, what the model wrote becomes {_times(drop)} "
        f"less likely. Without as many words of other sentences, drawn at random {len(random)} times, it is "
        f"{_times(float(random.min()))} to {_times(float(random.max()))}, {held}."
    )


def _times(nats: float) -> str:
    """A drop of log P as a factor."""
    tens = nats / log(10)
    return f"{10**tens:.3g} times" if tens < 3 else f"10^{tens:.0f} times"


def statements(sample: Sample) -> tuple[list[list[int]], list[list[int]]]:
    """Positions of each statement of the chain, in its order, and of each other statement; closing marks included.

    A decoder knows a statement only when it is complete, so what it draws on is often the mark that closes it.
    """
    others: list[list[int]] = []
    for i in sample.distractors:
        if others and others[-1][-1] == i - 1:
            others[-1].append(i)
        else:
            others.append([i])
    chain = [list(step) for step in sample.steps]
    return [[*s, s[-1] + 1] for s in chain], [[*s, s[-1] + 1] for s in others]


def marks(sample: Sample) -> dict[int, str]:
    """Position -> the step of the chain that its statement is."""
    return {i: f"step {n}" for n, statement in enumerate(statements(sample)[0], 1) for i in statement}


def found(sample: Sample, attribution: Attribution) -> str:
    """Where the statements that the answer follows from stand among all sentences of the prompt."""
    ranked = [one.unit.text.rstrip(" ;") for one in attribution.by("step").top(len(attribution.prompt))]
    ranks = [ranked.index(text) + 1 for text in reversed(sample.evidence_text)]
    chain, others = statements(sample)
    mass = [float(attribution.scores[[i for s in part for i in s]].sum()) for part in (chain, others)]
    return (
        f"The text was made so that the answer follows from {len(chain)} statements: "
        f"{', '.join(sample.evidence_text)}. From the last to the first they are number "
        f"{', '.join(map(str, ranks))} of the {len(ranked)} sentences. Of what statements have, these have "
        f"{percent(mass[0] / sum(mass))}; by chance it would be {percent(len(chain) / (len(chain) + len(others)))}."
    )


def _write_report(sample: Sample, attribution: Attribution, path: Path) -> None:
    """The report by statements, with the evidence marked, and with the graph of what every step rests on."""
    from flashtrace_plugin.report.html import as_html

    graph = Recommended(*reasoner.load()).graph_ids(
        torch.tensor(attribution.token_ids),
        prompt_length=attribution.prompt.stop,
        target=attribution.target,
        reasoning=attribution.reasoning,
        unit="step",
    )
    page = as_html(attribution, evidence=marks(sample), unit="step", graph=graph)
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
