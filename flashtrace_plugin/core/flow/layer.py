"""What one transformer layer has to tell: the record that every method works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.pattern import ChannelFlow, Pattern


@dataclass(frozen=True)
class Layer:
    """One layer of one sequence of N tokens, named as TransformerLens names its hook points.

    The rows are the query positions that a method may put weight on (target and reasoning), the columns are
    all N positions. For every row i the record closes::

        z^h_i = z_gate^h_i ⊙ sum_j A^h[i,j] v^h_j
        resid_mid_i = resid_pre_i + post_scale_i * post_gain ⊙ ( b_O + sum_h z^h_i W_O^h )
        resid_post_i = resid_mid_i + mlp_out_i + edit_i

    pattern:    rows of A       see :class:`~flashtrace_plugin.core.flow.pattern.Pattern`, or the coefficients of what
                                has no pattern, which may be negative, see :mod:`.recurrence`
    v:          [H_kv, N, d_h]  values that attention reads, KV heads not repeated
    W_O:        [H, d_h, d]     output projection by head
    b_O:        [d]             its bias, or None
    resid_pre:  [rows, d]       residual stream before attention
    resid_mid:  [rows, d]       after attention
    resid_post: [rows, d]       after the MLP
    mlp_out:    [rows, d]       what the MLP adds to the stream, as it was seen
    post_gain:  [d]             gain of a norm after attention, or a constant multiplier; None: 1
    post_scale: [rows]          1/rms of that norm, taken from the forward pass; None: 1
    z_gate:     [H, rows, d_h]  multiplies what a head has read, before the output projection (Qwen3-Next); None: 1.
                                Where there is no pattern, it is always given
    out_scale:  float           the next layer reads the stream times this (Gemma 4); ``resid_post`` is before it
    edit:       [rows, d]       what else was put into the stream before the next layer reads it; None: nothing. See
                                :func:`flashtrace_plugin.core.flow.edits.with_edits`
    """

    pattern: Pattern | ChannelFlow
    v: Tensor
    W_O: Tensor
    b_O: Tensor | None
    resid_pre: Tensor
    resid_mid: Tensor
    resid_post: Tensor
    mlp_out: Tensor
    post_gain: Tensor | None = None
    post_scale: Tensor | None = None
    z_gate: Tensor | None = None
    out_scale: float = 1.0
    edit: Tensor | None = None

    @property
    def n_heads(self) -> int:
        return self.W_O.shape[0]

    def attention_weights(self, weights: Tensor) -> Tensor:
        """Row weights as attention sees them: w_i s_i (Eq. 13). weights and result: [B, rows]"""
        return weights if self.post_scale is None else weights * self.post_scale.float()

    def output_map(self) -> Tensor:
        """W_O with the post-norm gain folded in, float32. result: [H, d_h, d]"""
        W_O = self.W_O.float()
        return W_O if self.post_gain is None else W_O * self.post_gain.float()

    def output_bias(self) -> Tensor:
        """b_O with the post-norm gain folded in, float32. result: [d]"""
        if self.b_O is None:
            return torch.zeros(self.W_O.shape[-1], dtype=torch.float32, device=self.W_O.device)
        b_O = self.b_O.float()
        return b_O if self.post_gain is None else b_O * self.post_gain.float()
