"""What the connections of this package are protected against, where the user has asked Ray for TLS."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_RAY_TLS = "RAY_USE_TLS"


def asks_for_tls(environ: Mapping[str, str]) -> bool:
    """Return whether Ray encrypts its own connections; it reads the variable in the same way."""
    return environ.get(_RAY_TLS, "0").lower() in ("1", "true")


def warn_if_unencrypted(environ: Mapping[str, str]) -> None:
    """Log that only Ray's own connections are encrypted, where the user has asked for that.

    Reasons: docs/decisions/0008-control-connections-without-tls.md.
    """
    if asks_for_tls(environ):
        logger.warning(
            "VRA-337: RAY_USE_TLS=1 encrypts Ray's own connections. Those of this engine between nodes (control, "
            "message queues, HCCL) are authenticated at most, and not encrypted: encrypt the network between the nodes "
            "itself, as with WireGuard or IPsec."
        )
