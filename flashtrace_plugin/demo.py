"""``python -m flashtrace_plugin.demo``: a question in four steps, answered by the bundled model, explained in Inseq.

The task tells which tokens of the prompt are the evidence, so the explanation can be checked.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from flashtrace_plugin import reasoner
from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.evaluation import tasks
from flashtrace_plugin.evaluation.tasks import Sample
from flashtrace_plugin.report.flow import hop_rows
from flashtrace_plugin.report.marks import percent

HOPS = 4
SEED = 0
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
    console = Console(highlight=False, markup=False)
    attribution = explained(sample)
    console.print(_CALL, style="dim")
    tell(sample, attribution, console)
    _write_report(sample, attribution, given.html)
    console.print(f"\nReport: {given.html.absolute().as_uri()}", soft_wrap=True)


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
    """Prints question, reasoning, answer, tokens, hops, and how much of the evidence was found."""
    from flashtrace_plugin.report import terminal

    reasoning = "none" if attribution.reasoning is None else attribution.text(attribution.reasoning)
    answer = attribution.text(attribution.target).strip()
    verdict = "right" if answer == sample.answer else f"wrong, it is {sample.answer}"
    for name, text in (("Prompt", sample.prompt), ("Reasoning", reasoning), ("Answer", f"{answer} ({verdict})")):
        console.print(name, style="bold")
        console.print(textwrap.indent(textwrap.fill(text.strip(), 76), "  "), "\n", sep="")
    terminal.print_attribution(attribution, top=strongest(attribution), evidence=marks(sample), console=console)
    console.print()
    console.print(moved(attribution), "\n", sep="")
    console.print(found(sample, attribution))


def strongest(attribution: Attribution) -> int:
    """A tenth of the prompt, rounded up: the tokens that the recovery rate looks at."""
    return -(-len(attribution.prompt) // 10)


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


def moved(attribution: Attribution) -> str:
    """How much mass moved from the reasoning to the prompt."""
    rows = [row for row in hop_rows(attribution) if row.shares]
    return (
        f"Directly, the answer draws {percent(rows[0].shares['prompt'])} of its mass from the prompt and "
        f"{percent(rows[0].shares['reasoning'])} from the reasoning. {len(rows) - 1} hops through the reasoning move "
        f"that on to the prompt: they bring {percent(1.0 - rows[0].score)} of the prompt's score."
    )


def found(sample: Sample, attribution: Attribution) -> str:
    """Whether the strongest tokens are the evidence, with the hops and without them."""
    from flashtrace_plugin.evaluation.metrics import recovery

    chain, others = statements(sample)
    prompt, count = attribution.prompt, strongest(attribution)
    direct = attribution.hop_scores[0, prompt.slice]

    def touched(scores: Tensor, among: list[list[int]]) -> str:
        top = set(scores.argsort(descending=True, stable=True)[:count].tolist())
        return f"{sum(not top.isdisjoint(s) for s in among)} of {len(among)}"

    def share(scores: Tensor) -> str:
        mass = [float(scores[[i for s in part for i in s]].sum()) for part in (chain, others)]
        return percent(mass[0] / sum(mass))

    return (
        f"The answer follows from {len(chain)} statements: {'; '.join(sample.evidence_text)}. The {count} strongest "
        f"tokens of the prompt (10 %) touch {touched(attribution.scores, chain)} of them and "
        f"{touched(attribution.scores, others)} others; without the hops it is {touched(direct, chain)} and "
        f"{touched(direct, others)}. Of the score on statements, {share(attribution.scores)} lies on these, without "
        f"the hops {share(direct)}, by chance {percent(len(chain) / (len(chain) + len(others)))}. Of the "
        f"{len(sample.evidence)} keys and values themselves the {count} tokens hold "
        f"{recovery(attribution.scores, sample.evidence):.0%}, without the hops "
        f"{recovery(direct, sample.evidence):.0%}, by chance 10 %."
    )


def _write_report(sample: Sample, attribution: Attribution, path: Path) -> None:
    """The report, with the evidence marked."""
    from flashtrace_plugin.report.html import as_html

    path.write_text(as_html(attribution, evidence=marks(sample)), encoding="utf-8")


if __name__ == "__main__":
    main()
