"""Hosts, destinations and a guest without a QEMU, for the model of who may write its disks (test_masters_model.py).

A host is a directory with its own images, notes and state; a destination is a replica in the directory of a host, or a
repository beside them.  All that is asked here is asked of snapchain's own code.  The guest writes one pattern a block.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from snapchain.destination.protocol import Destination
from snapchain.errors import NotFound, SnapchainError, Unavailable
from snapchain.host.channel import Channel
from snapchain.host.retry import RetryPolicy
from snapchain.image import scan
from snapchain.model.guest_state import GuestStanding
from snapchain.objects.local import LocalStore
from snapchain.ops import guest_places
from snapchain.ops.failover import choose
from snapchain.ops.fence import hook
from snapchain.ops.migrate import run as migration
from snapchain.ops.other_destinations import Reach
from snapchain.replica import catalogue as replica_catalogue, guest_states as replica_guest_states, handover
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.repository import disk_writer, guest_states as repository_guest_states, leases
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.repository import Repository
from snapchain.source import ownership
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.notes import Notes
from snapchain.source.ownership import epoch_of
from tests.ops.guest_points import GUEST, Guest
from tests.ops.killing import CALLS, _dying as dying
from tests.ops.stacks import qemu_img
from tests.repository.synthetic import again, repository

BLOCK, BLOCKS = 64 << 10, 4
Content = tuple[int, ...]
"""The pattern of each block; the same on all disks, so that a guest point of two instants is seen."""


def killed_after(work: Callable[[], object], step: int) -> None:
    """Run it in a forked child that dies before its n-th call that changes a file, or comes to its end unheard."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)  # of a lock that a thread held at the fork nobody would ever let go
            dying(work, step)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


CLOCKS = (
    choose, disk_writer, handover, leases, migration, ownership, replica_catalogue, replica_guest_states,
    repository_guest_states,
)  # fmt: skip
"""What asks for the time."""


def _clock(world: World) -> type[datetime]:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(hours=world.skew.get(world.host, 0))

    return Clock


class Died(BaseException):
    """The process on one side was killed; nothing that it does afterwards has an effect."""


@dataclass
class Copy:
    """A set of the guest's images on a host. content: what they must show"""

    host: str
    images: dict[str, Path]
    content: Content

    @property
    def is_there(self) -> bool:
        return all(image.exists() for image in self.images.values())

    def epoch(self) -> int:
        found = []
        for image in self.images.values():
            with scan(image) as chain:
                found.append(epoch_of(chain, Notes()))
        return max(found)


