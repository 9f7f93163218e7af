"""Which Ray cluster a driver joins, where vLLM leaves it to ray.init(). Pure."""

from __future__ import annotations

from collections.abc import Collection

from vllm_ray_ascend.compat.ray_processes import Raylet
from vllm_ray_ascend.compat.start_method import RAY_ADDRESS
from vllm_ray_ascend.errors import ClusterResourceError

LOCAL = "local"
_CLIENT = "ray://"
_GCS_PORT = 6379


def choose_address(
    given: str | None, recorded: str | None, raylets: Collection[Raylet], needs_local_raylet: bool
) -> str | None:
    """Return the address to give ray.init(); None for what it does by itself.

    ``given`` is the user's, by argument or RAY_ADDRESS; ``recorded`` the one that `ray start` has left on this machine.
    ``needs_local_raylet``: whether Ray joins only where it sees the process of a raylet.

    Raises ClusterResourceError where Ray would fail later without naming the cause, and where it would start a
    cluster of its own beside several that run on this machine: two engines could then open one NPU.
    """
    if given is not None and given.startswith(_CLIENT):
        raise ClusterResourceError("VRA-352", _client_message(given))
    if given == LOCAL:
        return given
    if given or recorded:
        if needs_local_raylet and not raylets:
            raise ClusterResourceError("VRA-353", no_raylet_message(given or recorded or ""))
        return given
    near = sorted({raylet.gcs_address for raylet in raylets if raylet.is_near})
    if len(near) > 1:
        raise ClusterResourceError(
            "VRA-354",
            f"{len(near)} Ray clusters run on this machine ({', '.join(near)}), and none is chosen: Ray would start "
            f"another one, and its engines open NPUs that are in use. Set {RAY_ADDRESS}={near[0]}, or that of another "
            f"of them; {RAY_ADDRESS}={LOCAL} starts one of its own all the same.",
        )
    return near[0] if near else None


def no_raylet_message(address: str) -> str:
    """Return the text for a machine on which no node of the cluster at ``address`` runs."""
    join = "HEAD:6379" if address == "auto" else address
    return (
        f"No Ray node runs on this machine, where an engine has to start: join the cluster first, `ray start "
        f"--address={join}`, or run this on one of its nodes. In a container, that has to be the one that runs Ray."
    )


def _client_message(address: str) -> str:
    host = address.removeprefix(_CLIENT).partition("/")[0].rpartition(":")[0] or "HEAD"
    return (
        f"{RAY_ADDRESS}={address} is the address of Ray's client server. An engine shares memory with its workers and "
        f"runs on a node of the cluster: start it there, with {RAY_ADDRESS}={host}:{_GCS_PORT} (as `ray status` and "
        "`ray start` show it), or hand it to Ray with `ray job submit`."
    )
