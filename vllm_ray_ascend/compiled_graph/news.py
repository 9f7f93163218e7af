"""Which steps say nothing to the workers. Pure.

With a pipeline vLLM schedules as many steps ahead as there are stages: behind the only request's step comes one of no
tokens. It would go through all stages, and take their NPUs' and hosts' time from the step that it follows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_NO_NEWS = {"num_common_prefix_blocks"}
"""Of the requests that are scheduled: where there are none, a list of zeros."""


def says_nothing(scheduled: Any) -> bool:
    """Whether a SchedulerOutput (vLLM 0.23 to 0.33) has no tokens, no request that ended, nothing for a connector."""
    if dataclasses.is_dataclass(scheduled):
        names = (field.name for field in dataclasses.fields(scheduled))
        return all(says_nothing(getattr(scheduled, name)) for name in names if name not in _NO_NEWS)
    return not scheduled
