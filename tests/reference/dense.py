"""FlashTrace, token-wise IFR and the exhaustive rollout, written slowly and densely from the formulas.

Equation numbers are those of the FlashTrace paper (arXiv 2602.01914). Nothing here is fast: the contribution of every
source through every head is formed as a vector, every pattern is kept whole, and all arithmetic is in float64 on the
tensors exactly as the model computed them.

Shapes: N positions, L layers, H query heads, d model width, d_h head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

CLOSURE_TOLERANCE = 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Reading a model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DenseLayer:
    """Everything one layer did to one sequence, float64.

    resid_pre, resid_mid, resid_post, mlp_out   [N, d]
    pattern                                     [H, N, N]   row i attends to column j
    v                                           [H, N, d_h] what head h reads, KV heads repeated
    W_O, b_O                                    [H, d_h, d], [d]
    gain, scale                                 [d], [N]    the norm after W_O; ones if there is none
    """

    resid_pre: Tensor
    resid_mid: Tensor
    resid_post: Tensor
    mlp_out: Tensor
    pattern: Tensor
    v: Tensor
    W_O: Tensor
    b_O: Tensor = None
    gain: Tensor = None
    scale: Tensor = None

    def __post_init__(self):
        positions, width = self.resid_pre.shape
        self.b_O = self.resid_pre.new_zeros(width) if self.b_O is None else self.b_O
        self.gain = self.resid_pre.new_ones(width) if self.gain is None else self.gain
        self.scale = self.resid_pre.new_ones(positions) if self.scale is None else self.scale


@dataclass(frozen=True)
class Family:
    """Where a family of Hugging Face decoders keeps what `DenseLayer` needs; paths are relative to a block.

    The values are the last KV heads * d_h outputs of `values`, which holds for separate and for fused projections.
    `mid` is the module whose *input* is the residual stream after attention; None in parallel blocks, where
    resid_mid := resid_pre + attention branch. `mlp_out` is the module whose *output* is added to the residual stream.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    values: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    mid: str | None = "post_attention_layernorm"
    mlp_out: str = "mlp"
    post_norm: str | None = None
    unit_offset: bool = False  # the post-norm multiplies by 1 + weight


LLAMA = Family()
POST_NORMED = {"post_norm": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
GPT = {"blocks": "transformer.h", "attention": "attn"}

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "phi3": Family(values="self_attn.qkv_proj"),
    "gemma2": Family(mid="pre_feedforward_layernorm", unit_offset=True, **POST_NORMED),
    "olmo2": Family(mid="mlp", **POST_NORMED),
    "gpt2": Family(values="attn.c_attn", output="attn.c_proj", mid="ln_2", **GPT),
    "gptj": Family(values="attn.v_proj", output="attn.out_proj", mid=None, **GPT),
}


def read_dense(model, input_ids: Tensor) -> list[DenseLayer]:
    """Run a copy of `model` with eager attention on `input_ids` ([N] or [1, N]) and record every layer.

    Raises AssertionError if a block does not close:
        resid_mid_i = resid_pre_i + scale_i gain * (b_O + sum_h sum_j pattern^h_ij v^h_j W_O^h)       (Eq. 14)
    """
    family = FAMILIES[model.config.model_type]
    model = eager_copy(model)
    blocks = model.get_submodule(family.blocks)
    records = [_Record(block, family) for block in blocks]
    with torch.no_grad():
        result = model(input_ids=input_ids.reshape(1, -1), output_attentions=True, use_cache=False)
    layers = [
        _dense_layer(record, pattern[0], model.config, family)
        for record, pattern in zip(records, result.attentions, strict=True)
    ]
    for index, layer in enumerate(layers):
        error = closure_error(layer)
        assert error < CLOSURE_TOLERANCE, f"{model.config.model_type}, layer {index}: closes only to {error:.1e}"
    return layers


