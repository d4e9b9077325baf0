"""failover --test, verify --boot: does the guest boot from a point? A throw-away clone, without a network.

    serve its disks, overlays on them in a directory of its own, under a new name, UUID and MACs -> start
    -> agent, text on its console, or a program of the user's -> end the clone -> remove the directory, in any case

Nothing is restored: the clone reads its disks from the destination, and the overlays take what it writes.  Where points
can only be read in one go, they are restored first.

Nothing is changed at the destination, and the guest itself is not touched.  A run that is killed leaves the directory
and perhaps the clone, both with `-test-` in their names; the clone has no network.
"""

from __future__ import annotations

import os
import secrets
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.destination.reading import ReadableDestination
from snapchain.errors import InvalidInput, NotFound, SnapchainError, ToolFailed, Unavailable, Unsupported
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.protocol import State
from snapchain.host.directory import Directory
from snapchain.host.files import make_directories
from snapchain.host.hooks import missing, run_hook
from snapchain.host.os_errors import os_errors
from snapchain.host.qemu_processes import qemu_process, qemu_processes
from snapchain.host.readable import is_readable
from snapchain.host.virsh import Virsh
from snapchain.model.events import Event, Notice, OnEvent, ignore
from snapchain.model.guest_checks import CheckKind
from snapchain.ops import guest_checks
from snapchain.ops.failover.choose import choose
from snapchain.ops.failover.request import Skipped
from snapchain.ops.failover.served_disks import ServedDisks, socket_of
from snapchain.ops.failover.start import start_script
from snapchain.ops.guest_points import GuestView
from snapchain.ops.restore.guest import GuestRestoration, GuestRestoreRequest
from snapchain.ops.restore.guest_definition import safe_name

_POLL_SECONDS = 0.2
_PING_SECONDS = 2.0
_END_SECONDS = 30.0
_CONSOLE = "console.log"
_MOST_OF_A_CONSOLE = 64 << 20
_SHOWN_LINES, _SHOWN_BYTES = 20, 8 << 10

