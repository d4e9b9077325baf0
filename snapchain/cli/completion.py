"""What a shell offers for the start of an address: the disks of a destination, the points of a disk; and domains.

    snapchain restore /backup::<TAB>            web1/vda  web2/vda
    snapchain restore /backup::web1/vda@<TAB>   latest  nightly  1  2  3

Only directories are looked at, no server and no other host. An encrypted repository is opened if SNAPCHAIN_PASSWORD is
set. It takes two seconds at most; where anything is wrong, nothing is offered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from snapchain.errors import NotFound, SnapchainError

if TYPE_CHECKING:
    from snapchain.destination.protocol import Destination
    from snapchain.destination.records import PointRecord
    from snapchain.ops.guest_points import GuestPoint

SECONDS = 2.0
Offer = str | tuple[str, str]
"""A candidate, or one with its explanation."""
_VARIABLE = "_SNAPCHAIN_COMPLETE"
_SEPARATOR = re.compile(r":+|@|=")
_kept = ""
"""What stands before the part of the word that the shell replaces."""


def prepare(environment: MutableMapping[str, str]) -> None:
    """Join the words that bash has split at ':' and '@', so that the count of arguments is right.

    bash replaces the last piece alone, so what stands before it is remembered.
    """
    global _kept  # noqa: PLW0603 - one command line a process
    _kept = ""
    if environment[_VARIABLE] != "complete_bash":
        return
    given = environment.get("COMP_WORDS", "")
    pieces = given.split("\n" if "\n" in given else None)[: int(environment.get("COMP_CWORD", "0")) + 1]
    words: list[str] = []
    for at, piece in enumerate(pieces):
        glued = at and (_SEPARATOR.fullmatch(piece) or _SEPARATOR.fullmatch(pieces[at - 1]))
        words[-1:] = [words[-1] + piece] if glued else [*words[-1:], piece]
    if words and (end := max(words[-1].rfind(":"), words[-1].rfind("@")) + 1):
        _kept, words[-1] = words[-1][:end], words[-1][end:]
    environment.update({"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)})


def addresses(incomplete: str) -> list[Offer]:
    """Candidates for an address of which the shell has `incomplete`."""
    text = _kept + incomplete
    dest, mark, rest = text.rpartition("::")
    if not mark:
        return _files(text) if os.environ.get(_VARIABLE) == "complete_fish" else []  # other shells do it themselves
    disk, at, _ = rest.partition("@")
    found = _in_time(lambda: _points(dest, disk) if at else _disks(dest))
    return [(value.removeprefix(_kept), words) if words else value.removeprefix(_kept) for value, words in found]


def domains(incomplete: str, connect: str | None) -> list[Offer]:
    """Candidates for the name of a libvirt domain. connect: URI, None for the one that `--domain` asks by default."""
    text = _kept.removeprefix("--domain=") + incomplete
    found = _in_time(lambda: [(name, "") for name in _domains(connect)])
    return [name.removeprefix(_kept) for name, _ in found if name.startswith(text)]


def _domains(connect: str | None) -> list[str]:
    from snapchain.host.virsh import Virsh

    return Virsh(connect, read_only=os.geteuid() != 0).names("list", "--all", "--name")


def _files(text: str) -> list[Offer]:
    folder, name = os.path.split(text)
    with suppress(OSError), os.scandir(folder or ".") as entries:
        found = [entry for entry in entries if entry.name.startswith(name) and (name or entry.name[0] != ".")]
        return sorted(os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "") for entry in found)  # noqa: PTH118 - as it was typed
    return []


def _disks(dest: str) -> list[tuple[str, str]]:
    from snapchain.destination.guest_record import guest_of
    from snapchain.ops.guest_points import guests_of

    disks = _opened(dest).disks()
    guests = [(f"{dest}::{guest.name}", "guest") for guest in guests_of(disks) if guest.points]
    return [*guests, *((f"{dest}::{disk.name}", "") for disk in disks if guest_of(disk.name) is None)]


def _points(dest: str, disk: str) -> list[tuple[str, str]]:
    from snapchain.cli.quantities import moment
    from snapchain.ops.guest_points_merge import guest_at

    place = _opened(dest)
    points: list[PointRecord | GuestPoint] = []
    try:
        points.extend(place.disks(disk)[0].points)
    except NotFound:
        points.extend(guest_at(place, disk).points)
    names = {"latest": "the newest point"}
    for point in reversed(points):
        names |= {str(point.point): moment(point.time)}
        names |= {label: f"point {point.point}" for label in point.labels if label not in names}
    return [(f"{dest}::{disk}@{name}", words) for name, words in names.items()]


def _opened(dest: str) -> Destination:
    """Raises NotFound for what is not a directory here."""
    from snapchain.destination.address import located
    from snapchain.destinations import open_destination

    url = located(dest)
    if not Path(url.removeprefix("file://").removeprefix("dir:")).is_dir():
        raise NotFound("not a directory", subject=dest)
    return open_destination(url, passphrase=lambda: os.environ.get("SNAPCHAIN_PASSWORD") or None)


def _in_time(look: Callable[[], list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """What `look` finds within SECONDS, else nothing. It may hang in a file system that does not answer."""
    found: list[tuple[str, str]] = []

    def run() -> None:
        with suppress(SnapchainError, OSError):
            found.extend(look())

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return [] if thread.is_alive() else found
