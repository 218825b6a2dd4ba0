"""Span-wise relevance propagation, written slowly and densely from the formulas ("lrp" in methods.md).

    g_w(E) = sum_j w_j <seed_j, logits_{j-1}>        R_i = < dg_w/dE_i , E_i >

Every decoder is written out once more in plain torch and float64; the transformers model only lends its weights. Where
the method freezes a number of the forward pass, the number goes through `Rules.freeze`: its value is kept and never
differentiated. A second pass that is given the kept numbers is the linearised model itself, at any other embeddings.

    norm         y = (x - mean) * [s] * gain + bias
    activation   phi(u) = u * [phi(u) / u]                             likewise a soft cap, and a clamp
    product      a b = (a [b] + [a] b) / 2                             half of the relevance to each factor
    attention    rule "cp":   [A] V
                 rule "attn": A V and q k are products; A = [A] + [dA/ds] (s - [s]), softmax by its gradient
    experts      sum_e [route_e] expert_e(x)

Biases are multiplied by a scale that is 1, so that their share is one derivative. Learned positions are an input.

Shapes: N positions, L layers, H query heads, KV key-value heads, d model width, d_h head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tests.reference.dense import accumulate, recursion_set, weights_at
from tests.reference.dense import mass as mass_on

# ---------------------------------------------------------------------------------------------------------------------
# The rules
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Rules:
    """The linearisation of every building block, and the numbers it froze on the way.

    rule         "cp" or "attn"
    bias_scale   []   multiplies every bias; 1 in the forward pass
    given        the frozen numbers of an earlier pass, in order; None to take them from this one
    """

    rule: str
    bias_scale: Tensor
    given: list[Tensor] | None = None
    frozen: list[Tensor] = field(default_factory=list)

    def __post_init__(self):
        if self.rule not in ("cp", "attn"):
            raise ValueError(f'rule is "cp" or "attn", not {self.rule!r}')

    def freeze(self, value: Tensor) -> Tensor:
        """[value]: the number as the first pass had it, a constant."""
        value = value.detach() if self.given is None else self.given[len(self.frozen)]
        self.frozen.append(value)
        return value

    def bias(self, bias: Tensor | None) -> Tensor:
        return torch.zeros((), dtype=torch.float64) if bias is None else double(bias) * self.bias_scale

    def linear(self, x: Tensor, module: nn.Module) -> Tensor:
        """[N, in] -> [N, out]; Conv1D keeps its matrix the other way round."""
        weight = double(module.weight)
        return x @ (weight if isinstance(module, Conv1D) else weight.T) + self.bias(module.bias)

    def activation(self, u: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
        """phi(u) = u * [phi(u) / u]; where u is 0, so is phi(u)."""
        return u * self.freeze(torch.where(u == 0, 0.0, phi(u) / u))

    def product(self, a: Tensor, b: Tensor, contract: Callable[[Tensor, Tensor], Tensor] = torch.mul) -> Tensor:
        """a b = (a [b] + [a] b) / 2, elementwise or as matrices."""
        return (contract(a, self.freeze(b)) + contract(self.freeze(a), b)) / 2

    def softmax(self, scores: Tensor, mask: Tensor) -> Tensor:
        """[A] in rule "cp"; A_j = [A_j] (1 + ds_j - sum_k [A_k] ds_k), ds = s - [s], in rule "attn".

        scores [H, N, M], mask [N, M] true where a row may look -> [H, N, M]
        """
        pattern = self.freeze(scores.masked_fill(~mask, -torch.inf).softmax(-1))
        change = scores - self.freeze(scores)
        if self.rule == "cp":
            return pattern
        return pattern * (1 + change - (pattern * change).sum(-1, keepdim=True))

    def read(self, pattern: Tensor, v: Tensor) -> Tensor:
        """A V: all of the relevance to the values in rule "cp", half of it in rule "attn"."""
        return pattern @ v if self.rule == "cp" else self.product(pattern, v, torch.matmul)


def double(parameter: Tensor) -> Tensor:
    return parameter.detach().double()


def norm(rules: Rules, x: Tensor, module: nn.Module, family: Family) -> Tensor:
    """(x - mean) * [s] * gain + bias over the last axis, the mean only in a LayerNorm."""
    centred = x - x.mean(-1, keepdim=True) if family.layer_norm else x
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    scale = rules.freeze((centred.square().mean(-1, keepdim=True) + eps).rsqrt())
    gain = double(module.weight) + (1 if family.unit_offset else 0)
    return centred * scale * gain + rules.bias(getattr(module, "bias", None))


def soft_cap(u: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(u / cap)


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What a family does differently from Llama; paths are relative to the model or to a block.

    `None` for a norm: there is none. `branch`, `scores`, `embedding` and `logits` are constant multipliers, read from
    the configuration: of both branches before they join the stream, of q k, of the embeddings, and of the logits.
    """

    embed: str = "model.embed_tokens"
    positions: str | None = None
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    rotary: str | None = "model.rotary_emb"
    layer_norm: bool = False
    unit_offset: bool = False  # norms multiply by 1 + weight
    attn_norm: str | None = "input_layernorm"
    post_attn_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    post_mlp_norm: str | None = None
    parallel: Callable[[Any], bool] = lambda config: False  # the MLP reads the stream before attention
    attention: str = "self_attn"
    project: Callable = None
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")  # where a model has them
    flat_qk_norm: bool = False  # over all heads at once, not within each
    interleaved: bool = False  # rotary pairs are neighbours, not halves
    output: str = "o_proj"
    mlp: Callable = None
    mlp_names: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    branch: Callable[[Any], float] = lambda config: 1.0
    scores: Callable[[Any], float] | None = None  # 1 / sqrt(d_h) if None
    score_cap: Callable[[Any], float | None] = lambda config: None
    embedding: Callable[[Any], float] = lambda config: 1.0
    logits: Callable[[Any], float] = lambda config: 1.0


