"""Which NPUs of a process are those that Ray has assigned to it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_ray_ascend.devices.numbering import visible_of_physical
from vllm_ray_ascend.devices.visible import VARIABLE, entries
from vllm_ray_ascend.errors import DeviceMappingError


def assigned_devices(ids: Sequence[str], environ: Mapping[str, str]) -> list[int]:
    """Visible indices, as in ``npu:N``, of the NPUs with Ray's ``ids``.

    Ray counts them as the list of visible ones does. Where there is no list, a process sees them all, in their order:
    so it is with RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES, where Ray's own look-up fails.

    Raises DeviceMappingError where an id is no number, or not in the list.
    """
    visible = entries(environ.get(VARIABLE))
    numbers = [_number(each) for each in ids]
    if visible is None:
        return numbers
    usable = [_number(each) for each in visible]
    return [visible_of_physical(usable, number) for number in numbers]


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DeviceMappingError(
            f"{text!r} is no number of an NPU. `ray stop` on this node, name NPUs by their numbers in {VARIABLE} or "
            "unset it, and `ray start` again."
        ) from None
