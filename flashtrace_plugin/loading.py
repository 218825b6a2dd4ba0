"""Loading a model by name, and letting it write: what the command line needs around a method."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
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
    """A causal language model in evaluation mode, and its tokenizer: what the command line loads.

    name:              a folder, a name on the Hugging Face hub, a GGUF file, or "reasoner" for the bundled model
    dtype:             "auto" (as stored; float32 for GGUF), "float32", "bfloat16" or "float16"
    device:            as torch names it; by default an accelerator if there is one
    trust_remote_code: runs code that comes with the model
    allow_pickle:      also reads weights that are not safetensors; such files can run code

    Every weight comes from the files. Raises InputError for a model that cannot be loaded, with the name of the file
    that is damaged or of the weights that are missing or do not fit, for a tokenizer that is none or of another model,
    and for a device that is not there.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    where = checked_device(device)
    path, file = _source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **file, trust_remote_code=trust_remote_code)
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            **file,
            **_unpacked(file),
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except (*_UNREADABLE, SafetensorError, StrictDataclassError) as error:
        raise InputError(
            f"cannot load the model {name!r}: {shorten(str(error) or type(error).__name__, 300)} (give a folder with "
            "a causal language model, as safetensors unless pickled weights are allowed, and its tokenizer; a GGUF "
            "file; or a name on the Hugging Face hub)"
        ) from error
    _check_weights(name, model, found)
    _check_tokenizer(name, model, tokenizer)
    if file:
        model.config.name_or_path = str(Path(path) / file["gguf_file"])
    return model.to(where).eval(), tokenizer


_UNREADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, ImportError),
    *(EOFError, struct.error, pickle.UnpicklingError),
)
"""What transformers raises for files that are no model, by what is wrong with them; others are told as they are."""


def _check_weights(name: str, model: Any, found: Mapping[str, Collection[Any]]) -> None:
    """Raises InputError unless the files hold the model's weights: transformers makes up what they lack.

    found: what transformers tells of loading; weights that are tied and buffers that are computed are not missing
    """
    if found["missing_keys"]:
        raise InputError(
            f"the model {name!r} lacks {len(found['missing_keys'])} of the model's weights "
            f"({_some(found['missing_keys'])}), which would be random numbers; its files are not complete, or its "
            "config.json is that of another model"
        )
    if found["mismatched_keys"]:
        shapes = (f"{key} {list(a)} in the files, {list(b)} in the model" for key, a, b in found["mismatched_keys"])
        raise InputError(
            f"weights of the model {name!r} have other shapes than its config.json says: {_some(shapes)}; its files "
            "belong to different models"
        )
    left_out = [key for key in found["unexpected_keys"] if _belongs(key, model)]
    if left_out:
        raise InputError(
            f"the files of the model {name!r} hold weights that its config.json has no place for ({_some(left_out)}), "
            "so what it describes is another model"
        )


def _belongs(key: str, model: Any) -> bool:
    """Whether a weight that was left out is one more of a layer's own, or of one more block. Parts that the model has
    not at all, such as an image encoder or heads that predict further tokens, change nothing in what it computes."""
    from torch import nn

    owner = model
    *path, _ = key.split(".")
    for part in path:
        if not hasattr(owner, part):
            return isinstance(owner, nn.ModuleList)
        owner = getattr(owner, part)
    return isinstance(owner, nn.Module) and next(owner.parameters(recurse=False), None) is not None


def _check_tokenizer(name: str, model: Any, tokenizer: Any) -> None:
    """Raises InputError for a tokenizer made of nothing, as some are without their files, or with too many tokens.

    Added tokens may lie outside the model's vocabulary: a text that has them is refused.
    """
    added = {token.content for token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).values()}
    if tokenizer.get_vocab().keys() <= added | set(tokenizer.all_special_tokens):
        raise InputError(
            f"the model {name!r} has no tokenizer: {type(tokenizer).__name__} knows only special tokens; put the "
            "tokenizer's files beside the weights"
        )
    known, rows = tokenizer.vocab_size, model.get_input_embeddings().weight.shape[0]
    if known > rows:
        raise InputError(
            f"the tokenizer knows {known} tokens and the model has {rows}, so the tokenizer's files in {name!r} are "
            "those of another model"
        )


def _some(names: Iterable[str]) -> str:
    """The first few of many."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


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
    """The name itself; raises InputError for a folder that is not there or has damaged files."""
    path = Path(name).expanduser()
    if path.is_file():
        raise InputError(f"cannot load the model {name!r}: it is a file; pass its folder, a hub name or a .gguf file")
    if _is_lost(name):
        raise InputError(f"cannot load the model {name!r}: there is no such folder")
    if not path.is_dir():
        return name
    for file in sorted(path.glob("*.safetensors")):
        _check_safetensors(file)
    found = {file.name: _read_json(file) for file in map(path.joinpath, _DESCRIPTIONS) if file.is_file()}
    if "adapter_config.json" in found:
        _check_base(name, found["adapter_config.json"].get("base_model_name_or_path"))
    return str(path)


_DESCRIPTIONS = (
    *("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)


def _is_lost(name: str) -> bool:
    """Whether a name can only be a folder, and is not there."""
    path = Path(name).expanduser()
    return (path.is_absolute() or name.startswith(".")) and not path.is_dir()


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _damaged(file, error) from error
    if not isinstance(found, dict):
        raise _damaged(file, f"it holds a {type(found).__name__}, not an object")
    return found


def _damaged(file: Path, why: object) -> InputError:
    return InputError(f"{file} is damaged ({why}); download or copy it again")


def _check_base(name: str, base: str | None) -> None:
    if base is not None and not _is_lost(base):
        return
    told = "that names no base model" if base is None else f"of {base!r}, which is not there"
    raise InputError(
        f"the model {name!r} is an adapter {told}; correct base_model_name_or_path in its adapter_config.json, or in "
        "Python load the base and pass a PeftModel"
    )


def checked_device(name: str | None) -> str:
    """The device to use. Raises InputError for one that torch does not know or that is not there."""
    import torch

    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = ["cpu"] if own is None else [own.type, "cpu"]
    kind = here[0] if name is None else name.partition(":")[0]
    if kind not in here:
        raise InputError(f"device {name!r} is not available; available here: {', '.join(here)}")
    return name or kind


def write(model: Any, tokenizer: Any, prompt: Prompt, max_new_tokens: int, **generating: Any) -> TokenizedText:
    """The prompt with what the model writes after it, greedily; tokens that end a text are left out.

    generating: what else the model's ``generate`` takes, such as a streamer

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
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **greedy, **generating)
    ids = output[0].cpu()
    ends = end_ids(tokenizer, model.config.get_text_config(), model.generation_config)
    stop = written_length(ids.tolist(), start, ends)
    if len(ids) == start or int(ids[start]) in ends:
        raise InputError(f"the model ends the text right after the prompt {text[-40:]!r}; give a generation instead")
    return from_ids(tokenizer, ids[:stop], start, ends)
