"""When has a sentence a source? Effects and masses of the documents for sentences that they state, and others.

python -m benchmarks.citations --model smollm2

Prints a line for each sentence: whether a document states it ("stated"), whether it is about a thing that a document
names ("about"), or is neither ("else"). docs/sources.md has the figures.
"""

from __future__ import annotations

from typing import Annotated

import typer

from flashtrace_plugin import cite
from flashtrace_plugin.evaluation import models
from flashtrace_plugin.evaluation.forensics import PLAIN_TEMPLATE

PROMPTS = [
    (
        {
            "visa": "A tourist visa for Norland costs 80 euros. It is valid for 90 days. Applications are filed at "
            "the consulate in Bremen.",
            "train": "The night train from Bremen to Norland leaves at 21:40. Tickets must be booked two days before.",
            "hotel": "The hotel Seeblick has 42 rooms. Breakfast is served from seven to ten.",
        },
        "What does the visa cost and when does the train leave?",
        [
            ("The visa costs 80 euros.", "visa"),
            ("The night train leaves at 21:40.", "train"),
            ("Norland is a popular place for a holiday.", "about"),
        ],
    ),
    (
        {
            "manual": "To reset the router, hold the red button for fifteen seconds. The lamp then turns green.",
            "warranty": "The warranty covers two years from the date of purchase. Water damage is excluded.",
            "prices": "The router costs 129 dollars. A second antenna costs 19 dollars.",
        },
        "How do I reset the router and how long is the warranty?",
        [
            ("Hold the red button for fifteen seconds.", "manual"),
            ("The warranty covers two years.", "warranty"),
            ("If you have any more questions, please let me know.", "else"),
        ],
    ),
    (
        {
            "bio": "Marta Ellingsen was born in Tromso in 1931. She studied chemistry and later became a "
            "glaciologist.",
            "prize": "In 1974 the Arven medal was awarded to Marta Ellingsen for her work on ice cores.",
            "ship": "The research ship Havdur was built in 1988 and has a crew of 31.",
        },
        "Who was Marta Ellingsen?",
        [
            ("She was born in Tromso in 1931.", "bio"),
            ("In 1974 she was awarded the Arven medal.", "prize"),
            ("Ice cores are long cylinders of ice drilled from a glacier.", "about"),
        ],
    ),
    (
        {
            "library": "The library is closed on Mondays. Members may borrow up to six books.",
            "pool": "The swimming pool opens at eight. Children pay half the price.",
            "museum": "The museum shows paintings by local artists.",
        },
        "What is the capital of France?",
        [("The capital of France is Paris.", "else"), ("Paris lies on the river Seine.", "else")],
    ),
    (
        {
            "bread": "Our bakery sells rye bread for 4 euros a loaf.",
            "hours": "The bakery is open from six in the morning until noon.",
            "cakes": "Cakes are made to order.",
        },
        "What is two plus two, and why is the sky blue?",
        [
            ("Two plus two is four.", "else"),
            ("The sky is blue because air scatters blue light more than red light.", "else"),
        ],
    ),
    (
        {
            "meeting": "The meeting on Friday is moved to room 214. Please bring your laptops.",
            "canteen": "The canteen offers lentil soup on Thursdays.",
            "parking": "Parking costs 3 euros a day.",
        },
        "Where is the meeting on Friday?",
        [("The meeting on Friday is in room 214.", "meeting"), ("Thank you for asking!", "else")],
    ),
]
"""Documents, question, and sentences of the answer with the document that states each."""


def main(
    model: Annotated[str, typer.Option(help="an English model of `evaluation.models`")] = "smollm2",
    method: Annotated[str, typer.Option(help="name of a method")] = "recommended",
) -> None:
    """Print effects and masses for sentences with a known source, and for others."""
    lm, tokenizer = models.load(model)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    typer.echo("| sentence | source | first | nats per token | relative mass | supported |\n" + "|---" * 6 + "|")
    for documents, question, sentences in PROMPTS:
        texts = "\n\n".join(f"[{name}]\n{text}" for name, text in documents.items())
        prompt = f"Answer the question with the documents.\n\n{texts}\n\nQuestion: {question}"
        answer = " ".join(text for text, _ in sentences)
        found = cite(lm, tokenizer, [{"role": "user", "content": prompt}], answer, documents=documents, method=method)
        for one, (text, source) in zip(found, sentences, strict=True):
            first = one.documents[0]
            lost = max(x for x in (one.effect, first.effect) if x is not None) / len(one.target)
            typer.echo(f"| {text} | {source} | {first.name} | {lost:.2f} | {one.relative:.2f} | {one.supported} |")


if __name__ == "__main__":
    typer.run(main)