def separate(rules: Rules, module: nn.Module, x: Tensor, d_h: int) -> tuple[Tensor, ...]:
    """q [N, H, d_h], k and v [N, KV, d_h] from a projection each."""
    projections = module.q_proj, module.k_proj, module.v_proj
    return tuple(rules.linear(x, projection).unflatten(1, (-1, d_h)) for projection in projections)


def fused(rules: Rules, module: nn.Module, x: Tensor, d_h: int) -> tuple[Tensor, ...]:
    """All queries, all keys, all values side by side."""
    return tuple(part.unflatten(1, (-1, d_h)) for part in rules.linear(x, module.c_attn).chunk(3, dim=1))


def fused_by_head(rules: Rules, module: nn.Module, x: Tensor, d_h: int) -> tuple[Tensor, ...]:
    """Each head has its query, key and value side by side."""
    return tuple(rules.linear(x, module.query_key_value).unflatten(1, (-1, 3, d_h)).unbind(2))


def head_norm(rules: Rules, heads: Tensor, module: nn.Module, family: Family) -> Tensor:
    """The norm of queries or keys [N, heads, d_h]."""
    if family.flat_qk_norm:
        return norm(rules, heads.flatten(1), module, family).view_as(heads)
    return norm(rules, heads, module, family)


def rotate(heads: Tensor, angles: Tensor, interleaved: bool, scale: float) -> Tensor:
    """Turn the first 2 * pairs channels of every head by its position's angles; the rest pass.

    heads   [N, heads, d_h]
    angles  [N, pairs]
    """
    pairs = angles.shape[1]
    turned, passed = heads[..., : 2 * pairs], heads[..., 2 * pairs :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :pairs], turned[..., pairs:])
    cos, sin = scale * angles.cos()[:, None], scale * angles.sin()[:, None]
    parts = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned, passed], -1)


def rotary(model: nn.Module, family: Family, layer: int, length: int) -> tuple[Tensor, float]:
    """angles [N, pairs] of the layer's rotary embedding, and what multiplies its cosine and sine."""
    module, prefix = model.get_submodule(family.rotary), ""
    if not hasattr(module, "inv_freq"):
        prefix = model.config.layer_types[layer] + "_"
    positions = torch.arange(length, dtype=torch.float64)
    angles = positions[:, None] * double(getattr(module, prefix + "inv_freq"))
    return angles, getattr(module, prefix + "attention_scaling")