def eager_copy(model):
    """A deep copy in eval mode with eager attention; the given model is left untouched."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    return model


def closure_error(layer: DenseLayer) -> float:
    """Largest gap between resid_mid and its rebuilt value, relative to the largest entry of the attention branch."""
    z = torch.einsum("hij,hjd->hid", layer.pattern, layer.v)
    branch = layer.b_O + torch.einsum("hid,hdm->im", z, layer.W_O)
    rebuilt = layer.resid_pre + layer.scale[:, None] * layer.gain * branch
    return ((rebuilt - layer.resid_mid).abs().max() / (layer.resid_mid - layer.resid_pre).abs().max()).item()


@dataclass
class _Record:
    """Clones of what passes through one block, by name; clones, because some families write in place."""

    block: nn.Module
    family: Family
    seen: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        family = self.family
        self._keep_input("resid_pre", "")
        self._keep_output("resid_post", "")
        self._keep_output("attention", family.attention)
        self._keep_output("values", family.values)
        self._keep_output("mlp_out", family.mlp_out)
        if family.mid is not None:
            self._keep_input("resid_mid", family.mid)
        if family.post_norm is not None:
            self._keep_input("post_norm_in", family.post_norm)

    def _keep_input(self, name: str, path: str) -> None:
        def hook(module, args, kwargs):
            self.seen[name] = (args[0] if args else kwargs["hidden_states"])[0].detach().clone().double()

        self.block.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

    def _keep_output(self, name: str, path: str) -> None:
        def hook(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            self.seen[name] = first[0].detach().clone().double()

        self.block.get_submodule(path).register_forward_hook(hook)


def _dense_layer(record: _Record, pattern: Tensor, config, family: Family) -> DenseLayer:
    seen, heads = record.seen, config.num_attention_heads
    resid_mid = seen["resid_mid"] if family.mid is not None else seen["resid_pre"] + seen["attention"]
    W_O, b_O = _output_projection(record.block.get_submodule(family.output), heads)
    gain, scale = _post_norm(record, family)
    return DenseLayer(
        resid_pre=seen["resid_pre"],
        resid_mid=resid_mid,
        resid_post=seen["resid_post"],
        mlp_out=seen["mlp_out"],
        pattern=pattern.detach().double(),
        v=_values(seen["values"], heads, getattr(config, "num_key_value_heads", heads), W_O.shape[1]),
        W_O=W_O,
        b_O=b_O,
        gain=gain,
        scale=scale,
    )


def _values(projected: Tensor, heads: int, kv_heads: int, head_width: int) -> Tensor:
    """[N, ..., KV * d_h] -> [H, N, d_h]: query head h reads KV head h // (H / KV)."""
    values = projected[:, -kv_heads * head_width :].reshape(-1, kv_heads, head_width)
    group = heads // kv_heads
    return torch.stack([values[:, head // group] for head in range(heads)])


def _output_projection(module: nn.Module, heads: int) -> tuple[Tensor, Tensor | None]:
    """W_O [H, d_h, d] and b_O [d]; nn.Linear keeps [out, in], GPT-2's Conv1D keeps [in, out]."""
    weight = module.weight if isinstance(module, Conv1D) else module.weight.T
    bias = None if module.bias is None else module.bias.detach().double()
    return weight.detach().double().reshape(heads, -1, weight.shape[1]), bias


def _post_norm(record: _Record, family: Family) -> tuple[Tensor | None, Tensor | None]:
    """Gain [d] and scale [N] = 1 / rms of an RMS norm between W_O and the residual stream (Eq. 13)."""
    if family.post_norm is None:
        return None, None
    norm = record.block.get_submodule(family.post_norm)
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    weight = norm.weight.detach().double()
    mean_square = record.seen["post_norm_in"].pow(2).mean(-1)
    return weight + 1 if family.unit_offset else weight, (mean_square + epsilon).rsqrt()


# ---------------------------------------------------------------------------------------------------------------------
# One hop
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class OneHop:
    """Shares of one hop; in every layer token_shares and residual_shares sum to one together.

    token_shares    [L, N]
    head_shares     [L, H]
    residual_shares [L]
    mlp_shares      [L]
    alpha           [N]     sum of token_shares over layers
    """

    token_shares: Tensor
    head_shares: Tensor
    residual_shares: Tensor
    mlp_shares: Tensor
    alpha: Tensor


def weighted_flow(pattern: Tensor, w: Tensor) -> Tensor:
    """flow^h[j] = sum_i w_i A^h[i, j]  (Eq. 8, 18).

    pattern [H, N, N]
    w       [N]
    returns [H, N]
    """
    return torch.einsum("i,hij->hj", w.to(pattern.dtype), pattern)


def proximity(c: Tensor, t: Tensor) -> Tensor:
    """prox(c, t) = max(0, |t|_1 - |t - c|_1)  (Eq. 4, 7): how much of t goes away with c.

    c       [..., d]
    t       [d]
    returns [...]
    """
    return (t.abs().sum() - (t - c).abs().sum(-1)).clamp(min=0)


def contributions(layer: DenseLayer, w: Tensor) -> Tensor:
    """c^h_j = a^h_j (v^h_j W_O^h) * gain, with a^h the flow of the weights w_i scale_i  (Eq. 6, 10, 17, 18).

    w       [N]
    returns [H, N, d]
    """
    flow = weighted_flow(layer.pattern, w * layer.scale)
    c = torch.zeros(*flow.shape, layer.resid_pre.shape[1], dtype=torch.float64)
    for head in range(flow.shape[0]):
        for j in range(flow.shape[1]):
            c[head, j] = flow[head, j] * (layer.v[head, j] @ layer.W_O[head]) * layer.gain
    return c


def one_hop(layers: list[DenseLayer], w: Tensor) -> OneHop:
    """Attribute the positions weighted by `w` [N] in one pass over the layers (Eq. 16 to 21).

    Weights that are all zero give shares that are all zero.
    """
    w = torch.as_tensor(w, dtype=torch.float64)
    rows = [_layer_shares(layer, w) for layer in layers]
    token, head, residual, mlp = (torch.stack(column) for column in zip(*rows, strict=True))
    return OneHop(token, head, residual, mlp, alpha=token.sum(0))


def _layer_shares(layer: DenseLayer, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token [N], head [H], residual [] and MLP [] shares of one layer."""
    t = w @ layer.resid_mid
    e = proximity(contributions(layer, w), t)  # [H, N], Eq. 19 before its sum over heads
    e_residual = proximity(w @ layer.resid_pre, t)  # Eq. 20
    total = e.sum() + e_residual

    u = w @ layer.resid_post
    e_mlp, e_mid = proximity(w @ layer.mlp_out, u), proximity(t, u)  # Eq. 21
    return (
        _share(e.sum(0), total),
        _share(e.sum(1), total),
        _share(e_residual, total),
        _share(e_mlp, e_mlp + e_mid),
    )


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole if whole > 0 else torch.zeros_like(part)


# ---------------------------------------------------------------------------------------------------------------------
# Several hops, and the baselines
# ---------------------------------------------------------------------------------------------------------------------

SHIFT = {"token": 0, "predicting": 1}


def weights_at(positions_and_values: dict[int, float], length: int, positions: str = "token") -> Tensor:
    """[N] weights; the weight of token j sits at j, or at j - 1 where its logits were made (`"predicting"`)."""
    w = torch.zeros(length, dtype=torch.float64)
    for j, value in positions_and_values.items():
        w[j - SHIFT[positions]] = value
    return w


def mass(alpha: Tensor, tokens: list[int]) -> float:
    """rho = share of alpha that lies on `tokens`  (Eq. 11, 23); 0 where alpha is 0."""
    total = alpha.sum().item()
    return sum(alpha[j].item() for j in tokens) / total if total > 0 else 0.0


def accumulate(alphas: list[Tensor], rhos: list[float], prompt_length: int) -> Tensor:
    """score_i = sum_k (prod_{m<k} rho_m) alpha_k[i], i in I  (Eq. 12, 24)."""
    scores, carried = torch.zeros(prompt_length, dtype=torch.float64), 1.0
    for alpha, rho in zip(alphas, rhos, strict=True):
        scores += carried * alpha[:prompt_length]
        carried *= rho
    return scores


def flashtrace(
    layers: list[DenseLayer],
    prompt_length: int,
    target: tuple[int, int],
    reasoning: tuple[int, int] | None,
    hops: int,
    positions: str = "token",
    recursion: str = "reasoning",
) -> dict[str, Tensor]:
    """FlashTrace with `hops` recursive hops (Sec. 4.3, App. A.3); spans are half open.

        hop 0:  w = 1 on O                          hop k:  w = alpha_{k-1} on the recursion set R
        rho_k = sum_R alpha_k / sum alpha_k         score_i = sum_k (prod_{m<k} rho_m) alpha_k[i]

    R = T, or T and O with recursion="generation". If R is empty or holds no mass, all later hops are zero.

    returns scores [prompt_length], hop_scores [hops + 1, N], reasoning_mass [hops + 1]
    """
    length = layers[0].resid_pre.shape[0]
    tokens = recursion_set(target, reasoning, recursion)
    w = weights_at({j: 1.0 for j in range(*target)}, length, positions)
    alphas, rhos = [], []
    for _ in range(hops + 1):
        alpha = one_hop(layers, w).alpha
        alphas.append(alpha)
        rhos.append(mass(alpha, tokens))
        w = weights_at({j: alpha[j].item() for j in tokens}, length, positions)
    return _result(alphas, rhos, prompt_length)


def recursion_set(target: tuple[int, int], reasoning: tuple[int, int] | None, recursion: str) -> list[int]:
    tokens = set(range(*reasoning)) if reasoning is not None else set()
    if recursion == "generation":
        tokens |= set(range(*target))
    return sorted(tokens)


def _result(alphas: list[Tensor], rhos: list[float], prompt_length: int) -> dict[str, Tensor]:
    return {
        "scores": accumulate(alphas, rhos, prompt_length),
        "hop_scores": torch.stack(alphas),
        "reasoning_mass": torch.tensor(rhos, dtype=torch.float64),
    }


def ifr_tokenwise(
    layers: list[DenseLayer], prompt_length: int, target: tuple[int, int], positions: str = "token"
) -> dict[str, Tensor]:
    """One single hop per target token, averaged, then restricted to the input and renormalised (Eq. 30, 31).

    returns columns [M, prompt_length] (alpha of each target token on I, as it comes), scores [prompt_length]
    """
    length = layers[0].resid_pre.shape[0]
    columns = torch.stack(
        [one_hop(layers, weights_at({i: 1.0}, length, positions)).alpha[:prompt_length] for i in range(*target)]
    )
    average = columns.mean(0)
    return {"columns": columns, "scores": _share(average, average.sum())}


def exhaustive(
    layers: list[DenseLayer],
    prompt_length: int,
    target: tuple[int, int],
    reasoning: tuple[int, int] | None,
    hops: int,
    positions: str = "token",
) -> dict[str, Tensor]:
    """The token-level rollout (App. D.3): a walk that starts in O and moves by the rows of B.

        B[j, :] = alpha for w = e_j, normalised to sum 1,    j in T and O
        alpha_0 = mean of B[j, :] over O
        alpha_k = sum_{j in T} alpha_{k-1}[j] B[j, :] / sum_{j in T} alpha_{k-1}[j]

    Every alpha_k is a distribution, so the discount prod rho of Eq. 12 turns it back into the mass that arrives:
    the scores are sum_k of the plain products p_k = (p_{k-1} on T) B with p_0 = alpha_0, restricted to I.

    returns as `flashtrace`
    """
    length = layers[0].resid_pre.shape[0]
    thinking = recursion_set(target, reasoning, "reasoning")
    rows = {}
    for j in [*thinking, *range(*target)]:
        alpha = one_hop(layers, weights_at({j: 1.0}, length, positions)).alpha
        rows[j] = _share(alpha, alpha.sum())

    alphas = [_mixture(rows, {j: 1.0 for j in range(*target)}, length)]
    for _ in range(hops):
        alphas.append(_mixture(rows, {j: alphas[-1][j].item() for j in thinking}, length))
    return _result(alphas, [mass(alpha, thinking) for alpha in alphas], prompt_length)


def _mixture(rows: dict[int, Tensor], weights: dict[int, float], length: int) -> Tensor:
    """sum_j w_j rows_j / sum_j w_j; zero where the weights are zero."""
    total, result = sum(weights.values()), torch.zeros(length, dtype=torch.float64)
    for j, weight in weights.items():
        result += weight * rows[j]
    return result / total if total > 0 else result
