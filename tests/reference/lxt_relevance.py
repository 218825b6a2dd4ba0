"""Relevance by the authors' package lxt, in a process of its own: lxt rewrites the classes of transformers for good.

    python -m tests.reference.lxt_relevance variant file

saves {case: relevance [N] of the embeddings, float32}, by the recipe of lxt's README: gradient times input of the
chosen logit on the patched model.

variant: "attn"     lxt's table `attnLRP`
         "cp"       lxt's table `cp_LRP`
         "cp_gate"  the same, with the gated MLP of `attnLRP`

lxt 2.1 was written for transformers 4. Two things around its rules are put right here, none of them a rule: its index
of families imports ones that are gone (BERT's pruning) or need torchvision, so a family's table is imported by itself;
and it leaves a plain dict where transformers 5 asks an AttentionInterface for its kernels.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from tests.tiny import random_ids, tiny

IDS = random_ids(24, seed=6)
TARGET = 20
"""The token whose logit, at the position before it, is explained."""


CASES = {family: (family, {}) for family in ("llama", "qwen2", "qwen3", "gemma3_text", "gpt2")} | {
    "gemma3, capped": ("gemma3_text", {"final_logit_softcapping": 2.0})
}
"""What lxt 2.1 has a table for among decoders: family, and what its configuration has besides."""


def case(name: str) -> Any:
    family, overrides = CASES[name]
    return tiny(family, seed=3, **overrides)


def without_index() -> None:
    """Lets `lxt.efficient.models.<family>` be imported without all the other families."""
    import lxt

    index: Any = types.ModuleType("lxt.efficient.models")
    index.__path__ = [str(Path(lxt.__path__[0]) / "efficient" / "models")]
    index.get_default_map = None
    sys.modules[index.__name__] = index


def patch(variant: str, family: str) -> None:
    """Applies lxt's own table of a family by lxt's own `monkey_patch`."""
    from lxt.efficient import monkey_patch

    name = family.removesuffix("_text")
    tables = importlib.import_module(f"lxt.efficient.models.{name}")
    modeling = getattr(tables, f"modeling_{name}")
    table = dict(tables.attnLRP if variant == "attn" else tables.cp_LRP)
    if variant == "cp_gate":
        table |= {key: rule for key, rule in tables.attnLRP.items() if getattr(key, "__name__", "").endswith("MLP")}
    monkey_patch(modeling, table)
    kernels = AttentionInterface()
    kernels.update(modeling.ALL_ATTENTION_FUNCTIONS)
    modeling.ALL_ATTENTION_FUNCTIONS = kernels


def relevance(model: Any) -> Tensor:
    """R_i = <ds/dE_i, E_i>, s the logit of the target. result: [N]"""
    embeddings = model.get_input_embeddings()(IDS[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits[0, TARGET - 1, IDS[TARGET]], embeddings)
    return (gradient * embeddings.detach()).float().sum(-1)[0]


def main(variant: str, path: str) -> None:
    warnings.simplefilter("ignore")  # what is patched for a second case is patched already
    without_index()
    for family, _ in CASES.values():
        patch(variant, family)
    torch.save({name: relevance(case(name)) for name in CASES}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
