"""Token mixers without softmax, slowly: every coefficient c_ij from the recurrence's formula, token by token, float64.

This is a second reading of transformers' mixers: from the input of a mixer and its parameters alone, without running
its code, where the package takes a vector-Jacobian product of the function that transformers calls.

A mixer gives what head h reads at row i, ``o^h_i = sum_j c^h_ij v^h_j``, and what multiplies it before the output
projection. Shapes: N positions, H heads, d_h head width, P = 1 or d_h: coefficients per head or per channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Mixed:
    """coefficients [H, N, N, P], v [H, N, d_h], gate [H, N, d_h], all float64"""

    coefficients: Tensor
    v: Tensor
    gate: Tensor


def known(module: nn.Module) -> bool:
    return type(module).__name__ in _READERS


def read_mixer(module: nn.Module, x: Tensor) -> Mixed:
    """x: [N, d], what the mixer is given, float64"""
    return _READERS[type(module).__name__](module, x)


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    y = x @ layer.weight.detach().double().T
    return y if layer.bias is None else y + layer.bias.detach().double()


def short_convolution(layer: nn.Conv1d, x: Tensor) -> Tensor:
    """Position i sees positions i - K + 1 .. i of its own channel. [N, channels]"""
    kernel = layer.weight.detach().double()[:, 0]
    taps = kernel.shape[1]
    out = torch.zeros_like(x)
    for i in range(len(x)):
        for tap in range(taps):
            j = i - (taps - 1 - tap)
            if j >= 0:
                out[i] += kernel[:, tap] * x[j]
    return out if layer.bias is None else out + layer.bias.detach().double()


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def rms_scale(o: Tensor, epsilon: float) -> Tensor:
    return 1 / (o.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


def by_head(x: Tensor, heads: int) -> Tensor:
    """[N, H * width] -> [H, N, width]"""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def read(coefficients: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("hijp,hjp->hip", coefficients.expand(*coefficients.shape[:3], v.shape[-1]), v)


def parameter(module: nn.Module, name: str) -> Tensor:
    return getattr(module, name).detach().double().flatten()


# ---------------------------------------------------------------------------------------------------------------------
# The delta rule: S <- D_t S + beta_t k_t (v_t - k_t^T D_t S)^T, o_t = S^T q_t, with D_t the decay of the state
# ---------------------------------------------------------------------------------------------------------------------


def delta_rule(q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Coefficients. q, k: [H, N, d_k]; log_decay: [H, N, d_k or 1]; beta: [H, N]; result: [H, N, N, 1]"""
    heads, length, width = q.shape
    q, k = unit(q) / width**0.5, unit(k)
    c = torch.zeros(heads, length, length, 1, dtype=torch.float64)
    for h in range(heads):
        for j in range(length):
            state = beta[h, j] * k[h, j]
            c[h, j, j, 0] = q[h, j] @ state
            for i in range(j + 1, length):
                state = log_decay[h, i].exp() * state
                state = state - beta[h, i] * k[h, i] * (k[h, i] @ state)
                c[h, i, j, 0] = q[h, i] @ state
    return c


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // len(x), 0)


