"""Derivatives of a bridge: its forward pass is torch operations too, the user's hooks included."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flashtrace_plugin.models.derive.runner import HuggingFace


class BridgeRunner(HuggingFace):
    """A TransformerBridge as a :class:`~flashtrace_plugin.models.derive.runner.Runner`.

    Booting puts the bridge's components, with their hook points, in the place of the modules of ``original_model``;
    running that model therefore runs the bridge, without the formats that the bridge's own ``forward`` adds.
    """

    own_kernel = False

    def __init__(self, bridge: Any) -> None:
        super().__init__(bridge.original_model)
        head = getattr(self.model.get_output_embeddings(), "original_component", None)
        self.head = head.weight if type(head) is nn.Linear else None

    def vectors(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings().original_component(ids)
