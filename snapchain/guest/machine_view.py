"""What a guest sees of its machine, as QEMU tells it: compared on both hosts of a move before anything is sent.

QEMU compares little of it. What was plugged in since its start is not in the command line, and the guest's memory is
refused when all of it was sent. What was unplugged is there again. A medium that was changed is the old one there. And
no QEMU notices that a processor lacks an instruction that the guest has been using.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

from snapchain.guest.qmp import Monitor, Refused

_FOLDERS = "/machine/peripheral", "/machine/peripheral-anon"
_CHILD = re.compile(r"child<(.*)>")
_DEVICE, _CPUID, _MEDIUM = "device ", "CPUID ", "medium in "


def devices_of(monitor: Monitor) -> dict[str, str]:
    """QOM path -> type, of the devices of the command line and those plugged in later."""
    found = {}
    for folder in _FOLDERS:
        for each in monitor.rows("qom-list", {"path": folder}):
            if (kind := _CHILD.fullmatch(str(each.get("type")))) is not None:
                found[f"{folder}/{each.get('name')}"] = kind[1]
    return found


def machine_view(monitor: Monitor) -> dict[str, str]:
    """A line for each device, for the processors, for each of their feature words, and for each removable medium."""
    return {**_devices(monitor), **_processors(monitor), **_media(monitor)}


def _devices(monitor: Monitor) -> dict[str, str]:
    found = {}
    anonymous: Counter[str] = Counter()
    for path, kind in devices_of(monitor).items():
        name = path.rpartition("/")[2]
        if path.startswith(_FOLDERS[1]):  # their numbers say only when they were made
            anonymous[kind] += 1
            name = f"{kind} without an id, number {anonymous[kind]}"
        found[f"{_DEVICE}{name}"] = kind
    return found


def _processors(monitor: Monitor) -> dict[str, str]:
    rows = monitor.rows("query-cpus-fast")
    found = {"number of processors": str(len(rows))}
    path = rows[0].get("qom-path") if rows else None
    with suppress(Refused):  # not every architecture has both
        found["type of its processors"] = str(monitor.execute("qom-get", {"path": path, "property": "type"}))
        for word in monitor.execute("qom-get", {"path": path, "property": "feature-words"}):
            eax, ecx, register = (word.get(f"cpuid-{name}") for name in ("input-eax", "input-ecx", "register"))
            if word.get("features"):
                found[f"{_CPUID}{eax:#x}.{ecx or 0:#x} {register}"] = f"{word['features']:#x}"
    return found


def _media(monitor: Monitor) -> dict[str, str]:
    found = {}
    for row in monitor.rows("query-block"):
        inserted = row.get("inserted")
        if row.get("removable") is True and isinstance(inserted, Mapping):
            found[f"{_MEDIUM}{row.get('device') or row.get('qdev')}"] = str(inserted.get("file"))
    return found


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """What the guest would find changed at the destination: sentences. More features of a processor are no harm."""
    found = []
    lost = [key for key, value in here.items() if key.startswith(_CPUID) and _lacks(value, there.get(key, "0x0"))]
    if lost:
        words = ", ".join(f"{key.removeprefix(_CPUID)}: {_lacks(here[key], there.get(key, '0x0')):#x}" for key in lost)
        found.append(f"the processors there lack features that the guest has here (CPUID {words})")
    for key, value in here.items():
        other = there.get(key)
        if key.startswith(_CPUID) or other == value:
            continue
        if other is not None:
            found.append(f"{key}: {other} there, and {value} here")
        else:
            found.append(f"{key} ({value}) is not there")
    found += [
        f"{key} ({value}) is there, and was unplugged here"
        for key, value in there.items()
        if key.startswith(_DEVICE) and key not in here
    ]
    return found


def _lacks(here: str, there: str) -> int:
    """The bits that are set here, and not there. Raises ValueError for what are no numbers."""
    return int(here, 16) & ~int(there, 16)