def visible(config: Any, layer: int, length: int) -> Tensor:
    """[N, N], true where row i may look at column j: j <= i, and within the window of a sliding layer."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[layer] == "sliding_attention"
    window = getattr(config, "sliding_window", None) if slides else None
    return (j <= i) & (i - j < (window or length))


def queries_and_keys(rules: Rules, model: nn.Module, family: Family, layer: int, q: Tensor, k: Tensor, module):
    """q [N, H, d_h] and k [N, KV, d_h] after their norms and rotation."""
    if hasattr(module, family.qk_norms[0]):
        norms = (module.get_submodule(name) for name in family.qk_norms)
        q, k = (head_norm(rules, heads, head, family) for heads, head in zip((q, k), norms, strict=True))
    if family.rotary is None:
        return q, k
    angles, scale = rotary(model, family, layer, len(q))
    return tuple(rotate(heads, angles, family.interleaved, scale) for heads in (q, k))


def pattern(rules: Rules, model: nn.Module, family: Family, layer: int, q: Tensor, k: Tensor, sinks) -> Tensor:
    """softmax of the scaled and capped q k, [H, N, N]; a sink is one more column that holds no value.

    q, k   [H, N, d_h]
    sinks  [H] or None
    """
    config, (heads, length, d_h) = model.config, q.shape
    scores = rules.product(q, k.transpose(1, 2), torch.matmul)
    scores = scores * (d_h**-0.5 if family.scores is None else family.scores(config))
    if (cap := family.score_cap(config)) is not None:
        scores = rules.activation(scores, partial(soft_cap, cap=cap))
    mask = visible(config, layer, length)
    if sinks is None:
        return rules.softmax(scores, mask)
    scores = torch.cat([scores, double(sinks)[:, None, None].expand(heads, length, 1)], -1)
    return rules.softmax(scores, functional.pad(mask, (0, 1), value=True))[..., :length]


def attention(rules: Rules, model: nn.Module, family: Family, layer: int, x: Tensor) -> Tensor:
    """[N, d] -> [N, d], what attention adds to the stream before any norm or multiplier behind it."""
    module = model.get_submodule(f"{family.blocks}.{layer}.{family.attention}")
    heads = model.config.num_attention_heads
    d_h = getattr(model.config, "head_dim", None) or x.shape[1] // heads
    q, k, v = family.project(rules, module, x, d_h)
    q, k = queries_and_keys(rules, model, family, layer, q, k, module)
    q, k, v = (part.repeat_interleave(heads // part.shape[1], dim=1).transpose(0, 1) for part in (q, k, v))
    A = pattern(rules, model, family, layer, q, k, getattr(module, "sinks", None))
    return rules.linear(rules.read(A, v).transpose(0, 1).flatten(1), module.get_submodule(family.output))


# ---------------------------------------------------------------------------------------------------------------------
# MLPs
# ---------------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}
ACTIVATION_FIELDS = ("hidden_activation", "hidden_act", "activation_function")


def activation_of(config: Any) -> Callable[[Tensor], Tensor]:
    return ACTIVATIONS[next(getattr(config, name) for name in ACTIVATION_FIELDS if hasattr(config, name))]


def gated(rules: Rules, block: nn.Module, names: tuple[str, ...], config: Any, x: Tensor) -> Tensor:
    """(phi(x W_gate) * x W_up) W_down."""
    gate, up, down = (block.get_submodule(name) for name in names)
    opened = rules.activation(rules.linear(x, gate), activation_of(config))
    return rules.linear(rules.product(opened, rules.linear(x, up)), down)


def plain(rules: Rules, block: nn.Module, names: tuple[str, ...], config: Any, x: Tensor) -> Tensor:
    """phi(x W_in) W_out."""
    inner, outer = (block.get_submodule(name) for name in names)
    return rules.linear(rules.activation(rules.linear(x, inner), activation_of(config)), outer)


def routes(logits: Tensor, top_k: int) -> Tensor:
    """[N, experts]: the softmax over the top k logits of each position, 0 for every other expert.

    This is also the softmax over all experts, cut to the top k and made to sum to 1 again.
    """
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(top_k, dim=1).indices, True)
    return logits.masked_fill(~chosen, -torch.inf).softmax(1)


def mixtral_experts(rules: Rules, block: nn.Module, names: tuple[str, ...], config: Any, x: Tensor) -> Tensor:
    """sum_e [route_e] (phi(x W_gate^e) * x W_up^e) W_down^e; gates above, ups below in one matrix."""
    router, experts = (block.get_submodule(name) for name in names)
    route = rules.freeze(routes(x @ double(router.weight).T, config.num_experts_per_tok))
    total = torch.zeros_like(x)
    for e in range(route.shape[1]):
        gate, up = (x @ double(experts.gate_up_proj[e]).T).chunk(2, dim=1)
        inner = rules.product(rules.activation(gate, activation_of(config)), up)
        total = total + route[:, e, None] * (inner @ double(experts.down_proj[e]).T)
    return total


def gpt_oss_experts(rules: Rules, block: nn.Module, names: tuple[str, ...], config: Any, x: Tensor) -> Tensor:
    """sum_e [route_e] ((up + 1) * swish(gate)) W_down^e; gates and ups alternate, clamped; 1 is a bias."""
    router, experts = (block.get_submodule(name) for name in names)
    route = rules.freeze(routes(x @ double(router.weight).T + double(router.bias), config.num_experts_per_tok))
    total = torch.zeros_like(x)
    for e in range(route.shape[1]):
        both = x @ double(experts.gate_up_proj[e]) + rules.bias(experts.gate_up_proj_bias[e])
        inner = _clamped_gate(rules, both[:, ::2], both[:, 1::2], experts.limit, experts.alpha)
        out = inner @ double(experts.down_proj[e]) + rules.bias(experts.down_proj_bias[e])
        total = total + route[:, e, None] * out
    return total


def _clamped_gate(rules: Rules, gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    def swish(u: Tensor) -> Tensor:
        return u.clamp(max=limit) * torch.sigmoid(alpha * u.clamp(max=limit))

    up = rules.activation(up, lambda u: u.clamp(-limit, limit)) + rules.bias(torch.ones(()))
    return rules.product(rules.activation(gate, swish), up)


# ---------------------------------------------------------------------------------------------------------------------
# Families
# ---------------------------------------------------------------------------------------------------------------------

Llama = partial(Family, project=separate, mlp=gated)
SANDWICH = {
    "unit_offset": True,
    "post_attn_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
    "embedding": lambda config: torch.tensor(config.hidden_size**0.5).item(),  # a float32 buffer of the model
    "scores": lambda config: config.query_pre_attn_scalar**-0.5,
}

FAMILIES = {
    "llama": Llama(),
    "mistral": Llama(),
    "qwen2": Llama(),
    "qwen3": Llama(),
    "gemma2": Llama(score_cap=lambda config: config.attn_logit_softcapping, **SANDWICH),
    "gemma3_text": Llama(**SANDWICH),
    "olmo2": Llama(
        flat_qk_norm=True,
        attn_norm=None,
        post_attn_norm="post_attention_layernorm",
        mlp_norm=None,
        post_mlp_norm="post_feedforward_layernorm",
    ),
    "granite": Llama(
        branch=lambda config: config.residual_multiplier,
        scores=lambda config: config.attention_multiplier,
        embedding=lambda config: config.embedding_multiplier,
        logits=lambda config: 1 / config.logits_scaling,
    ),
    "cohere": Llama(
        layer_norm=True,
        parallel=lambda config: True,
        mlp_norm="input_layernorm",
        interleaved=True,
        logits=lambda config: config.logit_scale,
    ),
    "mixtral": Llama(mlp=mixtral_experts, mlp_names=("mlp.gate", "mlp.experts")),
    "gpt_oss": Llama(mlp=gpt_oss_experts, mlp_names=("mlp.router", "mlp.experts")),
    "phi": Llama(
        layer_norm=True,
        parallel=lambda config: True,
        mlp_norm="input_layernorm",
        qk_norms=("q_layernorm", "k_layernorm"),
        final_norm="model.final_layernorm",
        output="dense",
        mlp=plain,
        mlp_names=("mlp.fc1", "mlp.fc2"),
    ),
    "gpt2": Family(
        embed="transformer.wte",
        positions="transformer.wpe",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        rotary=None,
        layer_norm=True,
        attn_norm="ln_1",
        mlp_norm="ln_2",
        attention="attn",
        project=fused,
        output="c_proj",
        mlp=plain,
        mlp_names=("mlp.c_fc", "mlp.c_proj"),
    ),
    "gpt_neox": Family(
        embed="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
        layer_norm=True,
        parallel=lambda config: config.use_parallel_residual,
        attention="attention",
        project=fused_by_head,
        output="dense",
        mlp=plain,
        mlp_names=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
}


def family_of(model: nn.Module) -> Family:
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"no reference for {kind!r}; there is one for {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


# ---------------------------------------------------------------------------------------------------------------------
# The decoder
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What the linearised model is a function of, apart from the scale of its biases.

    embedding  [N, d]   the token embeddings, before any multiplier
    positions  [N, d]   the learned position embeddings; zeros where a family has none
    """

    embedding: Tensor
    positions: Tensor