@dataclass
class World:
    """hosts: their names; at: the replicas, by the host that has them; names: of the disks

    cut: pairs of a host and a destination between which nothing passes; skew: hours by which a host's clock is wrong
    """

    root: Path
    patch: pytest.MonkeyPatch
    hosts: tuple[str, ...]
    replicas: tuple[str, ...]
    has_repository: bool
    names: tuple[str, ...] = ("vda", "vdb")
    cut: set[tuple[str, str]] = field(default_factory=set)
    skew: dict[str, int] = field(default_factory=dict)
    host: str = ""
    receivers: dict[int, str] = field(default_factory=dict)
    _made: Repository | None = None

    def __post_init__(self) -> None:
        self.host = self.hosts[0]
        for name in self.hosts:
            (self.root / name).mkdir()
        self.patch.setattr(socket, "gethostname", self._hostname)
        self.patch.setattr(guest_places, "open_other", self._opened)
        for call in ("fsync", "fdatasync"):
            self.patch.setattr(os, call, lambda _fd: None)  # processes die here, machines keep their power
        for module in CLOCKS:
            self.patch.setattr(module, "datetime", _clock(self))
        if self.has_repository:
            self._made = repository(LocalStore(self.root / "repository", make=True))

    @contextmanager
    def on(self, host: str) -> Iterator[None]:
        """What is done within the block is done on that host."""
        before, self.host = self.host, host
        with pytest.MonkeyPatch.context() as patch:
            for name in ("STATE", "CACHE"):
                patch.setenv(f"XDG_{name}_HOME", str(self.root / host / name.lower()))
            try:
                yield
            finally:
                self.host = before

    def _hostname(self) -> str:
        """Of the host whose process asks: a receiver is on the host of its replica."""
        thread = threading.current_thread()
        return self.receivers.get(thread.ident or 0, self.host) if thread.name == "receiver" else self.host

    # --- destinations

    def url(self, place: str) -> str:
        if place != "repository":
            return f"dir:{self.root / place}"
        assert self._made is not None
        return self._made.store.url

    def reach(self, *without: str) -> Reach:
        """How a host reaches all destinations. without: those for which a person vouches"""
        return Reach(opens=self._opened, without=[self.url(place) for place in without])

    def _opened(self, url: str) -> Destination:
        return self.destination(next(place for place in self.places if self.url(place) == url))

    @property
    def places(self) -> list[str]:
        return [*(f"{host}/replica" for host in self.replicas), *(["repository"] if self.has_repository else [])]

    def endpoint(self, place: str, dies: int = 0) -> Line:
        return Line(self, self.root / place, place=place, dies=dies)

    def destination(self, place: str) -> Destination:
        if place != "repository":
            found = ReplicaDestination(self.endpoint(place))
            found._policy = RetryPolicy(give_up_after=0.0)
            return found
        if (self.host, place) in self.cut:
            raise Unavailable("the link is cut", subject=place)
        assert self._made is not None
        return RepositoryDestination(again(self._made))

    def destination_here(self, place: str) -> Destination:
        """As an observer reaches it whom no cut concerns, until it is asked."""
        before, self.cut = self.cut, set()
        try:
            found = self.destination(place)
        finally:
            self.cut = before
        return found if place == "repository" else ReplicaDestination(Line(self, self.root / place))

    def standing(self, place: str) -> GuestStanding | None:
        """As an observer sees it whom no cut concerns."""
        try:
            return self.destination_here(place).guest_state(GUEST)
        except NotFound:
            return None

    # --- who may write

    def may_start(self, copy: Copy, answers: Callable[[str], GuestStanding | None], *, requires_answer: bool) -> bool:
        """Whether the hook lets a guest start on these images. (QEMU may be root, whom no mode of a file stops.)"""
        places = [Asked(place, answers) for place in self.places]
        with self.on(copy.host):
            try:
                hook.check(GUEST, xml_of(copy), places, requires_answer=requires_answer)
            except SnapchainError:
                return False
        return True

    def candidates(self, copies: list[Copy]) -> list[Copy]:
        """All sets of images that somebody might start: those known, and those that killed runs have left."""
        found = [copy for copy in copies if copy.is_there]
        for host in self.replicas:
            images = {}
            for name in self.names:
                catalogue = self.root / host / "replica" / f"{GUEST}%2F{name}" / "catalogue.json"
                handed = json.loads(catalogue.read_text())["handover"] if catalogue.exists() else None
                overlay = catalogue.parent / handed["overlay"] if handed else None
                if overlay is not None and overlay.exists():
                    images[name] = overlay
            found += [Copy(host, {name: path}, ()) for name, path in images.items()]
        for host in self.hosts:
            for out in (self.root / host).glob("out-*"):
                for name in self.names:
                    found += [Copy(host, {name: each}, ()) for each in out.glob(f"{name}*.qcow2")]
        return found

    def masters(
        self, copies: list[Copy], *, requires_answer: bool, is_cut: bool = False, is_silent: bool = False
    ) -> dict[str, set[str]]:
        """disk -> the hosts on which the code lets a guest start that writes it.

        is_cut: as the links are, else all are up; is_silent: nobody can ask anything, so only marks count
        """
        known = {place: self.standing(place) for place in self.places}
        found: dict[str, set[str]] = {name: set() for name in self.names}
        for copy in self.candidates(copies):

            def answers(place: str, host: str = copy.host) -> GuestStanding | None:
                if is_silent or (is_cut and (host, place) in self.cut):
                    raise Unavailable("the link is cut", subject=place)
                return known[place]

            if self.may_start(copy, answers, requires_answer=requires_answer):
                for name in copy.images:
                    found[name].add(copy.host)
        return found


@dataclass
class Asked:
    """A destination of which only the state of the guest is asked."""

    place: str
    answers: Callable[[str], GuestStanding | None]

    def __call__(self) -> Any:
        return self

    def guest_state(self, guest: str) -> GuestStanding:
        found = self.answers(self.place)
        if found is None:
            raise NotFound(f"there is no guest {guest!r} here", subject=self.place)
        return found


