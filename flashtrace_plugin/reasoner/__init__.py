"""A small trained reasoning model in the package, to check explanations against known evidence without a download.

model, tokenizer = reasoner.load()
sample = tasks.make("variable_tracking", 7, hops=4, chains=3, length=128)
text = reasoner.answer(model, tokenizer, sample)      # "<think> … </think> 84"
reasoner.final_answer(text) == sample.answer
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.tasks import Sample
from flashtrace_plugin.evaluation.tasks.vocabulary import THINK_CLOSE
from flashtrace_plugin.messages import check_encodable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["answer", "check_words", "final_answer", "load", "path"]


def path() -> Path:
    """The folder of the weights and the tokenizer, for ``AutoModelForCausalLM.from_pretrained`` and the like."""
    return Path(__file__).parent / "weights"


def load(weights: Path | None = None) -> "tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]":
    """The model in float32 on the CPU, in evaluation mode, and its tokenizer; nothing is downloaded.

    ``weights`` is a folder written by ``python -m flashtrace_plugin.reasoner.train``, instead of the bundled one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = path() if weights is None else weights
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def check_words(tokenizer: Any, text: str) -> None:
    """Raises InputError for words that the bundled model does not know: it would explain an answer to another text."""
    check_encodable("text", text)
    known = tokenizer.get_vocab()
    unknown = list(dict.fromkeys(word for word in text.split() if word not in known))
    if unknown:
        raise InputError(
            f"the bundled model does not know {', '.join(map(repr, unknown[:5]))}"
            f"{f' and {len(unknown) - 5} more words' if len(unknown) > 5 else ''}: it speaks statements about v0 to "
            "v99 and numbers 0 to 99, with spaces between words and a question at the end, such as 'v12 v7 ; v3 41 ; "
            "v7 84 ; ? v12 think'. For other texts choose a model: --model, or from_pretrained"
        )


def answer(model: Any, tokenizer: Any, sample: Sample | str) -> str:
    """The text that the model generates greedily behind a sample's prompt (or a prompt), without the end token."""
    prompt = sample if isinstance(sample, str) else sample.prompt
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def final_answer(generation: str) -> str:
    """What stands behind the reasoning: all of the text if there is none."""
    return generation.rpartition(THINK_CLOSE)[2].strip()