def inputs_of(model: nn.Module, ids: Tensor) -> Inputs:
    family = family_of(model)
    embedding = double(model.get_submodule(family.embed).weight)[ids]
    if family.positions is None:
        return Inputs(embedding, torch.zeros_like(embedding))
    return Inputs(embedding, double(model.get_submodule(family.positions).weight)[: len(ids)])


def block(rules: Rules, model: nn.Module, family: Family, layer: int, x: Tensor) -> Tensor:
    """resid_pre [N, d] -> resid_post [N, d]."""
    module = model.get_submodule(f"{family.blocks}.{layer}")

    def normed(y: Tensor, name: str | None) -> Tensor:
        return y if name is None else norm(rules, y, module.get_submodule(name), family)

    scale = family.branch(model.config)
    read = attention(rules, model, family, layer, normed(x, family.attn_norm))
    mid = x + scale * normed(read, family.post_attn_norm)
    mlp_in = normed(x if family.parallel(model.config) else mid, family.mlp_norm)
    mlp_out = family.mlp(rules, module, family.mlp_names, model.config, mlp_in)
    return mid + scale * normed(mlp_out, family.post_mlp_norm)


def unembed(rules: Rules, model: nn.Module, family: Family, x: Tensor) -> Tensor:
    """resid_post [N, d] of the last block -> logits [N, V] as the model gives them, scaled and capped."""
    y = norm(rules, x, model.get_submodule(family.final_norm), family)
    logits = family.logits(model.config) * rules.linear(y, model.lm_head)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else rules.activation(logits, partial(soft_cap, cap=cap))


