"""What a caller may have switched on around a call, or around loading the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from transformers import PreTrainedModel

from flashtrace_plugin.errors import UnsupportedModelError


@contextmanager
def without_autocast() -> Iterator[dict[str, str]]:
    """Switches ``torch.autocast`` off while inside, and gives what to note in the settings of a result.

    Under autocast the model rounds its activations to half precision here and there, while its residual stream stays
    in float32. Parts read from it then no longer add up to float32's digits, so that nothing could be proven.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    active = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        for kind in active:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield {"autocast": "switched off for the call"} if active else {}


@contextmanager
def same_function_modes() -> Iterator[None]:
    """The thread's function modes are afterwards as before, also if an interrupt met torch while it changed them."""
    before = _get_current_function_mode_stack()
    try:
        yield
    finally:
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        for mode in before:
            torch._C._push_on_torch_function_stack(mode)


def check_layer_by_layer(model: PreTrainedModel, what: str) -> None:
    """Raises UnsupportedModelError for a model whose layers read more than the stream that enters them (Gemma 4)."""
    config = model.config.get_text_config()
    for name in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
        value = getattr(config, name, 0)
        if value:
            raise UnsupportedModelError(
                f"layers of {type(model).__name__} read keys and values of earlier layers, or the token ids again "
                f"({name}={value}), so what enters a layer does not determine what leaves it, and {what}; use "
                "FlashTrace, IFR or RecursiveAttribution"
            )


def check_differentiable(model: nn.Module, name: str) -> None:
    """Raises UnsupportedModelError for weights that no gradient can be computed with."""
    if any(p.is_inference() for p in model.parameters()):
        raise UnsupportedModelError(
            f"the weights of {name} were made in torch.inference_mode() and can have no backward pass; "
            "load the model outside of it"
        )