def _delta(module: nn.Module, qkv: Tensor, g: Tensor, beta: Tensor, gate: Tensor, norm: nn.Module) -> Mixed:
    """qkv: [N, channels] before the convolution; g: [H, N, 1 or d_k]; beta: [H, N]; gate: [H, N, d_h], activated"""
    heads = len(beta)
    key_heads = getattr(module, "num_k_heads", heads)
    key_width = getattr(module, "key_dim", qkv.shape[1] // 3)
    q, k, v = F.silu(short_convolution(module.conv1d, qkv)).split(
        [key_width, key_width, qkv.shape[1] - 2 * key_width], 1
    )
    q, k = (_repeated(by_head(part, key_heads), heads) for part in (q, k))
    c, v = delta_rule(q, k, g, beta), by_head(v, heads)
    scale = rms_scale(read(c, v), norm.variance_epsilon)
    return Mixed(c, v, scale * norm.weight.detach().double() * gate)


def _decay(module: nn.Module, a: Tensor) -> Tensor:
    """[N, H] -> [H, N, 1]"""
    return -(parameter(module, "A_log").exp() * F.softplus(a + parameter(module, "dt_bias"))).T[:, :, None]


def _qwen3_next(module: nn.Module, x: Tensor) -> Mixed:
    """The projections are grouped by key head: query, key, values and gates of its value heads."""
    heads, keys = module.num_v_heads, module.num_k_heads
    width, d_k = module.head_v_dim * heads // keys, module.head_k_dim
    q, k, v, z = linear(module.in_proj_qkvz, x).unflatten(1, (keys, -1)).split([d_k, d_k, width, width], -1)
    b, a = linear(module.in_proj_ba, x).unflatten(1, (keys, -1)).chunk(2, -1)
    qkv = torch.cat([part.flatten(1) for part in (q, k, v)], 1)
    gate = F.silu(by_head(z.flatten(1), heads))
    return _delta(module, qkv, _decay(module, a.flatten(1)), b.flatten(1).sigmoid().T, gate, module.norm)


def _qwen3_5(module: nn.Module, x: Tensor) -> Mixed:
    qkv, z = linear(module.in_proj_qkv, x), linear(module.in_proj_z, x)
    b, a = linear(module.in_proj_b, x), linear(module.in_proj_a, x)
    gate = F.silu(by_head(z, module.num_v_heads))
    return _delta(module, qkv, _decay(module, a), b.sigmoid().T, gate, module.norm)


def _separate(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([linear(part, x) for part in (module.q_proj, module.k_proj, module.v_proj)], 1)


def _olmo(module: nn.Module, x: Tensor) -> Mixed:
    beta = linear(module.b_proj, x).sigmoid().T * (2 if module.allow_neg_eigval else 1)
    gate = F.silu(by_head(linear(module.g_proj, x), module.num_v_heads))
    return _delta(module, _separate(module, x), _decay(module, linear(module.a_proj, x)), beta, gate, module.o_norm)


def _kimi(module: nn.Module, x: Tensor) -> Mixed:
    heads, forget = module.num_heads, module.forget_gate
    logits = linear(forget.f_b_proj, linear(forget.f_a_proj, x)) + parameter(forget, "dt_bias")
    g = -parameter(forget, "A_log").exp()[:, None, None] * F.softplus(by_head(logits, heads))
    gate = by_head(linear(module.g_b_proj, linear(module.g_a_proj, x)), heads).sigmoid()
    return _delta(module, _separate(module, x), g, linear(module.b_proj, x).sigmoid().T, gate, module.o_norm)


def _bailing(module: nn.Module, x: Tensor) -> Mixed:
    heads, forget = module.num_heads, module.forget_gate
    logits = by_head(linear(forget.f_proj, x) + parameter(forget, "dt_bias"), heads)
    g = forget.lower_bound * (parameter(forget, "A_log").exp()[:, None, None] * logits).sigmoid()
    gate = by_head(linear(module.g_proj, x), heads).sigmoid()
    return _delta(module, _separate(module, x), g, linear(module.b_proj, x).sigmoid().T, gate, module.o_norm)


# ---------------------------------------------------------------------------------------------------------------------
# State space models: S <- exp(A dt_t) S + dt_t B_t x_t, y_t = C_t S + D x_t
# ---------------------------------------------------------------------------------------------------------------------


def _mamba2(module: nn.Module, x: Tensor) -> Mixed:
    """A number per head: A, dt and D are."""
    inner, heads, groups, states = module.intermediate_size, module.num_heads, module.n_groups, module.ssm_state_size
    x = x * getattr(module, "ssm_in_multiplier", 1.0)
    projected = linear(module.in_proj, x)
    if hasattr(module, "mup_vector"):
        projected = projected * module.mup_vector.double()[0]
    z, mixed, dt = projected.split([inner, projected.shape[1] - inner - heads, heads], 1)
    v, B, C = F.silu(short_convolution(module.conv1d, mixed)).split([inner, groups * states, groups * states], 1)
    v, z = by_head(v, heads), by_head(z, heads)
    B, C = (_repeated(by_head(part, groups), heads) for part in (B, C))
    dt = F.softplus(dt + parameter(module, "dt_bias")).clamp(*module.time_step_limit).T
    rate = -parameter(module, "A_log").exp()
    c = torch.zeros(heads, len(x), len(x), 1, dtype=torch.float64)
    for h in range(heads):
        for j in range(len(x)):
            state = dt[h, j] * B[h, j]
            for i in range(j, len(x)):
                state = state if i == j else (rate[h] * dt[h, i]).exp() * state
                c[h, i, j, 0] = C[h, i] @ state
            c[h, j, j, 0] += parameter(module, "D")[h]
    return Mixed(c, v, _state_space_gate(module, read(c, v), z))


def _state_space_gate(module: nn.Module, o: Tensor, z: Tensor) -> Tensor:
    """Gate and norm by group of channels, [H, N, d_h]; the gate comes first in all but some of Falcon-H1."""
    gate, norm = F.silu(z), module.norm
    if isinstance(norm, nn.Identity):
        return gate
    first = not getattr(norm, "norm_before_gate", False)
    together = (o * gate if first else o).transpose(0, 1).flatten(1)
    groups = getattr(norm, "n_groups", None) or together.shape[1] // norm.group_size
    scale = rms_scale(together.unflatten(1, (groups, -1)), norm.variance_epsilon)
    factor = scale.expand(-1, -1, together.shape[1] // groups).flatten(1) * norm.weight.detach().double()
    return by_head(factor, len(o)) * gate


def _mamba(module: nn.Module, x: Tensor) -> Mixed:
    """A number per channel: one head as wide as all."""
    states, rank = module.ssm_state_size, module.time_step_rank
    mixed, z = linear(module.in_proj, x).chunk(2, 1)
    v = F.silu(short_convolution(module.conv1d, mixed))
    low, B, C = linear(module.x_proj, v).split([rank, states, states], 1)
    if hasattr(module, "b_layernorm"):
        low, B, C = _normed(module, low, B, C)
    dt = F.softplus(linear(module.dt_proj, low))
    rate = -module.A_log.detach().double().exp()  # [channels, states]
    c = torch.zeros(1, len(x), len(x), v.shape[1], dtype=torch.float64)
    for j in range(len(x)):
        state = dt[j][:, None] * B[j]
        for i in range(j, len(x)):
            state = state if i == j else (rate * dt[i][:, None]).exp() * state
            c[0, i, j] = state @ C[i]
        c[0, j, j] += parameter(module, "D")
    return Mixed(c, v[None], F.silu(z)[None])


def _normed(module: nn.Module, *parts: Tensor) -> list[Tensor]:
    norms = module.dt_layernorm, module.b_layernorm, module.c_layernorm
    return [_normed_by(norm, part) for norm, part in zip(norms, parts, strict=True)]


def _normed_by(norm: nn.Module, x: Tensor) -> Tensor:
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    gain = norm.weight.detach().double() if "weight" in norm._parameters else 1.0
    return x * rms_scale(x, epsilon) * gain


def _convolution(module: nn.Module, x: Tensor) -> Mixed:
    """LFM2: a gated short convolution is all the mixer there is. One head, a number per channel."""
    first, gate, x = linear(module.in_proj, x).chunk(3, 1)
    v, kernel = first * x, module.conv.weight.detach().double()[:, 0]
    c = torch.zeros(1, len(x), len(x), v.shape[1], dtype=torch.float64)
    for i in range(len(x)):
        for tap in range(kernel.shape[1]):
            j = i - (kernel.shape[1] - 1 - tap)
            if j >= 0:
                c[0, i, j] = kernel[:, tap]
    return Mixed(c, v[None], gate[None])


_READERS = {
    "Qwen3NextGatedDeltaNet": _qwen3_next,
    "Qwen3_5GatedDeltaNet": _qwen3_5,
    "Qwen3_5MoeGatedDeltaNet": _qwen3_5,
    "OlmoHybridGatedDeltaNet": _olmo,
    "KimiLinearDeltaAttention": _kimi,
    "BailingHybridDeltaAttention": _bailing,
    "BambaMixer": _mamba2,
    "FalconH1Mixer": _mamba2,
    "GraniteMoeHybridMambaLayer": _mamba2,
    "Mamba2Mixer": _mamba2,
    "NemotronHMamba2Mixer": _mamba2,
    "JambaMambaMixer": _mamba,
    "MambaMixer": _mamba,
    "FalconMambaMixer": _mamba,
    "Lfm2ShortConv": _convolution,
    "Lfm2MoeShortConv": _convolution,
    "Lfm3ShortConv": _convolution,
}
