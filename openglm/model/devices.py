"""Device lists such as 4x24GB, 24GB,24GB or 8xV100-32GB: how much memory each has and how fast it is read.

    python -c "from openglm.model.devices import parse_devices; print(parse_devices('4xRTX3090'))"

1 GB is 10**9 bytes, 1 GiB 2**30. A card sold with 24 GB holds 24 GiB, 7 % more than 24 GB; with sizes in GB that
rest is left to the driver, the CUDA context and the allocator's gaps, which no part of a plan stands for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from openglm.config import nearest

__all__ = ["KNOWN_DEVICES", "Device", "parse_devices"]

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MAX_DEVICES = 4096
FORMS = "give 4x24GB, 24GB,24GB, 80GiB, 4x24GB@936GB/s or 4xRTX3090"

# Memory in GB and bandwidth in GB/s of the makers' data sheets (the SXM form where there are several).
KNOWN_DEVICES: dict[str, tuple[int, int]] = {
    "RTX2080Ti": (11, 616), "RTX3060": (12, 360), "RTX3090": (24, 936), "RTX4090": (24, 1008), "RTX5090": (32, 1792),
    "RTX-A6000": (48, 768), "T4": (16, 320), "A10": (24, 600), "L4": (24, 300), "L40S": (48, 864),
    "V100-16GB": (16, 900), "V100-32GB": (32, 900), "A100-40GB": (40, 1555), "A100-80GB": (80, 2039),
    "H100": (80, 3350), "H200": (141, 4800), "B200": (180, 7700), "MI300X": (192, 5300),
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """memory_bytes: what a plan may fill. bandwidth: bytes read a second, None where not known."""

    name: str
    memory_bytes: int
    bandwidth: float | None = None


def parse_devices(text: str) -> list[Device]:
    """Devices of a list such as "4x24GB" or "2xA100-40GB,80GB@2TB/s".

    Raises ValueError in one line for a device that is neither a size nor known, no memory, or no device at all.
    """
    devices: list[Device] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*×]\s*)?([^@]+?)\s*(?:@\s*([^@]+?))?\s*", item)
        if match is None:
            raise ValueError(f"{item!r} in the devices {text!r} is no device: {FORMS}")
        count = 1 if match[1] is None else int(match[1])
        if count < 1 or len(devices) + count > MAX_DEVICES:
            raise ValueError(f"{item.strip()!r}: between 1 and {MAX_DEVICES} devices can be planned for, not {count}")
        devices += [_device(match[2], match[3])] * count
    return devices


def _device(name: str, bandwidth: str | None) -> Device:
    known = {_key(n): n for n in KNOWN_DEVICES}.get(_key(name))
    speed = None if bandwidth is None else _speed(bandwidth)
    if known is not None:
        memory, listed = KNOWN_DEVICES[known]
        return Device(known, memory * UNITS["GB"], listed * 1e9 if speed is None else speed)
    size = _amount(name)
    if size is None:
        if re.fullmatch(r"\d+(\.\d+)?\s*([kKmMgGtT]i?)?", name):
            raise ValueError(f"a memory of {name!r} lacks its unit: {FORMS}")
        raise ValueError(f"unknown device {name!r}{nearest(name, list(KNOWN_DEVICES))}: {FORMS}")
    if size < 1:
        raise ValueError(f"a device of {name} has no memory: {FORMS}")
    return Device(name, int(size), speed)


def _key(name: str) -> str:
    return re.sub(r"nvidia|geforce|[-_ ]", "", name.lower())


def _speed(text: str) -> float:
    speed = _amount(text[:-2]) if text.lower().endswith("/s") else None
    if not speed:
        raise ValueError(f"a bandwidth looks like 936GB/s, not {text!r}")
    return speed


def _amount(text: str) -> float | None:
    """Bytes of "24GB" or "1.5 TiB"; None when it is no such thing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]i?[bB])", text)
    unit = {u.lower(): n for u, n in UNITS.items()}.get(match[2].lower()) if match else None
    return None if match is None or unit is None else float(match[1]) * unit
