"""Who can reach a port."""

from __future__ import annotations

import ipaddress

from nih_sched.errors import UsageError
from nih_sched.settings import Settings


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check(settings: Settings) -> None:
    """Hold --metrics-host against the password.

    Raises:
        UsageError: others could read the metrics without one.
    """
    guarded = settings.dashboard_password or settings.dashboard_token
    if settings.metrics_port is not None and not guarded and not is_loopback(settings.metrics_host):
        raise UsageError(
            reason=f"Others can reach {settings.metrics_host!r}: metrics need a password there. "
            "Set NIH_SCHED_DASHBOARD_PASSWORD or NIH_SCHED_DASHBOARD_TOKEN, or use 127.0.0.1."
        )
