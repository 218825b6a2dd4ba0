"""FlashTrace, token-wise IFR and the exhaustive rollout, written slowly and densely from the formulas.

Equation numbers are those of the FlashTrace paper (arXiv 2602.01914). Nothing here is fast: the contribution of every
source through every head is formed as a vector, every pattern is kept whole, and all arithmetic is in float64 on the
tensors exactly as the model computed them.

Shapes: N positions, L layers, H query heads, d model width, d_h head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.reading import DenseLayer, closure_error, eager_copy, family_of, read_dense

__all__ = ["DenseLayer", "closure_error", "eager_copy", "family_of", "read_dense"]


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

    Where heads are gated, every channel has a flow of its own: c^h_j = sum_i w_i A^h_ij (v^h_j * gate^h_i) W_O^h.

    w       [N]
    returns [H, N, d]; the heads of a second mixer come after those of the first
    """
    each = recurrent_contributions if layer.pattern.dim() == 4 else attention_contributions
    c = each(layer, w)
    return c if layer.beside is None else torch.cat([c, contributions(layer.beside, w)])


def recurrent_contributions(layer: DenseLayer, w: Tensor) -> Tensor:
    """c^h_j = sum_i w_i (c^h_ij gate^h_i v^h_j) W_O^h, with coefficients that may differ by channel."""
    heads, length, width = layer.v.shape
    c = torch.zeros(heads, length, layer.resid_pre.shape[1], dtype=torch.float64)
    for head in range(heads):
        for j in range(length):
            read = torch.zeros(width, dtype=torch.float64)
            for i in range(j, length):
                factor = w[i] * layer.scale[i]
                read += factor * layer.pattern[head, i, j] * layer.gate[head, i] * layer.v[head, j]
            c[head, j] = (read @ layer.W_O[head]) * layer.gain
    return c


def attention_contributions(layer: DenseLayer, w: Tensor) -> Tensor:
    """See `contributions`."""
    flow = weighted_flow(layer.pattern, w * layer.scale)
    c = torch.zeros(*flow.shape, layer.resid_pre.shape[1], dtype=torch.float64)
    for head in range(flow.shape[0]):
        for j in range(flow.shape[1]):
            read = flow[head, j] * layer.v[head, j]
            if layer.gate is not None:
                read = (w * layer.scale * layer.pattern[head, :, j]) @ layer.gate[head] * layer.v[head, j]
            c[head, j] = (read @ layer.W_O[head]) * layer.gain
    return c


def one_hop(layers: list[DenseLayer], w: Tensor) -> OneHop:
    """Attribute the positions weighted by `w` [N] in one pass over the layers (Eq. 16 to 21).

    Weights that are all zero give shares that are all zero.
    """
    w = torch.as_tensor(w, dtype=torch.float64)
    rows = [_layer_shares(layer, w) for layer in layers]
    most = max(len(row[1]) for row in rows)  # layers with fewer heads have zeros for those they lack
    rows = [(t, torch.cat([h, h.new_zeros(most - len(h))]), r, m) for t, h, r, m in rows]
    token, head, residual, mlp = (torch.stack(column) for column in zip(*rows, strict=True))
    return OneHop(token, head, residual, mlp, alpha=token.sum(0))


def _layer_shares(layer: DenseLayer, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token [N], head [H], residual [] and MLP [] shares of one layer."""
    t = w @ layer.resid_mid
    e = proximity(contributions(layer, w), t)  # [H, N], Eq. 19 before its sum over heads
    e_residual = proximity(w @ layer.resid_pre, t)  # Eq. 20
    total = e.sum() + e_residual

    u = w @ layer.resid_post
    kept = layer.out_scale * t
    e_mlp, e_mid = proximity(layer.out_scale * (w @ layer.mlp_out), u), proximity(kept, u)  # Eq. 21
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
    w = weights_at(dict.fromkeys(range(*target), 1.0), length, positions)
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

    alphas = [_mixture(rows, dict.fromkeys(range(*target), 1.0), length)]
    for _ in range(hops):
        alphas.append(_mixture(rows, {j: alphas[-1][j].item() for j in thinking}, length))
    return _result(alphas, [mass(alpha, thinking) for alpha in alphas], prompt_length)


def _mixture(rows: dict[int, Tensor], weights: dict[int, float], length: int) -> Tensor:
    """sum_j w_j rows_j / sum_j w_j; zero where the weights are zero."""
    total, result = sum(weights.values()), torch.zeros(length, dtype=torch.float64)
    for j, weight in weights.items():
        result += weight * rows[j]
    return result / total if total > 0 else result
