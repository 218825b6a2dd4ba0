"""HETA, written slowly and densely: rollout by loops, the whole Hessian, one masked forward per token.

Equation numbers are those of the HETA paper. A target is a half-open span (start, stop) of token positions; a single
token T is (T, T + 1). Token j is predicted at position j - 1, so the span's predicting positions are
start - 1 .. stop - 2, and

    g(X) = sum_{j in span} log P(x_j | x_<j)            X [N, d] the embeddings of the first N = stop - 1 tokens.

The components are reported for the n = start positions before the target. All arithmetic is float64 on a copy of the
model with eager attention (the fused kernels have no second derivative).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.dense import DenseLayer, eager_copy, family_of, read_dense, weighted_flow

LARGEST_ENUMERATION = 16

Span = tuple[int, int]
Objective = Callable[[Tensor], Tensor]


def predicting_positions(target: Span) -> list[int]:
    return [j - 1 for j in range(*target)]


def exact_model(model):
    """A float64 copy with eager attention; the given model is left untouched."""
    return eager_copy(model).double()


# ---------------------------------------------------------------------------------------------------------------------
# Gate
# ---------------------------------------------------------------------------------------------------------------------


def gate(layers: list[DenseLayer], target: Span, kind: str | None = "flow") -> Tensor:
    """M [n] over the positions before the target.

    "flow", "per_head"   M_i = mass_i / sum_{j < n} mass_j
    "uniform"            M_i = 1 / n
    None                 M_i = 1, no gate
    """
    n = target[0]
    if kind is None:
        return torch.ones(n, dtype=torch.float64)
    if kind == "uniform":
        return torch.full((n,), 1 / n, dtype=torch.float64)
    mass = {"flow": flow_mass, "per_head": per_head_mass}[kind](layers, target)[:n]
    return mass / mass.sum()


def value_norm(layer: DenseLayer) -> Tensor:
    """|v^h_i W_O^h|_1, [H, N]."""
    return torch.einsum("hid,hdm->him", layer.v, layer.W_O).abs().sum(-1)


def flow_mass(layers: list[DenseLayer], target: Span) -> Tensor:
    """Unnormalised M [N] from one sweep from the top.

    rho^(L)     = 1 on every predicting position
    flow^(l,h)  = weighted flow of layer l with weights rho^(l)
    rho^(l-1)   = 1/2 rho^(l) + 1/2 mean_h flow^(l,h)
    mass[i]     = sum_l sum_h flow^(l,h)[i] |v^(l,h)_i W_O^(l,h)|_1
    """
    rho = torch.zeros(layers[0].resid_pre.shape[0], dtype=torch.float64)
    rho[predicting_positions(target)] = 1.0
    mass = torch.zeros_like(rho)
    for layer in reversed(layers):
        flow = weighted_flow(layer.pattern, rho)
        mass += (flow * value_norm(layer)).sum(0)
        rho = 0.5 * rho + 0.5 * flow.mean(0)
    return mass


def per_head_mass(layers: list[DenseLayer], target: Span) -> Tensor:
    """Unnormalised M [N] from one rollout per head, from the bottom, without mixing heads.

    R_0 = I,  R_l = (1/2 A^(l,h) + 1/2 I) R_(l-1)
    mass[i] = sum_l sum_h sum_p R_l[p, i] |v^(l,h)_i W_O^(l,h)|_1,   p over the predicting positions
    """
    heads, length, _ = layers[0].pattern.shape
    identity = torch.eye(length, dtype=torch.float64)
    mass = torch.zeros(length, dtype=torch.float64)
    for head in range(heads):
        rollout = identity
        for layer in layers:
            rollout = (0.5 * layer.pattern[head] + 0.5 * identity) @ rollout
            for p in predicting_positions(target):
                mass += rollout[p] * value_norm(layer)[head]
    return mass


# ---------------------------------------------------------------------------------------------------------------------
# The function whose curvature is taken
# ---------------------------------------------------------------------------------------------------------------------


def embed(model, ids: Tensor) -> Tensor:
    """What the model's embedding module gives for `ids` [...], [..., d]; position embeddings are not part of it."""
    with torch.no_grad():
        return model.get_input_embeddings()(ids)


def next_token_log_probs(model, X: Tensor) -> Tensor:
    """log P(. | x_<=p) for every position p; X [N, d] -> [N, vocabulary]."""
    return model(inputs_embeds=X[None], use_cache=False).logits[0].log_softmax(-1)


def span_log_prob(log_probs: Tensor, ids: Tensor, target: Span) -> Tensor:
    return sum(log_probs[j - 1, ids[j]] for j in range(*target))


