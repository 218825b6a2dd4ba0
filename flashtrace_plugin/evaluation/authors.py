"""The authors' package (flashtrace 0.1.1), for parity tests and side-by-side timings; nothing else here needs it.

Only its ``core.py`` is loaded, by path from the installed files: importing the package pulls in plotting and
language-processing libraries that the computation does not use.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@cache
def _core() -> ModuleType:
    """Their ``flashtrace/core.py`` as a module."""
    try:
        path = distribution("flashtrace").locate_file("flashtrace/core.py")
    except PackageNotFoundError as error:
        raise ImportError("parity needs the authors' package: pip install --no-deps flashtrace==0.1.1") from error
    spec = importlib.util.spec_from_file_location("authors_flashtrace_core", str(path))
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded; pip install --no-deps flashtrace==0.1.1")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def authors_flashtrace(
    model: Any, input_ids: Tensor, target: tuple[int, int], reasoning: tuple[int, int], hops: int, chunk: int = 128
) -> Any:
    """Their ``compute_multi_hop_ifr`` with attention recomputed per layer, forward pass included.

    input_ids:         [1, N]
    target, reasoning: half-open here, inclusive there
    chunk:             rows that they recompute attention for at a time
    result:            theirs, with ``raw_attributions`` by hop and ``observation["sum"]`` [N]
    """
    core = _core()
    meta = core.extract_model_metadata(model)
    cache, hooks = core.attach_hooks(meta.layers, model.dtype)
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return core.compute_multi_hop_ifr(
        sink_start=target[0],
        sink_end=target[1] - 1,
        thinking_span=(reasoning[0], reasoning[1] - 1),
        n_hops=hops,
        cache=cache,
        attentions=None,
        weight_pack=core.build_weight_pack(meta, model.dtype),
        params=_parameters(core, meta, model, input_ids.shape[1], chunk),
        rotary_emb=meta.rotary_emb,
    )


def _parameters(core: ModuleType, meta: Any, model: Any, length: int, chunk: int) -> Any:
    return core.IFRParameters(
        n_layers=meta.n_layers,
        n_heads_q=meta.n_heads_q,
        n_kv_heads=meta.n_kv_heads,
        head_dim=meta.head_dim,
        group_size=meta.group_size,
        d_model=meta.d_model,
        sequence_length=length,
        model_dtype=model.dtype,
        chunk_tokens=chunk,
        sink_chunk_tokens=chunk,
    )
