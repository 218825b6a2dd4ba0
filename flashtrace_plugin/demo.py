"""``python -m flashtrace_plugin.demo``: a question in four steps, answered by the bundled model, explained in Inseq.

The task tells which tokens of the prompt are the evidence, so the explanation can be checked.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console

from flashtrace_plugin import reasoner, tasks
from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.report.flow import hop_rows
from flashtrace_plugin.report.marks import percent
from flashtrace_plugin.tasks import Sample

HOPS = 4
SEED = 0
LENGTH = 128


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
    attribution = explain(sample)
    tell(sample, attribution, console)
    write_report(sample, attribution, given.html)
    console.print(f"\nReport: {given.html.absolute().as_uri()}", soft_wrap=True)


def explain(sample: Sample) -> Attribution:
    """Lets the reasoner answer and explains the answer, both through Inseq."""
    import inseq
    from transformers import logging

    import flashtrace_inseq

    logging.disable_progress_bar()
    model: Any = inseq.load_model(str(reasoner.path()), "flashtrace")
    out = model.attribute(sample.prompt, hops=HOPS, positions="predicting", show_progress=False)
    return flashtrace_inseq.attributions(out)[0]


def tell(sample: Sample, attribution: Attribution, console: Console) -> None:
    """Prints question, reasoning, answer, tokens, hops, and how much of the evidence was found."""
    from flashtrace_plugin import terminal

    reasoning = "none" if attribution.reasoning is None else attribution.text(attribution.reasoning)
    answer = attribution.text(attribution.target).strip()
    verdict = "right" if answer == sample.answer else f"wrong, it is {sample.answer}"
    for name, text in (("Prompt", sample.prompt), ("Reasoning", reasoning), ("Answer", f"{answer} ({verdict})")):
        console.print(name, style="bold")
        console.print(textwrap.indent(textwrap.fill(text.strip(), 76), "  "), "\n", sep="")
    terminal.show(attribution, top=len(sample.evidence), evidence=set(sample.evidence), console=console)
    console.print()
    console.print(moved(attribution))
    console.print(found(sample, attribution))


def moved(attribution: Attribution) -> str:
    """How much mass moved from the reasoning to the prompt."""
    rows = [row for row in hop_rows(attribution) if row.shares]
    rest = 1.0 - rows[0].score
    return (
        f"Directly, the answer draws {percent(rows[0].shares['prompt'])} of its mass from the prompt and "
        f"{percent(rows[0].shares['reasoning'])} from the reasoning. Following the reasoning through "
        f"{len(rows) - 1} hops moves that to the prompt: {percent(rest)} of the prompt's score came this way."
    )


def found(sample: Sample, attribution: Attribution) -> str:
    """How much of the evidence the strongest tokens hold, against the direct hop alone and against chance."""
    from flashtrace_plugin.metrics import recovery

    gold, prompt = sample.evidence, attribution.prompt
    count = -(-len(prompt) // 10)
    through, direct = recovery(attribution.scores, gold), recovery(attribution.hop_scores[0, prompt.slice], gold)
    return (
        f"The evidence, {'; '.join(sample.evidence_text)}, is {len(gold)} of {len(prompt)} prompt tokens. The {count} "
        f"strongest tokens (10 %) hold {through:.0%} of it; without the reasoning {direct:.0%}, and by chance 10 %."
    )


def write_report(sample: Sample, attribution: Attribution, path: Path) -> None:
    """The report, with the evidence marked."""
    from flashtrace_plugin.report.html import render

    path.write_text(render(attribution, evidence=sample.evidence), encoding="utf-8")


if __name__ == "__main__":
    main()
