"""What tells this machine from others, and by which of its network interfaces an address is reached. No torch."""

import ipaddress
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


def machine_id() -> str:
    """The same for all processes that share a running system and its network, whatever the machine is called.

    Two containers on one machine, with a network each, are two machines.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    return socket.gethostname()


def interface_of(address: str) -> str | None:
    """The network interface that has this address: gloo would take the one that the host's name resolves to."""
    wanted = ipaddress.ip_address(address)
    interfaces: Mapping[str, Any] = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        for entry in addresses:
            with suppress(ValueError):
                if ipaddress.ip_address(entry.address.partition("%")[0]) == wanted:
                    return name
    return None
