"""Loading a model by name, and letting it write: what the command line needs around a method."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.text import Prompt, TokenizedText, end_ids, from_ids, render, written_length

REASONER = "reasoner"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    name:              a folder, a name on the Hugging Face hub, a GGUF file, or "reasoner" for the bundled model
    dtype:             "auto" (as stored; float32 for GGUF), "float32", "bfloat16" or "float16"
    device:            as torch names it; by default an accelerator if there is one
    trust_remote_code: runs code that comes with the model
    allow_pickle:      also reads weights that are not safetensors; such files can run code

    Raises InputError for a model that cannot be loaded and for a device that is not there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    where = checked_device(device)
    path, file = _source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **file, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            **file,
            **_unpacked(file),
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
        )
    except _UNREADABLE as error:
        raise InputError(
            f"cannot load the model {name!r}: {str(error).strip().splitlines()[0]} (give a folder with a causal "
            "language model and its tokenizer, a GGUF file, or a name on the Hugging Face hub)"
        ) from error
    if file:
        model.config.name_or_path = str(Path(path) / file["gguf_file"])
    return model.to(where).eval(), tokenizer


_UNREADABLE = (OSError, ValueError, OverflowError, struct.error)
"""What transformers raises for a model that is not one; the last two come from damaged GGUF files."""


def _source(name: str) -> tuple[str | Path, dict[str, str]]:
    """Where the model is, and the file in that folder if one file is all of it."""
    if name == REASONER:
        return _bundled(), {}
    if name.lower().endswith(".gguf"):
        path = _checked_gguf(name)
        return path.parent, {"gguf_file": path.name}
    return _checked_folder(name), {}


def _checked_gguf(name: str) -> Path:
    """The file. Raises InputError if it is not there or the package that reads it is missing."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"cannot load the model {name!r}: there is no such file")
    if find_spec("gguf") is None:
        raise InputError(
            f"cannot load the model {name!r}: GGUF files need the package gguf; pip install 'flashtrace-plugin[gguf]'"
        )
    return path


def _unpacked(file: dict[str, str]) -> dict[str, Any]:
    """Asks for dense weights: kernels for packed ones have no second derivative. Older transformers have no other."""
    import transformers

    if not file or not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _bundled() -> Path:
    from flashtrace_plugin import reasoner

    return reasoner.path()


def _checked_folder(name: str) -> str:
    """The name itself; raises InputError for one that can only be a folder and is not there."""
    path = Path(name).expanduser()
    if (path.is_absolute() or name.startswith(".")) and not path.is_dir():
        raise InputError(f"cannot load the model {name!r}: there is no such folder")
    return str(path) if path.is_dir() else name


def checked_device(name: str | None) -> str:
    """The device to use. Raises InputError for one that torch does not know or that is not there."""
    import torch

    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = ["cpu"] if own is None else [own.type, "cpu"]
    kind = here[0] if name is None else name.partition(":")[0]
    if kind not in here:
        raise InputError(f"device {name!r} is not available; available here: {', '.join(here)}")
    return name or kind


def write(model: Any, tokenizer: Any, prompt: Prompt, max_new_tokens: int) -> TokenizedText:
    """The prompt with what the model writes after it, greedily; tokens that end a text are left out.

    Keeps the ids of the generation, which need not be those that its text would be tokenized to.
    Raises InputError if the model writes nothing.
    """
    import torch

    if not prompt:
        raise InputError("the prompt is empty; there is nothing to generate from")
    text, special = render(tokenizer, prompt)
    encoded = tokenizer(text, add_special_tokens=special, return_tensors="pt")
    inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **greedy)
    ids = output[0].cpu()
    ends = end_ids(tokenizer, model.config.get_text_config(), model.generation_config)
    stop = written_length(ids.tolist(), start, ends)
    if len(ids) == start or int(ids[start]) in ends:
        raise InputError(f"the model ends the text right after the prompt {text[-40:]!r}; give a generation instead")
    return from_ids(tokenizer, ids[:stop], start, ends)
