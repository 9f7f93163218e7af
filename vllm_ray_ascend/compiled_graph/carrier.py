"""A worker's tensors for the next stage become an answer of the graph, and those of the one before an argument."""

from __future__ import annotations

from typing import Any

_NOTHING = "nothing"
"""The name of the one number that a step without tensors carries: each step sends some (transport.context)."""


class Carrier:
    """Stands in for the transfers of vLLM's pipeline group: vLLM's own worker runs a step, and the graph carries.

    The group's `isend_tensor_dict` and `irecv_tensor_dict` are what vLLM's and vllm-ascend's workers call in 0.23 to
    0.33. Whole tensors travel: vLLM's own transfers send each tensor parallel rank's share and gather there.
    """

    def __init__(self, group: Any, nothing: Any) -> None:
        """``nothing``: the tensor that is sent where there is none."""
        self._nothing = nothing
        self._incoming: dict[str, Any] | None = None
        self._outgoing: dict[str, Any] = {}
        for name in ("irecv_tensor_dict", "isend_tensor_dict"):
            if not hasattr(group, name):
                raise AttributeError(f"vLLM's pipeline group has no {name}")
        group.irecv_tensor_dict, group.isend_tensor_dict = self._receive, self._send

    def bring(self, tensors: dict[str, Any] | None) -> None:
        """What the worker will receive in the step that comes."""
        self._incoming = {name: tensor for name, tensor in (tensors or {}).items() if name != _NOTHING}
        self._outgoing = {}

    def take(self) -> dict[str, Any]:
        """What the worker has sent in the step that was."""
        outgoing, self._outgoing, self._incoming = self._outgoing, {}, None
        return outgoing or {_NOTHING: self._nothing}

    def _receive(self, *_: Any, **__: Any) -> tuple[dict[str, Any], list[Any], list[Any]]:
        tensors, self._incoming = self._incoming, None
        if not tensors:
            raise RuntimeError(
                "this stage has a batch to compute and got no tensors for it: the stage before it had none. The "
                "stages' schedules differ; see the first error in the log of that stage's rank."
            )
        return tensors, [], []

    def _send(self, tensors: dict[str, Any], *_: Any, **__: Any) -> list[Any]:
        self._outgoing = dict(tensors)
        return []
