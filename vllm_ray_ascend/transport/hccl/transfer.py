"""What a communicator does for one call: handed to the device, waited for, within a limit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_ray_ascend.transport.hccl.group import Group
    from vllm_ray_ascend.transport.hccl.lane import Mark


class Transfer:
    """A send, receive or collective that has been handed to the device."""

    def __init__(
        self, group: Group, what: str, mark: Mark | None, before: Mark | None = None, keep: Sequence[Any] = ()
    ) -> None:
        self.what, self.mark, self.before, self.keep = what, mark, before, keep
        self.waiting = 0  # threads
        self._group = group
        self.limit_by(group.limit_s)

    def limit_by(self, limit_s: float) -> None:
        """Count from now."""
        self.limit_s, self.end = limit_s, time.monotonic() + limit_s

    def done(self) -> bool:
        """Whether the device is past it, well or not."""
        return self._group.done(self)

    def wait(self, limit_s: float | None = None) -> None:
        """Wait until any stream may use the tensors: ``limit_s`` seconds from now, or the group's since the beginning.

        Raises TransferLateError, TransferAbortedError or HcclError, and with the first and the last the group is at
        its end.
        """
        self._group.wait(self, limit_s)