def embedding_objective(model, ids: Tensor, target: Span) -> tuple[Objective, Tensor]:
    """g and the point X [stop - 1, d] at which to differentiate; `model` comes from `exact_model`."""

    def g(X: Tensor) -> Tensor:
        return span_log_prob(next_token_log_probs(model, X), ids, target)

    return g, embed(model, ids[: target[1] - 1])


def layer_objective(model, ids: Tensor, target: Span, last_layers: int) -> tuple[Objective, Tensor]:
    """g as a function of the hidden states [stop - 1, d] that enter layer L - last_layers, and those states."""
    X = embed(model, ids[: target[1] - 1])
    blocks = model.get_submodule(family_of(model.config).blocks)
    block = blocks[len(blocks) - last_layers]

    def g(hidden: Tensor) -> Tensor:
        def swap(module, args, kwargs):
            return (hidden[None], *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

        handle = block.register_forward_pre_hook(swap, with_kwargs=True)
        try:
            return span_log_prob(next_token_log_probs(model, X), ids, target)
        finally:
            handle.remove()

    return g, _hidden_entering(model, block, X)


def _hidden_entering(model, block, X: Tensor) -> Tensor:
    seen = []

    def keep(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"])[0].detach().clone())

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        next_token_log_probs(model, X)
    handle.remove()
    return seen[0]


# ---------------------------------------------------------------------------------------------------------------------
# Curvature
# ---------------------------------------------------------------------------------------------------------------------


def hessian(g: Objective, X: Tensor) -> Tensor:
    """The whole Hessian of g at X (Eq. 2); X [N, d] -> [N, d, N, d]."""
    return torch.autograd.functional.hessian(g, X)


def block_curvature(H: Tensor, probes: Tensor) -> Tensor:
    """S_i = 1/m sum_k |Pi_i H Pi_i r_k|_1  (Eq. 3): token i's own block of H, and block i of every probe.

    H       [N, d, N, d]
    probes  [m, n, d], n <= N
    returns [n]
    """
    _, n, _ = probes.shape
    return torch.stack([(probes[:, i] @ H[i, :, i, :].T).abs().sum(-1).mean() for i in range(n)])


def expected_block_curvature(H: Tensor) -> Tensor:
    """E_r |Pi_i H Pi_i r|_1 over all 2^d Rademacher vectors r, by enumeration; [N, d, N, d] -> [N]."""
    signs = all_signs(H.shape[1]).to(H.dtype)
    return torch.stack([(signs @ H[i, :, i, :].T).abs().sum(-1).mean() for i in range(H.shape[0])])


def all_signs(width: int) -> Tensor:
    """Every vector of signs of the given width, up to a common sign, which no norm sees; [2^(d-1), d]."""
    assert width <= LARGEST_ENUMERATION, f"2^{width} probes are too many to enumerate"
    return torch.tensor([(1, *rest) for rest in itertools.product((1, -1), repeat=width - 1)])


def low_rank_hessian(H: Tensor, omega: Tensor) -> Tensor:
    """H restricted to the range of Y = H Omega on both sides: Q B Q^T with B = Q^T H Q, which is P H P, P = Q Q^T.

    It depends on the range of Y alone, not on the basis Q. The Hessian covers as many positions as Omega does.

    H       [N, d, N, d]
    omega   [rank + oversampling, n, d], n <= N
    returns [n, d, n, d]
    """
    n, width = omega.shape[1:]
    flat = H[:n, :, :n, :].reshape(n * width, n * width)
    Y = flat @ omega.reshape(omega.shape[0], n * width).T
    P = Y @ torch.linalg.pinv(Y, rtol=1e-10)
    return (P @ flat @ P).reshape(n, width, n, width)


def gradient_squared(g: Objective, X: Tensor) -> Tensor:
    """S_i = |(dg/de_i)^2|_1, the sum of squares of token i's gradient; [N]."""
    X = X.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(g(X), X)
    return gradient.pow(2).sum(-1)


def curvature(
    model,
    ids: Tensor,
    target: Span,
    kind: str = "full",
    *,
    probes: Tensor | None = None,
    omega: Tensor | None = None,
    last_layers: int | None = None,
) -> Tensor:
    """S [n], n = start; `model` comes from `exact_model`.

    kind         "full" | "low_rank" (needs omega) | "gradient_squared"
    probes       [m, n or more, d] Rademacher vectors; None takes the exact expectation over them
    last_layers  differentiate by the hidden states that enter layer L - last_layers instead of the embeddings
    """
    n = target[0]
    if last_layers is None:
        g, X = embedding_objective(model, ids, target)
    else:
        g, X = layer_objective(model, ids, target, last_layers)
    if kind == "gradient_squared":
        return gradient_squared(g, X)[:n]
    H = hessian(g, X)
    if kind == "low_rank":
        H = low_rank_hessian(H, omega)
    return expected_block_curvature(H[:n]) if probes is None else block_curvature(H, probes[:, :n])


# ---------------------------------------------------------------------------------------------------------------------
# Information
# ---------------------------------------------------------------------------------------------------------------------


def mask_vector(model, mask: str, token: int | None = None) -> Tensor:
    """[d]: zero, the mean over the vocabulary, or the embedding of a token."""
    table = embed(model, torch.arange(model.get_input_embeddings().num_embeddings))
    return {"zero": torch.zeros_like(table[0]), "mean": table.mean(0), "token": table[token or 0]}[mask]


def information(model, ids: Tensor, target: Span, mask: str = "zero", token: int | None = None) -> Tensor:
    """I_i = sum_p KL(P_p || P_p with e_i masked), p over the predicting positions (Eq. 4); [n], n = start."""
    rows = predicting_positions(target)
    X = embed(model, ids[: target[1] - 1])
    replacement = mask_vector(model, mask, token)
    with torch.no_grad():
        original = next_token_log_probs(model, X)[rows]
        result = torch.zeros(target[0], dtype=torch.float64)
        for i in range(target[0]):
            masked = X.clone()
            masked[i] = replacement
            result[i] = kl(original, next_token_log_probs(model, masked)[rows]).sum()
    return result


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) of log-probabilities along the last axis, in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Score
# ---------------------------------------------------------------------------------------------------------------------


def combine(
    M: Tensor,
    S: Tensor,
    info: Tensor,
    beta: float = 0.5,
    gamma: float = 0.5,
    rescale: bool = False,
) -> Tensor:
    """Attr_i = M_i (beta S_i + gamma I_i)  (Eq. 5); `rescale` divides S and I by their own maxima first.

    M, S, info  [n]
    returns     [n]
    """
    if rescale:
        S, info = _by_maximum(S), _by_maximum(info)
    return M * (beta * S + gamma * info)


def _by_maximum(term: Tensor) -> Tensor:
    return term / term.max() if term.max() > 0 else term


def heta(
    model,
    ids: Tensor,
    target: Span,
    *,
    gate_kind: str | None = "flow",
    curvature_kind: str = "full",
    probes: Tensor | None = None,
    omega: Tensor | None = None,
    last_layers: int | None = None,
    mask: str = "zero",
    mask_token: int | None = None,
    beta: float = 0.5,
    gamma: float = 0.5,
    rescale: bool = False,
) -> dict[str, Tensor]:
    """All of HETA for one span; returns scores, gate, curvature and information, each [n] with n = start.

    Takes the model as it is, of any dtype, and works on float64 copies of it.
    """
    exact = exact_model(model)
    M = gate(read_dense(exact, ids), target, gate_kind)
    S = curvature(exact, ids, target, curvature_kind, probes=probes, omega=omega, last_layers=last_layers)
    info = information(exact, ids, target, mask, mask_token)
    return {
        "scores": combine(M, S, info, beta, gamma, rescale),
        "gate": M,
        "curvature": S,
        "information": info,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------------------------------


def windows(n: int, size: int, overlap: float = 0.5) -> list[Span]:
    """Windows [a, a + size) with a = 0, s, 2s, ..., s = size (1 - overlap), the last one cut at n (Algorithm 1)."""
    stride = max(1, round(size * (1 - overlap)))
    spans = [(0, min(size, n))]
    while spans[-1][1] < n:
        start = spans[-1][0] + stride
        spans.append((start, min(start + size, n)))
    return spans


def window_average(n: int, spans: list[Span], component: Callable[[int, int], Tensor]) -> Tensor:
    """Average, token by token, over the windows that hold the token; component(a, b) gives the values on [a, b)."""
    total, count = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for a, b in spans:
        total[a:b] += component(a, b)
        count[a:b] += 1
    return total / count.clamp(min=1)


def windowed_gate(mass: Tensor, spans: list[Span]) -> Tensor:
    """The mass of `flow_mass` or `per_head_mass`, cut to [n], normalised inside each window and averaged; [n]."""

    def inside(a: int, b: int) -> Tensor:
        part = mass[a:b]
        return part / part.sum() if part.sum() > 0 else part

    return window_average(mass.shape[0], spans, inside)


def windowed_low_rank(H: Tensor, omega: Tensor, spans: list[Span], probes: Tensor | None = None) -> Tensor:
    """Low-rank curvature with the Hessian, Omega and the probes restricted to each window, averaged; [n]."""

    def inside(a: int, b: int) -> Tensor:
        part = low_rank_hessian(H[a:b, :, a:b, :], omega[:, a:b])
        return expected_block_curvature(part) if probes is None else block_curvature(part, probes[:, a:b])

    return window_average(omega.shape[1], spans, inside)