class Line(DirectoryEndpoint):
    """A replica behind a link that may be cut, and whose receiver may die before its n-th step (0: never)."""

    def __init__(self, world: World, directory: Path, *, place: str = "", dies: int = 0) -> None:
        super().__init__(directory)
        self._world, self._place, self._dies = world, place, dies
        self._on = directory.parent.name

    @contextmanager
    def connect(self) -> Iterator[Channel]:
        if (self._world.host, self._place) in self._world.cut:
            raise Unavailable("the link is cut", subject=self.url)
        dies, self._dies = self._dies, 0
        if not dies:
            with self._received() as channel:
                yield channel
            return
        with pytest.MonkeyPatch.context() as patch:
            done = 0

            def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **named: Any) -> Any:
                    nonlocal done
                    if threading.current_thread().name == "receiver":
                        done += 1
                        if done >= dies:
                            raise Died
                    return real(*arguments, **named)

                return call

            for name in CALLS:
                patch.setattr(os, name, wrapped(getattr(os, name)))
            try:
                with self._received() as channel:
                    yield channel
            except Died as death:
                raise Unavailable("the other side has ended", subject=self.url) from death

    @contextmanager
    def _received(self) -> Iterator[Channel]:
        before = set(threading.enumerate())
        with super().connect() as channel:
            mine = next(each for each in threading.enumerate() if each not in before and each.name == "receiver")
            self._world.receivers[mine.ident or 0] = self._on
            yield channel


def xml_of(copy: Copy) -> str:
    disks = "".join(f"<disk type='file' device='disk'><source file='{path}'/></disk>" for path in copy.images.values())
    return f"<domain><name>{GUEST}</name><devices>{disks}</devices></domain>"


def write(copy: Copy, block: int, pattern: int) -> None:
    """The guest writes one block of each disk."""
    for image in copy.images.values():
        io(image, f"write -P {pattern} {block * BLOCK} {BLOCK}")
    copy.content = (*copy.content[:block], pattern, *copy.content[block + 1 :])


def shows(image: Path, content: Content) -> bool:
    """Whether an image reads as it must, by QEMU."""
    return io(image, *(f"read -P {pattern} {at * BLOCK} {BLOCK}" for at, pattern in enumerate(content)), reads=True)


def io(image: Path, *commands: str, reads: bool = False) -> bool:
    given = [part for command in commands for part in ("-c", command)]
    mode = ["-r"] if reads else ["-t", "unsafe"]
    argv = ["qemu-io", "-U", *mode, "-f", "qcow2", *given, str(image)]
    if not reads:
        argv.remove("-U")
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert reads or done.returncode == 0, done.stderr
    assert "can't open" not in done.stderr, done.stderr
    return done.returncode == 0 and "failed" not in done.stdout + done.stderr


def made_copy(world: World, host: str) -> Copy:
    """The guest's first images."""
    place = world.root / host / "images"
    place.mkdir()
    images = {}
    for name in world.names:
        images[name] = place / f"{name}.qcow2"
        shutil.copy(_template(world.root), images[name])
    return Copy(host, images, (0,) * BLOCKS)


def _template(root: Path) -> Path:
    found = root / "template.qcow2"
    if not found.exists():
        qemu_img("create", "-q", "-f", "qcow2", found, str(BLOCKS * BLOCK))
    return found


def ship(world: World, copy: Copy, place: str, number: int) -> None:
    """Seal all disks and ship a guest point."""
    shipper = Guest.__new__(Guest)
    shipper.place, shipper.names, shipper.guest, shipper.images = (
        world.root / copy.host,
        world.names,
        GUEST,
        copy.images,
    )
    for image in copy.images.values():
        ImageAtRest(image).seal()
    hours = timedelta(hours=world.skew.get(copy.host, 0), minutes=number)
    shipper.ship(world.destination(place), number, time=datetime(2026, 11, 1, tzinfo=UTC) + hours, host=copy.host)


__all__ = ["BLOCKS", "Copy", "World", "made_copy", "ship", "shows", "write"]