def forward(model: nn.Module, inputs: Inputs, rules: Rules) -> tuple[list[Tensor], Tensor]:
    """resid_pre of every block, L times [N, d], and logits [N, V]; linear in its inputs and biases in rule "cp"."""
    family = family_of(model)
    x = family.embedding(model.config) * inputs.embedding + inputs.positions
    resid_pre = []
    for layer in range(model.config.num_hidden_layers):
        resid_pre.append(x)
        x = block(rules, model, family, layer, x)
    return resid_pre, unembed(rules, model, family, x)


def one() -> Tensor:
    return torch.ones((), dtype=torch.float64)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[N, V], to be compared with the model's own."""
    return forward(model, inputs_of(model, ids), Rules("cp", one()))[1]


# ---------------------------------------------------------------------------------------------------------------------
# The objective and its relevance
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def seeds(logits: Tensor, ids: Tensor, weights: Tensor, objective: str, foil: int | Tensor | None = None) -> Tensor:
    """w_j seed_j at position j - 1, where token j was decided, as constants, [N, V].

    "logit"            onehot(token)
    "centered"         onehot(token) - 1 / V
    "log_probability"  onehot(token) - softmax(logits)
    "contrast"         onehot(token) - onehot(foil)
    """
    if weights[0] != 0:
        raise ValueError("the first token is not predicted by anything, so it cannot be explained")
    if objective not in ("logit", "centered", "log_probability", "contrast"):
        raise ValueError(f"unknown objective {objective!r}")
    result = torch.zeros_like(logits)
    for j in range(1, len(ids)):
        seed = onehot(ids[j], logits.shape[1])
        if objective == "centered":
            seed = seed - 1 / logits.shape[1]
        elif objective == "log_probability":
            seed = seed - logits[j - 1].softmax(0)
        elif objective == "contrast":
            seed = seed - onehot(torch.as_tensor(foil).expand(len(ids))[j], logits.shape[1])
        result[j - 1] = weights[j] * seed
    return result


def onehot(token: Tensor, size: int) -> Tensor:
    return functional.one_hot(token, size).double()


@dataclass
class Relevance:
    """embedding [N], positions and biases are the shares of `objective`; layers [L, N] are the shares of resid_pre.

    In rule "cp" the shares sum to the objective, and so would a layer with the biases from that layer on. In rule
    "attn" they do not: the expansion of the softmax around its own scores has a constant term, `unexplained`.
    """

    embedding: Tensor
    positions: float
    biases: float
    objective: float
    layers: Tensor

    @property
    def unexplained(self) -> float:
        return self.objective - self.embedding.sum().item() - self.positions - self.biases


