"""Lists of hosts and networks, as a person writes them: example.org, *.example.org, 127.0.0.1:8000, 10.0.0.0/8."""

from __future__ import annotations

import fnmatch
import ipaddress
from collections.abc import Iterable

__all__ = ["IpAddress", "Rules"]

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Rules:
    """A list of hosts and networks. An entry is a name, a pattern such as *.example.org, or a network, with or without
    a port. ValueError for what is none of these.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        self.hosts: list[tuple[str, int | None]] = []
        for entry in entries:
            self._add(entry.strip().lower())

    def _add(self, entry: str) -> None:
        try:
            self.networks.append(ipaddress.ip_network(entry))
            return
        except ValueError:
            pass
        host, port = entry, None
        if entry.startswith("[") and "]" in entry:
            host, _, rest = entry[1:].partition("]")
            port = rest.removeprefix(":") or None
        elif entry.count(":") == 1:
            host, port = entry.split(":")
        valid = host and not set(host) & set("/@ \t") and (port is None or (port.isdecimal() and 0 < int(port) < 65536))
        if not valid:
            raise ValueError(f"{entry!r} is no host (name or name:port) and no network (such as 10.0.0.0/8)")
        self.hosts.append((host.rstrip("."), int(port) if port else None))

    def has_host(self, host: str, port: int) -> bool:
        return any(fnmatch.fnmatchcase(host, name) and number in (None, port) for name, number in self.hosts)

    def has_address(self, address: IpAddress) -> bool:
        return any(address.version == network.version and address in network for network in self.networks)

    def __bool__(self) -> bool:
        return bool(self.networks or self.hosts)
