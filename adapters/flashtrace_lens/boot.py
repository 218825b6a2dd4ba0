"""Bridges around models in memory, and the proof that a bridge computes what its Hugging Face model computes.

Closure cannot see a bridge whose attention is wrong but consistent: one that splits a fused projection in the wrong
order closes to rounding and has wrong logits. So the logits are compared once per bridge.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashtrace_lens.hooks import users_hooks
from flashtrace_plugin.errors import ClosureError, FlashTraceError, UnsupportedModelError
from flashtrace_plugin.models.guard import check_model
from flashtrace_plugin.models.view import view_of

_COMPARED_TOKENS = 128
"""Logits are compared on at most this many tokens."""

_ARCHITECTURES = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
"""Classes that TransformerLens knows under another spelling."""

_agreeing: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def bridge_for(model: PreTrainedModel, tokenizer: Any = None) -> Any:
    """A TransformerBridge around a model in memory, which stays as it is.

    Booting replaces submodules of the model it is given, so a shadow is booted: a copy of the module tree that
    shares every weight with ``model``. Fused query-key-value projections are split into copies by some families.

    Raises UnsupportedModelError if TransformerLens cannot boot the architecture, ClosureError if the bridge's logits
    differ from the model's.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = check_model(model)  # the base model of a PEFT wrapper, with its adapters inside
    shadow, name = _shadow(model), type(model).__name__
    try:
        bridge = build_bridge_from_module(
            shadow,
            _ARCHITECTURES.get(name, name),
            hf_config=shadow.config,
            tokenizer=None if tokenizer is None else _tokenizer(tokenizer),
            model_name=model.config.name_or_path or name,
        )
        verify(bridge, _probe(model), reference=model)
    except FlashTraceError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:  # what TransformerLens' adapters refuse with
        raise UnsupportedModelError(
            f"TransformerLens cannot boot {name}: {error}. FlashTrace(model) on the Hugging Face model itself may work"
        ) from error
    return bridge


def _shadow(model: PreTrainedModel) -> PreTrainedModel:
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    shadow = copy.deepcopy(model, shared).eval()
    # Only eager attention hands its pattern to the hook point in the families that TransformerLens does not recompute.
    shadow.set_attn_implementation("eager")
    return shadow


def _tokenizer(tokenizer: Any) -> Any:
    """A copy that TransformerLens takes as it is.

    It would otherwise load a second one by name, from the hub, that adds a beginning-of-sequence token of its own and
    so shifts every position. ``bridge.to_tokens(text)`` still adds the token unless told not to.
    """
    own = copy.deepcopy(tokenizer)
    own.init_kwargs = {"name_or_path": own.name_or_path, **own.init_kwargs, "add_bos_token": True}
    return own


def _probe(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    return torch.randint(weight.shape[0], (1, 32), generator=generator).to(weight.device)


def is_verified(bridge: Any) -> bool:
    """Whether the bridge's logits have been found equal to its Hugging Face model's."""
    return bridge in _agreeing


def verify(bridge: Any, input_ids: Tensor, *, reference: PreTrainedModel | None = None) -> None:
    """Compares the bridge's logits with the Hugging Face model's, once per bridge.

    reference: the untouched model; without it one is put together from the bridge's own weights

    A bridge under hooks is meant to differ, so the comparison waits for a call without any. It is left out where the
    weights are not plain tensors of the model's own layout (quantised, LoRA). Raises ClosureError with the gap.
    """
    if bridge in _agreeing or users_hooks(bridge):
        return
    model = plain_model(bridge) if reference is None else reference
    if model is None:
        return
    ids = input_ids[:, :_COMPARED_TOKENS]
    with torch.no_grad():
        ours = view_of(bridge)(ids, use_cache=False).float()
        theirs = view_of(model)(input_ids=ids, use_cache=False).logits.float()
    gap, bound = float((ours - theirs).abs().max() / theirs.abs().max()), _tolerance(ours, model)
    if not gap <= bound:
        raise ClosureError(
            f"the bridge gives other logits than the {type(model).__name__} it wraps (relative gap {gap:.1e}, bound "
            f"{bound:.0e}): TransformerLens translates this architecture differently, so an attribution of the bridge "
            "would explain another model. Use FlashTrace(model) on the Hugging Face model instead"
        )
    _agreeing.add(bridge)


def _tolerance(logits: Tensor, model: PreTrainedModel) -> float:
    # The two run different attention kernels, whose rounding differs.
    return {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2}.get(model.dtype, 5e-2)


def plain_model(bridge: Any) -> PreTrainedModel | None:
    """The Hugging Face model that a bridge wraps, rebuilt without the bridge; it shares the bridge's weights.

    result: None where a weight is not found under its own name and shape, as with quantised or LoRA layers, and for a
            model spread over several devices
    """
    wrapped = bridge.original_model
    if len({parameter.device for parameter in wrapped.parameters()}) != 1:
        return None
    config = copy.deepcopy(wrapped.config)
    config._attn_implementation = None
    with torch.device("meta"):
        plain = type(wrapped)._from_config(config, dtype=wrapped.dtype)
    for path, module in plain.named_modules():
        source = _below_bridge(wrapped, path)
        if path and type(source) is not type(module):
            return None
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                found = None if tensor is None else getattr(source, name, None)
                if tensor is not None and (not isinstance(found, Tensor) or found.shape != tensor.shape):
                    return None
                tensors[name] = found
    return plain.eval()


def _below_bridge(model: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path`` as Hugging Face made it, below whatever wraps it in the bridge."""
    module: Any = model
    for name in path.split(".") if path else ():
        module = _original(getattr(module, name, None))
    return module


def _original(module: Any) -> Any:
    while getattr(module, "original_component", None) is not None:
        module = module.original_component
    return module