By = Literal["agent", "check", "running", "console"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest:
    """directory: in which the clone gets one of its own, which is removed at the end

    name: of the clone and its directory, as of `clone_name`; space: most bytes that its disks may take
    restores: restore its disks, although they could be served
    point: the text after '@'; proves: read all data of the points before one is chosen
    check: a program and its arguments; it is run until it exits with 0, in the place of waiting for the agent
    console_says: text that it writes to its first serial port, in the place of that
    seconds: for all of that; connect: the libvirt that starts the clone
    """

    directory: Path
    name: str | None = None
    point: str | None = None
    proves: bool = False
    restores: bool = False
    check: Sequence[str] = ()
    console_says: str | None = None
    seconds: float = 300.0
    space: int | None = None
    connect: str | None = None


class TrialReport(BaseModel):
    """What came of it.

    ok: whether it booted; by: what showed that: the agent, the check, its console, or that it runs, where it has none
    why_not: a sentence; boot_seconds: from the start of the clone; bytes_written: what its disks took here
    served: it read its disks from the destination; console: the last lines, where it did not boot
    """

    model_config = ConfigDict(frozen=True)

    destination: str
    guest: str
    guest_point: int
    time: datetime
    skipped: tuple[Skipped, ...]
    ok: bool
    by: By
    why_not: str | None
    boot_seconds: float
    bytes_written: int
    seconds: float
    served: bool = False
    console: tuple[str, ...] = ()


class TrialsReport(BaseModel):
    """Of several guests, one after the other."""

    model_config = ConfigDict(frozen=True)

    guests: tuple[TrialReport, ...]


def clone_name(guest: str) -> str:
    """A new name for a clone of a guest."""
    return f"{safe_name(guest.rpartition('/')[2], 'guest')}-test-{secrets.token_hex(4)}"


def remove_clone(directory: Path, *, connect: str | None, on_notice: Callable[[str], None]) -> None:
    """End the clone of a run that was killed, and remove its directory. Raises what keeps it from being removed."""
    if directory.is_dir():
        if any(directory.glob("*.xml")):
            with suppress(NotFound):
                Virsh(connect).text("destroy", "--domain", directory.name)
        for process in qemu_processes():
            if any(f"{directory}/" in word for word in process.argv):
                _end(process.pid)
        socket = socket_of(directory)
        if socket.exists():
            with os_errors(socket), Directory.open(socket.parent) as beside:
                beside.remove(socket.name)
        with os_errors(directory), Directory.open(directory.parent) as above:
            _empty(directory)
            above.remove_directory(directory.name)
        on_notice(f"{directory}: the clone of a run that was killed is removed")


def _end(pid: int) -> None:
    """Kill a process, and wait until it has ended."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            is_readable(fd, _END_SECONDS)
        finally:
            os.close(fd)


def trial(
    destination: ReadableDestination, view: GuestView, request: TrialRequest, *, on_event: OnEvent = ignore
) -> TrialReport:
    """Boot a clone, and remove it again. A guest that does not boot is a report, not an error.

    Raises as a restore of the guest, and ToolFailed for a check that is not installed.
    """
    begun = time.monotonic()
    if request.check and (error := missing("check", request.check)) is not None:
        raise error
    chosen = choose(destination, view, request.point, proves=request.proves)
    if request.check and request.console_says is not None:
        raise InvalidInput("a check and a text on the console are both wanted", hint="choose one")
    if request.console_says == "":
        raise InvalidInput("the text that the console is to say is empty", hint='such as "login:"')
    if chosen.record.kind == "qmp" and request.connect is not None:
        raise InvalidInput("the guest was not managed by libvirt", subject=view.name, hint="leave out --connect")
    name = request.name or clone_name(view.name)
    directory = request.directory.absolute() / name
    console = directory / _CONSOLE
    by: By = "running"
    why_not: str | None = None
    lines: tuple[str, ...] = ()
    notes: list[Event] = []
    is_libvirt = chosen.record.kind == "libvirt"
    # libvirt runs QEMU as another user, who has to reach its own files in there, and sees no others.
    with _removed(directory, 0o711 if is_libvirt else 0o700, on_event), ExitStack() as stack:
        restoration = GuestRestoration(
            destination,
            view,
            GuestRestoreRequest(
                directory=directory,
                point=str(chosen.point.point),
                new_name=name,
                without_network=True,
                console=console,
            ),
            on_event=on_event,
        )
        served: ServedDisks | None = None
        if not request.restores and _can_be_served(destination, restoration):
            # Events come from threads of the server: the caller gets them from this one.
            served = ServedDisks(destination, socket_of(directory), for_libvirt=is_libvirt, on_event=notes.append)
            stack.enter_context(served)
        else:
            _check_space(restoration.plan().bytes_to_write, request.space, view.name)
        restored = restoration.run(serve=None if served is None else served.make)
        if restored.definition is None:
            raise NotFound("the record has no definition, so nothing starts the guest", subject=view.name)
        images = list(restoration.outputs.values())
        started = time.monotonic()
        try:
            with _running(chosen.record.kind, Path(restored.definition), images, name, request) as address:
                limits = _Limits(started + request.seconds, console, images, request.space)
                by, why_not = _booted(address, name, request, limits)
                took = time.monotonic() - started
        except ToolFailed as error:
            took, why_not = time.monotonic() - started, error.message
        if why_not is not None:
            lines = _last_lines(console)
        written = restored.bytes_written if served is None else _taken(images)
    for event in notes:
        on_event(event)
    if why_not is not None and served is not None and served.failed_reads:
        why_not += f"; {served.failed_reads} reads of its disks failed"
    guest_checks.record(
        destination,
        view.name,
        CheckKind.BOOTED,
        ok=why_not is None,
        point=chosen.point.point,
        words=by if why_not is None else why_not,
        on_event=on_event,
    )
    return TrialReport(
        destination=destination.url,
        guest=view.name,
        guest_point=chosen.point.point,
        time=chosen.point.time,
        skipped=chosen.skipped,
        ok=why_not is None,
        by=by,
        why_not=why_not,
        boot_seconds=took,
        bytes_written=written,
        seconds=time.monotonic() - begun,
        served=served is not None,
        console=lines,
    )


def _can_be_served(destination: ReadableDestination, restoration: GuestRestoration) -> bool:
    try:
        for each in restoration.disks:
            destination.whole(each.recorded.disk, str(each.point.point))  # is not entered: raises where it cannot be
    except Unsupported:
        return False
    return True


def _check_space(need: int, space: int | None, guest: str) -> None:
    """Raises InvalidInput where the disks need more than they may take."""
    if space is not None and need > space:
        raise InvalidInput(
            f"the disks of its clone need {need} bytes, and may take {space}",
            subject=guest,
            hint="test it where there is more room",
        )


def _taken(images: Sequence[Path]) -> int:
    """Bytes that files take on their disk."""
    return sum(image.stat().st_blocks * 512 for image in images)


def _last_lines(console: Path) -> tuple[str, ...]:
    """What the guest wrote last; it may be anything."""
    try:
        with console.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _SHOWN_BYTES))
            text = file.read(_SHOWN_BYTES)
    except FileNotFoundError:  # it did not start
        return ()
    lines = [line.rstrip() for line in text.decode(errors="replace").splitlines()]
    return tuple([line for line in lines if line][-_SHOWN_LINES:])


@dataclass(frozen=True, slots=True)
class _Limits:
    """Of a clone. until: on the monotonic clock; console: its file; space: bytes that all images may take"""

    until: float
    console: Path
    images: Sequence[Path]
    space: int | None

    def exceeded(self) -> str | None:
        """A sentence about a clone that takes more of this host than it may."""
        if self.space is not None and (taken := _taken(self.images)) > self.space:
            return f"its disks have taken {taken} bytes, and may take {self.space}"
        with suppress(FileNotFoundError):
            if self.console.stat().st_size > _MOST_OF_A_CONSOLE:
                return f"it wrote more than {_MOST_OF_A_CONSOLE} bytes to its console"
        return None


def _booted(address: GuestAddress, name: str, request: TrialRequest, limits: _Limits) -> tuple[By, str | None]:
    """What showed that the clone has booted, and why it has not."""
    if request.check:
        facts = {"guest": name, "domain": address.domain, "qmp": address.qmp, "console": limits.console}
        return "check", _until(limits, lambda: _checked(request, facts))
    if request.console_says is not None:
        wanted = _Search(limits.console, request.console_says)
        return "console", _until(limits, wanted.missing)
    with open_guest(address) as guest:
        agent = guest.agent()
        if agent is None:
            state = guest.state()
            return "running", limits.exceeded() if state is State.RUNNING else f"it is {state.value}"
        return "agent", _until(limits, lambda: _answers(lambda: agent.ping(timeout=_PING_SECONDS)))


def _until(limits: _Limits, attempt: Callable[[], str | None]) -> str | None:
    """None as soon as an attempt gives that, else what the last one has said, or which limit was passed before."""
    while (exceeded := limits.exceeded()) is None:
        said = attempt()
        if said is None or time.monotonic() >= limits.until:
            return said
        time.sleep(_POLL_SECONDS)
    return exceeded


class _Search:
    """Looks for text in a file that grows; each byte is read once."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._wanted, self._text = path, text.encode(), text
        self._at, self._tail = 0, b""

    def missing(self) -> str | None:
        """None once the text is there."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._at)
            while data := file.read(1 << 20):
                self._at += len(data)
                if self._wanted in self._tail + data:
                    return None
                self._tail = (self._tail + data)[-len(self._wanted) :]
        return f"its console does not say {self._text!r}"


def _checked(request: TrialRequest, facts: Mapping[str, object]) -> str | None:
    try:
        run_hook("check", request.check, facts, timeout=request.seconds)
    except ToolFailed as error:
        return error.message
    return None


def _answers(ping: Callable[[], object]) -> str | None:
    try:
        ping()
    except Unavailable as error:
        return f"its agent does not answer: {error.message}"
    return None


# --- the clone, for the length of a block


@contextmanager
def _running(
    kind: str, definition: Path, images: Sequence[Path], name: str, request: TrialRequest
) -> Iterator[GuestAddress]:
    """Start the clone, and end it however the block ends. Raises ToolFailed where it does not start."""
    if kind == "libvirt":
        virsh = Virsh(request.connect)
        try:
            # Not defined: it is gone when it ends.
            virsh.text("create", "--file", str(definition), subject=name)
            yield GuestAddress(domain=name, connect=request.connect)
        finally:
            with suppress(NotFound):
                virsh.text("destroy", "--domain", name)
        return
    pid = start_script(definition, images)
    try:
        process = qemu_process(pid)
        if process is None or not process.qmp:
            raise ToolFailed("it has no QMP socket", argv=[str(definition)], status=0, stderr="", subject=name)
        yield GuestAddress(qmp=process.qmp[0], agent=process.agent, name=name)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def _removed(directory: Path, mode: int, on_event: OnEvent) -> Iterator[None]:
    """A new directory, and all that is in it, for the length of the block. mode: of the directory"""
    make_directories(directory.parent, mode=0o755)
    with os_errors(directory), Directory.open(directory.parent) as above:
        above.make_directory(directory.name, mode=mode, whatever_the_umask=True)
    try:
        yield
    finally:
        try:
            with os_errors(directory), Directory.open(directory.parent) as above:
                _empty(directory)
                above.remove_directory(directory.name)
        except SnapchainError as error:
            on_event(Notice(f"the clone's directory could not be removed: {error}"))


def _empty(directory: Path) -> None:
    with Directory.open(directory, follow=False) as here:
        for name in here.names():
            if stat.S_ISDIR(here.status(name).st_mode):
                _empty(directory / name)
                here.remove_directory(name)
            else:
                here.remove(name)