def relevance(
    model: nn.Module,
    ids: Tensor,
    weights: Tensor,
    *,
    rule: str,
    objective: str,
    foil: int | Tensor | None = None,
) -> Relevance:
    """R_i = < dg/dE_i, E_i > of g = sum_j w_j <seed_j, logits_{j-1}> on the linearised model.

    ids      [N]
    weights  [N]   on tokens: the weight of token j acts at position j - 1; weights[0] is 0
    foil     one token, or [N]: the foil of token j; only with "contrast"
    """
    weights = torch.as_tensor(weights, dtype=torch.float64)
    inputs, scale = inputs_of(model, ids), one().requires_grad_()
    leaves = inputs.embedding.requires_grad_(), inputs.positions.requires_grad_(), scale
    resid_pre, logits = forward(model, inputs, Rules(rule, scale))
    g = (seeds(logits, ids, weights, objective, foil) * logits).sum()
    points = [*leaves, *resid_pre]
    gradients = torch.autograd.grad(g, points, allow_unused=True)
    shares = [_share(x, gradient) for x, gradient in zip(points, gradients, strict=True)]
    embedding, positions, biases, *layers = shares
    return Relevance(embedding, positions.sum().item(), biases.item(), g.item(), torch.stack(layers))


def _share(x: Tensor, gradient: Tensor | None) -> Tensor:
    """<x_i, gradient_i> [N]; a number for a number; 0 for what g does not depend on."""
    product = x.detach() * (torch.zeros_like(x) if gradient is None else gradient)
    return product.sum(-1) if product.dim() else product


def linearised(
    model: nn.Module, ids: Tensor, weights: Tensor, *, rule: str, objective: str, foil: int | Tensor | None = None
) -> Callable[[Inputs, float], float]:
    """g as a function of other inputs and another scale of the biases, everything frozen as at `ids`."""
    rules = Rules(rule, one())
    logits = forward(model, inputs_of(model, ids), rules)[1]
    seed = seeds(logits, ids, torch.as_tensor(weights, dtype=torch.float64), objective, foil)

    @torch.no_grad()
    def g(inputs: Inputs, bias_scale: float) -> float:
        return (seed * forward(model, inputs, Rules(rule, bias_scale * one(), rules.frozen))[1]).sum().item()

    return g


# ---------------------------------------------------------------------------------------------------------------------
# Recursion
# ---------------------------------------------------------------------------------------------------------------------

MASSES: dict[str, Callable[[Tensor], Tensor]] = {"absolute": Tensor.abs, "positive": partial(torch.clamp, min=0)}


def importance(found: Relevance, mass: str, reading: str) -> Tensor:
    """alpha [N], summing to 1; zeros if nothing was found.

    reading="embeddings"   |R_i| or max(0, R_i)
    reading="layers"       sum_l max(0, <resid_pre^l_i, dg/dresid_pre^l_i>), whatever the mass
    """
    readings = {"embeddings": MASSES[mass](found.embedding), "layers": found.layers.clamp(min=0).sum(0)}
    alpha = readings[reading]
    return alpha / alpha.sum() if alpha.sum() > 0 else torch.zeros_like(alpha)


def recursive(
    model: nn.Module,
    ids: Tensor,
    prompt_length: int,
    target: tuple[int, int],
    reasoning: tuple[int, int] | None,
    hops: int,
    *,
    rule: str,
    objective: str,
    mass: str,
    reading: str = "embeddings",
    foil: int | Tensor | None = None,
) -> dict[str, Tensor]:
    """Relevance with `hops` recursive hops; spans are half open, [start, end).

        hop 0:  w = 1 on O        hop k:  w = alpha_{k-1} on T        rho_k = sum_T alpha_k / sum alpha_k
        score_i = sum_k (prod_{m<k} rho_m) alpha_k[i],  i in I

    returns scores [prompt_length], hop_scores [hops + 1, N], reasoning_mass [hops + 1]
    """
    thinking = recursion_set(target, reasoning, "reasoning")
    w = weights_at(dict.fromkeys(range(*target), 1.0), len(ids))
    alphas = []
    for _ in range(hops + 1):
        found = relevance(model, ids, w, rule=rule, objective=objective, foil=foil)
        alphas.append(importance(found, mass, reading))
        w = weights_at({j: alphas[-1][j].item() for j in thinking}, len(ids))
    rhos = [mass_on(alpha, thinking) for alpha in alphas]
    return {
        "scores": accumulate(alphas, rhos, prompt_length),
        "hop_scores": torch.stack(alphas),
        "reasoning_mass": torch.tensor(rhos, dtype=torch.float64),
    }
