"""Checks before a model is run, and the promise to leave it as it was found."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import PreTrainedModel

from flashtrace_plugin.errors import InputError, UnsupportedModelError


def check_model(model: object) -> PreTrainedModel:
    """The model itself, if it is a decoder-only language model of transformers; the model inside a PEFT wrapper."""
    model = _unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a Hugging Face causal language model, got {type(model).__name__}; "
            "load one with transformers.AutoModelForCausalLM.from_pretrained(...)"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models can be attributed"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
        )
    _check_inputs(model)
    _check_in_memory(model)
    return model


def _check_inputs(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for a model that is not a function of token ids alone."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    others = [name for name in needed if name != "input_ids"]
    if others:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be run on tokens alone: it needs {', '.join(others)}; pass the language "
            "model inside it, such as model.language_model"
        )
    if not isinstance(getattr(model.get_input_embeddings(), "weight", None), Tensor):
        raise UnsupportedModelError(f"{type(model).__name__} has no table of token embeddings")


def _check_in_memory(model: PreTrainedModel) -> None:
    """Weights on the meta device are numbers only where accelerate's hooks bring them in."""
    empty = [name for name, weight in model.named_parameters() if weight.device.type == "meta"]
    if empty and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError(
            f"{len(empty)} weights of {type(model).__name__} have no memory: {empty[0]} and others are on the meta "
            "device, so there is nothing to attribute; load the model with from_pretrained(...)"
        )


def _unwrapped(model: Any) -> object:
    """The model inside wrappers: torch.compile keeps it as it was, and PEFT puts LoRA and its kin into its modules."""
    if isinstance(model, OptimizedModule):
        return _unwrapped(model._orig_mod)
    if not hasattr(type(model), "get_base_model"):
        return model
    virtual = [name for name, config in model.peft_config.items() if config.is_prompt_learning]
    if virtual:
        raise UnsupportedModelError(
            f"the PEFT adapter {virtual[0]!r} puts learned vectors before the prompt, which no token stands for; "
            "prompt and prefix tuning cannot be attributed, LoRA and its kin can"
        )
    return _unwrapped(model.get_base_model())


def check_ids(model: PreTrainedModel, input_ids: Tensor, *, padded: bool = False) -> Tensor:
    """The ids as [1, N] on the model's device. Raises InputError with the value and its bound.

    padded: the text may begin with padding ids, which are then read like any other
    """
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise InputError(f"input_ids must be integers, got {input_ids.dtype}")
    if (input_ids.dim() == 2 and input_ids.shape[0] != 1) or input_ids.dim() not in (1, 2):
        raise InputError(
            f"input_ids must be [N] or [1, N], got {list(input_ids.shape)}; pass several sequences to attribute_batch"
        )
    ids = input_ids.reshape(1, -1).long()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    bad = ids[(ids < 0) | (ids >= vocabulary)]
    if len(bad):
        raise InputError(
            f"token id {int(bad[0])} is outside the vocabulary 0..{vocabulary - 1}; is this the model's tokenizer?"
        )
    if not padded:
        _check_unpadded(model, ids[0])
    limit = _position_limit(model)
    if limit is not None and ids.shape[1] > limit:
        raise InputError(f"the sequence has {ids.shape[1]} tokens, the model has {limit} positions; shorten the text")
    device = model.get_input_embeddings().weight.device
    return ids.cpu() if device.type == "meta" else ids.to(device)  # offloading moves what a module is given


def _check_unpadded(model: PreTrainedModel, ids: Tensor) -> None:
    """Left padding would be read as text. A padding id that also begins or ends texts is taken for the latter."""
    config = model.config.get_text_config()
    # Families of long standing have configurations without these.
    pad, *others = (getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    if pad is None or any(pad in (other if isinstance(other, list) else [other]) for other in others):
        return
    padding = int((ids != pad).cumsum(0).eq(0).sum())
    if padding:
        raise InputError(
            f"the sequence begins with {padding} padding tokens (id {pad}); pass one sequence without padding: "
            "input_ids[attention_mask.bool()]"
        )


def _position_limit(model: PreTrainedModel) -> int | None:
    """Number of positions the model was made for, where the configuration states one."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(config, name, None)
        if limit is not None and limit > 0:  # XLNet, which has no limit, says -1
            return int(limit)
    return None


_evaluated: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""Modules that were in training mode, and how many calls, of any thread, want them in evaluation mode just now."""

_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches every module to evaluation, so that dropout cannot make the numbers random, and back again."""
    with _lock:
        training = [m for m in model.modules() if m.training or m in _evaluated]
        for module in training:
            _evaluated[module] = _evaluated.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in training:
                _evaluated[module] -= 1
                if not _evaluated[module]:
                    del _evaluated[module]
                    module.training = True
