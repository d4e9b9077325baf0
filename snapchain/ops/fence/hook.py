"""The hook of libvirt that refuses to start a guest whose disks another host has taken over.

    /etc/libvirt/hooks/qemu.d/snapchain     a small script; libvirt (6.5 and later) runs each file of this folder

libvirt runs it before it starts a domain (`prepare begin`), with the domain's XML on stdin; an exit code other than 0
stops the start.  It looks at the marks beside the images, and asks the destinations that it was installed with, within
a short bound.  A hook that fails in another way must not keep guests from starting: then it only says so.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from pydantic import BaseModel, ConfigDict

from snapchain.destination.writing import Writing
from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError, Unavailable
from snapchain.host.directory import Directory
from snapchain.host.files import make_directories, read_small, remove, write_in
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import resolve
from snapchain.host.terminal import shell_line
from snapchain.image import scan
from snapchain.model.guest_state import GuestStanding, describe_takeover
from snapchain.ops.fence.mark import is_replaced
from snapchain.ops.restore import domain_xml
from snapchain.source.handed_over import epoch_of_overlay
from snapchain.source.notes import Notes
from snapchain.source.ownership import check_not_given, describe_gift, epoch_of

FOLDER = Path("/etc/libvirt/hooks/qemu.d")
NAME = "snapchain"
SECONDS = 5.0
"""How long a start may wait for the destinations, all together."""
_OURS = "# snapchain: refuses the start of a guest that another host has taken over."
REFUSALS = "|".join(str(each.exit_code) for each in (Conflict, Corrupt, Unavailable))
_LARGEST_XML = 4 << 20
_CAP = 64 << 10
_POOLS = Path("/run/libvirt/storage"), Path("/etc/libvirt/storage")
"""Where libvirt keeps its active pools, and the defined ones."""


class HookReport(BaseModel):
    """path: of the script; text: what it is, or would be; installed: whether it is there now"""

    model_config = ConfigDict(frozen=True)

    path: str
    text: str
    installed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HookRequest:
    """at: destinations that it asks; options: for their passphrases; requires_answer: refuse where one is silent"""

    at: Sequence[str] = ()
    options: Sequence[str] = ()
    requires_answer: bool = False
    folder: Path = FOLDER


def script(request: HookRequest) -> str:
    """The text of the hook."""
    words = [sys.executable, "-m", "snapchain", "fence"]
    for dest in request.at:
        words += ["--at", dest]
    words += [*(["--require-answer"] if request.requires_answer else []), *request.options]
    return (
        "#!/bin/sh\n"
        f"{_OURS}\n"
        "# Made by `snapchain fence --install-hook`; remove it with `snapchain fence --remove-hook`.\n"
        '[ "$2" = prepare ] && [ "$3" = begin ] || exit 0\n'
        f'{shell_line(words)} "--hook=$1"\n'
        # Anything else, such as a snapchain that is not installed any more, must keep no guest from starting.
        f"case $? in {REFUSALS}) exit 1 ;; esac\nexit 0\n"
    )


def plan(request: HookRequest) -> HookReport:
    """What `install` would do. Raises Conflict for a file that snapchain did not make."""
    path = request.folder / NAME
    _check_ours(path)
    return HookReport(path=str(path), text=script(request), installed=False)


def install(request: HookRequest) -> HookReport:
    """Write the hook, in the place of an older one of ours. Raises Conflict for a file that snapchain did not make."""
    path = request.folder / NAME
    _check_ours(path)
    make_directories(request.folder, mode=0o755)
    text = script(request)
    with os_errors(path), Directory.open(request.folder) as folder:
        write_in(folder, NAME, text.encode(), prepare=lambda fd: os.fchmod(fd, 0o755))
    return HookReport(path=str(path), text=text, installed=True)


def uninstall(request: HookRequest) -> HookReport:
    """Remove the hook. Raises NotFound, and Conflict for a file that snapchain did not make."""
    path = request.folder / NAME
    if not os.path.lexists(path):
        raise NotFound("there is no such hook", subject=path)
    _check_ours(path)
    remove(path)
    return HookReport(path=str(path), text="", installed=False)


def requires_answer(folder: Path = FOLDER) -> bool:
    """Whether a hook of ours is there that lets no guest start before all of its destinations have answered."""
    try:
        text = read_small(folder / NAME, cap=_CAP).decode(errors="replace")
    except SnapchainError:
        return False
    return _OURS in text and "--require-answer" in text and "--at" in text


def _check_ours(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if _OURS.encode() not in read_small(path, cap=_CAP):
        raise Conflict(
            "snapchain did not make this file, and replaces no hook of others",
            subject=path,
            hint="rename it: libvirt runs every file of this folder",
        )


# --- what the hook does


def check(guest: str, xml: str, places: Sequence[Callable[[], Writing]], *, requires_answer: bool = False) -> list[str]:
    """Judge the start of a guest; sentences about what could not be looked at.

    xml: of the domain; places: destinations to ask
    Raises Conflict or Corrupt where another host has taken over one of its disks; Conflict where one may do so by a
    lease; Unavailable where answers are required and a destination gives none in time.
    """
    notes: list[str] = []
    disks = _disks(xml, guest)
    images = [(image, kind) for source, kind in disks if (image := _image(source, notes)) is not None]
    epochs = [epoch for image, kind in images if (epoch := _looked_at(image, kind, notes)) is not None]
    # A block device is written in the first epoch, as only files are handed over; of other sources nothing is known.
    if not places or not (images or any(source.get("dev") for source, _ in disks)):
        return notes
    answers, silent = _asked(guest, places)
    notes += silent
    for standing in answers:
        if is_replaced(standing, max(epochs, default=1)):
            raise Conflict(
                f"{describe_takeover(standing)}; the images here are of epoch {max(epochs, default=1)}",
                subject=guest,
                hint="start it on that host; `snapchain fence IMAGE DEST::DISK` shows what is here besides",
            )
        if (lease := standing.lease) is not None and not lease.is_witness:
            # Whoever takes the guest over by it waits for guards that a new QEMU has not yet.
            raise Conflict(
                f"a lease of it is recorded, by which another host may take it over: of {lease.host}",
                subject=guest,
                hint="its watch ends the lease in a moment; where none runs, start it, and then the guest",
            )
    # Of each destination: the silent one may be the one at which another host has taken the guest over.
    if requires_answer and silent:
        raise Unavailable(
            f"it is not known whether another host runs it: {silent[0]}",
            subject=guest,
            hint="start it when all destinations answer; or install the hook without --require-answer",
        )
    return notes


def _disks(xml: str, guest: str) -> list[tuple[ET.Element, str | None]]:
    """Where the disks are that the guest may write to, each with its format, None where the definition has none."""
    root = domain_xml.parse(xml[:_LARGEST_XML], subject=guest)
    found = []
    for disk in root.iterfind("devices/disk"):
        source, driver = disk.find("source"), disk.find("driver")
        if source is not None and disk.get("device", "disk") == "disk" and disk.find("readonly") is None:
            kind = None if driver is None else driver.get("type")
            found.append((source, kind if kind in ("qcow2", "raw") else None))
    return found


def _image(source: ET.Element, notes: list[str]) -> Path | None:
    """The file of a disk, where it is one. libvirt names a volume by its pool still when it runs the hook."""
    if path := source.get("file"):
        return Path(path)
    pool, volume = source.get("pool"), source.get("volume")
    if not pool or not volume:
        return None
    for folder in _POOLS:  # libvirt's own records: it cannot be asked from its hook
        with suppress(SnapchainError, ET.ParseError):
            described = ET.fromstring(read_small(folder / f"{Path(pool).name}.xml", cap=_CAP))  # noqa: S314 - root's
            directory = next((each.findtext("path") for each in described.iter("target")), None)
            if directory and (image := Path(directory) / volume).is_file():
                return image
    notes.append(f"volume {volume} of pool {pool} was not looked at: it is no file that could be found")
    return None


def _looked_at(image: Path, image_format: str | None, notes: list[str]) -> int | None:
    """The epoch of an image. Raises Conflict where another host has it, Corrupt for a mark that cannot be read."""
    try:
        with scan(image, format=image_format) as chain:
            check_not_given(chain)
            return epoch_of(chain, Notes())
    except (Conflict, Corrupt):
        raise
    except SnapchainError as error:
        notes.append(f"only its own note was looked at: {error}")
    return _own_epoch(image, notes)


def _own_epoch(image: Path, notes: list[str]) -> int | None:
    """By the note of the image alone, where its chain cannot be read. Raises Conflict."""
    try:
        with os_errors(image):
            found = resolve(image)
        note, epoch = Notes().of(found), epoch_of_overlay(found.real)
    except SnapchainError as error:
        notes.append(f"it was not looked at: {error}")
        return None
    if note.given is not None and note.given.epoch >= max(note.epoch, epoch):
        raise Conflict(describe_gift(note.given), subject=image, hint="start it on the host that has it now")
    return max(note.epoch, epoch)


def _asked(guest: str, places: Sequence[Callable[[], Writing]]) -> tuple[list[GuestStanding], list[str]]:
    """How the guest stands at the destinations that answer in time, and a sentence for each of the others."""
    answers: list[GuestStanding] = []
    silent: dict[int, str] = dict.fromkeys(range(len(places)), "a destination did not answer in time")

    def ask(number: int, opened: Callable[[], Writing]) -> None:
        try:
            answers.append(opened().guest_state(guest))
            silent.pop(number, None)
        except NotFound:  # it keeps nothing of this guest
            silent.pop(number, None)
        except SnapchainError as error:
            silent[number] = str(error)

    threads = [threading.Thread(target=ask, args=each, daemon=True) for each in enumerate(places)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return list(answers), list(silent.values())
