"""Never two masters: a model of hosts, destinations, failures and people, over the code that really decides.

One guest with two disks.  Its hosts are directories with their own images, notes and state (tests/ops/masters.py), its
destinations are replicas on these hosts, or a repository.  Commands are killed at a file change (in a child), receivers
die at one, answers are lost, another host acts just before the question that decides, links are cut, clocks are wrong
by hours, and the first images come back from an older copy.  After each step these must hold:

one_master  For each disk, at most one host has images on which snapchain lets a guest start: no mark says that another
            host has them, and no destination is in a later epoch.
            - With --require-answer: of hosts that reach their destinations, and of hosts that do not.
            - Without: as long as each host reaches its destinations.  Behind a cut link such a host goes by its marks:
              they are there after a handover, and after one refusal; after a failover of which it has not heard, only
              the fence keeps it down.
one_guest   The guest runs on at most one host, unless a person has vouched wrongly that the old one is gone.  Nothing
            here stops a guest that runs already: that is what the fence program is for.
ship        One epoch of a destination is one host's.  Nothing is written there in an older one.
failover    Without proof nothing changes.  What is taken over reads as the guest point that was named.
settle      In the end all links are up, and each interrupted command is run again, or else undone.  Then exactly one
            host has the guest, with all disks, and these read as the guest last saw them: what it wrote on the image
            that moved, or the point that a failover has named.  The loss is what the failover has stated.
restores    Every point that was published reads as the guest's disk of its moment.

What is assumed, and true only because a person or a program sees to it:
- What a person vouches for about a destination that does not answer is true: the guest was not taken over there. One
  that was retired takes nothing over as long as it cannot ask all others.
- A guest is started through the hook, or by snapchain.  Bare QEMU asks nobody.
- After a failover was withdrawn, a person names the epoch, on the host that was the master before.
- Destinations do not go back in time.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snapchain.errors import Conflict, NotFound, SnapchainError, Unavailable
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.retry import RetryPolicy
from snapchain.image import scan
from snapchain.model.guest_state import GuestStanding, GuestState, Vouched
from snapchain.ops import failback
from snapchain.ops.failback import PrepareRequest
from snapchain.ops.failover.request import FailoverReport, FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.fence.returned import FenceRequest, run as fence_run
from snapchain.ops.migrate import ready, run as migration
from snapchain.ops.migrate.run import MigrateRequest, Move
from snapchain.ops.restore.run import Restoration
from snapchain.ops.retire import RetireRequest, retire
from snapchain.replica import disk_writer
from snapchain.repository import guest_states
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.ownership import check_not_given, note_epoch
from tests.exhaustive import examples
from tests.memory import scratch
from tests.ops.guest_points import GUEST, instant
from tests.ops.masters import BLOCKS, Content, Copy, World, killed_after, made_copy, ship, shows, write

PLACE = scratch()
QUESTIONS: tuple[tuple[Any, str], ...] = (
    (migration, "ask_for_handover"),
    (disk_writer, "guest_at"),
    (guest_states, "change"),
)
"""The calls that decide who the master is."""
WORD = Vouched(how="person", who="root@there", words="it burnt down")


@dataclass(frozen=True)
class Fault:
    """kind: none, killed (all processes of the command), died (the receiver), lost (the answer)

    or meanwhile: another host acts just before the question that decides
    """

    kind: str = "none"
    step: int = 0


NONE = Fault()
FAULTS = st.one_of(
    st.just(NONE),
    st.just(NONE),
    st.builds(Fault, st.just("killed"), st.integers(1, 90)),
    st.builds(Fault, st.just("died"), st.integers(1, 40)),
    st.just(Fault("lost")),
    st.just(Fault("meanwhile")),
)


@dataclass
class Pending:
    """A command that was interrupted. again, undo: what a person does about it."""

    name: str
    again: Callable[[], None]
    undo: Callable[[], None]


class Masters(RuleBasedStateMachine):
    """Two hosts, each with a replica.

    running: number of a copy -> the locks of its guest; blind: of those, which nobody could be asked about
    unaware: hosts whose images may lack the mark of what has become of them
    points: what each point must show; writers: of each destination, the host of each epoch
    """

    hosts: tuple[str, ...] = ("a", "b")
    replicas: tuple[str, ...] = ("a", "b")
    has_repository = False

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="masters-", dir=PLACE))
        self.patch = pytest.MonkeyPatch()
        once = RetryPolicy(give_up_after=0.0)
        self.patch.setattr(migration, "_HANDOVER", once)
        for module in (ready, failback):
            self.patch.setattr(module, "RetryPolicy", lambda: once)
        self.world = World(self.root, self.patch, self.hosts, self.replicas, self.has_repository)
        self.copies = [made_copy(self.world, self.hosts[0])]
        self.running: dict[int, ExitStack] = {}
        self.blind: set[int] = set()
        self.lied = False
        self.points: dict[tuple[str, str], Content] = {}
        self.writers: dict[str, dict[int, str]] = {place: {1: self.hosts[0]} for place in self.world.places}
        self.pending: list[Pending] = []
        self.backup: Path | None = None
        self.number = 0
        self.requires_answer = True
        self.unaware: set[str] = set()
        self.withdrew = self.moved = False
        self.without: tuple[str, ...] = ()
        self.retired: set[str] = set()

    @initialize(requires_answer=st.booleans(), ships=st.sampled_from([True, True, False]))
    def begin(self, requires_answer: bool, ships: bool) -> None:
        self.requires_answer = requires_answer
        if ships:
            for at in range(len(self.world.places)):
                self.ship(0, at, NONE)

    def teardown(self) -> None:
        try:
            self.settle()
            self.restores()
        finally:
            self.clear()

    def clear(self) -> None:
        for number in list(self.running):
            self._stop(number)
        self.patch.undo()
        shutil.rmtree(self.root, ignore_errors=True)

    # --- the guest

    def _copy(self, which: int) -> int:
        """The newest first, of those that are there."""
        there = [number for number, copy in enumerate(self.copies) if copy.is_there]
        return there[-1 - which % len(there)]

    @rule(which=st.integers(0, 5))
    def start(self, which: int) -> None:
        self._start(self._copy(which))

    def _start(self, number: int) -> None:
        copy = self.copies[number]
        if number in self.running:
            return

        def answers(place: str) -> Any:
            if (copy.host, place) in self.world.cut:
                raise Unavailable("the link is cut", subject=place)
            return self.world.standing(place)

        if not self.world.may_start(copy, answers, requires_answer=self.requires_answer):
            return
        if not self.requires_answer and any((copy.host, place) in self.world.cut for place in self.world.places):
            self.blind.add(number)
        with suppress(SnapchainError):
            self._open(number)

    def _open(self, number: int) -> None:
        """As QEMU, which locks all images."""
        with ExitStack() as locks:
            for image in self.copies[number].images.values():
                locks.enter_context(ImageLock(image, LockMode.WRITE))
            self.running[number] = locks.pop_all()

    def _stop(self, number: int) -> None:
        self.running.pop(number, ExitStack()).close()
        self.blind.discard(number)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 5))
    def stop(self, which: int) -> None:
        self._stop(sorted(self.running)[which % len(self.running)])

    @rule(which=st.integers(0, 5), block=st.integers(0, BLOCKS - 1))
    def write(self, which: int, block: int) -> None:
        number = self._copy(which)
        if number not in self.running:
            self.start(which)
        if number not in self.running:
            return
        self.number += 1
        self.running.pop(number).close()  # it would keep out qemu-io, which is the guest here
        write(self.copies[number], block, self.number % 255 + 1)
        self._open(number)

    # --- snapchain

    def _run(self, host: str, work: Callable[[], Any], fault: Fault, *, meanwhile: Callable[[], Any] = int) -> Any:
        """What the command returned; None where it was refused, interrupted, or its answer is not known."""
        with self.world.on(host), pytest.MonkeyPatch.context() as patch:
            if fault.kind == "killed":
                killed_after(work, fault.step)
                return None
            for module, name in QUESTIONS if fault.kind in ("lost", "meanwhile") else ():
                real = getattr(module, name)
                patch.setattr(module, name, _lost(real) if fault.kind == "lost" else _after(meanwhile, real, name))
            try:
                return work()
            except SnapchainError:
                return None

    def _dies(self, fault: Fault) -> int:
        return fault.step if fault.kind == "died" else 0

    @rule(which=st.integers(0, 5), at=st.integers(0, 3), fault=FAULTS)
    def ship(self, which: int, at: int, fault: Fault) -> None:
        copy, place = self.copies[self._copy(which)], self.world.places[at % len(self.world.places)]
        self._stop(self._copy(which))
        self.number += 1
        number, content, epoch = self.number, copy.content, copy.epoch()
        self.points[place, instant(number)] = content

        def work() -> bool:
            ship(self.world, copy, place, number)
            return True

        if self._run(copy.host, work, fault):
            self._wrote(place, epoch, copy.host)
            there = max(each.epoch for each in self.world.destination_here(place).disks())
            assert max(1, there) == epoch, f"{copy.host} wrote to {place} in epoch {epoch}, and it is in {there}"

    def _wrote(self, place: str, epoch: int, host: str) -> None:
        """One epoch of a destination belongs to one host, and nobody writes there in an older one."""
        writers = self.writers[place]
        assert epoch >= max(writers), f"{host} wrote to {place} in epoch {epoch}, and it is in {max(writers)}"
        owner = writers.setdefault(epoch, host)
        assert owner == host, f"{host} wrote to {place} in epoch {epoch}, which is {owner}'s"

    @precondition(lambda self: self.replicas)
    @rule(
        which=st.integers(0, 5),
        at=st.integers(0, 2),
        stops=st.sampled_from([True, True, False]),
        vouches=st.booleans(),
        fault=FAULTS,
    )
    def migrate(self, which: int, at: int, stops: bool, vouches: bool, fault: Fault) -> None:
        if stops:
            self._stop(self._copy(which))
        copy, host = self.copies[self._copy(which)], self.replicas[at % len(self.replicas)]
        if host != copy.host and not self._is_alone(copy.host, f"{host}/replica"):
            with self._vouching(copy.host, f"{host}/replica", vouches, known=copy.epoch()):
                self._migrate(copy, host, fault, is_first=True)

    @contextmanager
    def _vouching(self, host: str, place: str, vouches: bool, *, known: int) -> Iterator[None]:
        """A person says of all destinations that are silent that they need not answer: only where that is true.

        place: where something is decided, and so not one of the others; known: the newest epoch that the host has seen
        """
        silent = self._silent(host, place)
        if vouches and self._is_true(host, place, known=known):
            self.without = silent
        try:
            yield
        finally:
            self.without = ()

    def _silent(self, host: str, place: str) -> tuple[str, ...]:
        return tuple(each for each in self.world.places if (host, each) in self.world.cut and each != place)

    def _is_true(self, host: str, place: str, *, known: int) -> bool:
        """Whether the guest was taken over at no destination that the host cannot ask, or is being taken over there."""
        silent = self._silent(host, place)
        heard = [self._epoch_at(each) for each in self.world.places if each not in silent]
        newest = max(known, *heard)
        standings = [self.world.standing(each) for each in silent]
        return not any(
            each is not None and (each.epoch > newest or each.state in (GuestState.PROMOTING, GuestState.SWITCHED))
            for each in standings
        )

    def _migrate(
        self, copy: Copy, host: str, fault: Fault, *, is_first: bool = False, moves: Any = migration.migrate
    ) -> bool:
        place = f"{host}/replica"
        request = self._moves(copy)
        content = copy.content
        report = self._run(copy.host, lambda: moves(request, self.world.endpoint(place, self._dies(fault))), fault)
        if report is None:
            if is_first and fault.kind != "none":
                self.pending.append(
                    Pending(
                        f"migrate from {copy.host} to {host}",
                        lambda: self._again(copy.is_there and self._migrate(copy, host, NONE, moves=moves)),
                        lambda: self._again(self._take_back(copy, host, NONE)),
                    )
                )
            return False
        self.moved = True
        images = {name: Path(each.overlay) for name, each in zip(copy.images, report.disks, strict=True)}
        self._register(Copy(host, images, content))
        return True

    def _moves(self, copy: Copy) -> MigrateRequest:
        moves = [Move(path, f"{GUEST}/{name}") for name, path in copy.images.items()]
        return MigrateRequest(moves=moves, reach=self.world.reach(*self.without))

    def _again(self, is_done: bool) -> None:
        if not is_done:
            raise Unavailable("it was refused")

    def _register(self, copy: Copy) -> int:
        """The number of these images, which may be known already."""
        for number, each in enumerate(self.copies):
            if (each.host, each.images) == (copy.host, copy.images):
                return number
        self.copies.append(copy)
        return len(self.copies) - 1

    @precondition(lambda self: self.moved)
    @rule(which=st.integers(0, 5), at=st.integers(0, 2), fault=FAULTS)
    def take_back(self, which: int, at: int, fault: Fault) -> None:
        copy, host = self.copies[self._copy(which)], self.replicas[at % len(self.replicas)]
        if not self._take_back(copy, host, fault) and fault.kind != "none":
            self.pending.append(
                Pending(
                    f"take back to {copy.host} from {host}",
                    lambda: self._again(self._take_back(copy, host, NONE)),
                    lambda: None,
                )
            )

    def _take_back(self, copy: Copy, host: str, fault: Fault) -> bool:
        place = f"{host}/replica"
        request = self._moves(copy)
        work = lambda: migration.take_back(request, self.world.endpoint(place, self._dies(fault)))  # noqa: E731
        there = [each for each in self.copies if each.host == host and each.is_there]
        done = self._run(copy.host, work, fault) is not None
        for each in there if done else ():
            assert each.is_there or each.content == copy.content, "what the guest wrote there was lost"
        return done

    def _hosts_for(self, place: str) -> tuple[str, ...]:
        return self.hosts if place == "repository" else (place.partition("/")[0],)

    @rule(
        by=st.integers(0, 2),
        at=st.integers(0, 3),
        proof=st.sampled_from(["fence", "fence", "lie", "word", "false", "none"]),
        vouches=st.booleans(),
        fault=FAULTS,
    )
    def failover(self, by: int, at: int, proof: str, vouches: bool, fault: Fault) -> None:
        place = self.world.places[at % len(self.world.places)]
        host = self._hosts_for(place)[by % len(self._hosts_for(place))]
        if self._is_alone(host, place) or (proof in ("lie", "word") and not self._is_true(host, place, known=1)):
            return
        with self._vouching(host, place, vouches and proof == "fence", known=1):
            self._failover(place, host, proof, fault, is_first=True)

    def _epoch_at(self, place: str) -> int:
        standing = self.world.standing(place)
        return 1 if standing is None else standing.epoch

    def _failover(self, place: str, host: str, proof: str, fault: Fault, *, is_first: bool = False) -> bool:
        if proof == "fence":  # the old host is down
            for number in list(self.running):
                if self.copies[number].host != host:
                    self._stop(number)
        elif proof in ("lie", "word"):
            self.lied = True
        self.unaware |= {*self.hosts} - {host} if proof not in ("none", "false") else set()
        directory = self.root / host / f"out-{place.replace('/', '-')}"
        before = self.world.standing(place)

        def work() -> FailoverReport:
            request = FailoverRequest(
                directory=directory,
                host=host,
                vouched=WORD if proof in ("lie", "word") else None,
                fence={"fence": ["true"], "false": ["false"]}.get(proof, []),
                reach=self.world.reach(*self.without),
            )
            return Failover(self.world.destination(place), GUEST, request).run()

        def meanwhile() -> None:
            others = [each for each in self._hosts_for(place) if each != host]
            if others:
                self._failover(place, others[0], "fence", NONE)
            for copy in self.copies:
                if copy.host not in (host, *others) and copy.is_there:
                    self._migrate(copy, host, NONE)

        before = self.world.standing(place)
        report = self._run(host, work, fault, meanwhile=meanwhile)
        now = self.world.standing(place)
        if proof in ("false", "none"):
            assert report is None
            assert now is None or before is None or now.number == before.number, "done without proof"
        if (
            fault.kind != "meanwhile"
            and now is not None
            and now.master == host
            and (before is None or before.number != now.number)
        ):
            if before is None or now.epoch > before.epoch:
                assert now.epoch not in self.writers[place], f"epoch {now.epoch} of {place} was another host's already"
            self.writers[place][now.epoch] = host
        if report is None:
            if is_first and fault.kind != "none" and now is not None and now.state is GuestState.PROMOTING:
                self.pending.append(
                    Pending(
                        f"failover by {host} at {place}",
                        lambda: self._again(self._failover(place, host, "fence", NONE)),
                        lambda: self._again(self._withdraw(place, host, NONE)),
                    )
                )
            return False
        self._took_over(place, host, report)
        return True

    def _took_over(self, place: str, host: str, report: FailoverReport) -> None:
        images = {each.name: Path(each.path or "") for each in report.disks}
        content = self.points[place, report.instant]
        for path in images.values():
            known = any(path in copy.images.values() for copy in self.copies)
            assert known or shows(path, content), "what was taken over does not read as the point that was named"
        self._start(self._register(Copy(host, images, content)))

    @precondition(lambda self: any(len(writers) > 1 for writers in self.writers.values()))
    @rule(by=st.integers(0, 2), at=st.integers(0, 3), fault=FAULTS)
    def withdraw(self, by: int, at: int, fault: Fault) -> None:
        place = self.world.places[at % len(self.world.places)]
        host = self._hosts_for(place)[by % len(self._hosts_for(place))]
        self._withdraw(place, host, fault)

    def _withdraw(self, place: str, host: str, fault: Fault) -> bool:
        self.withdrew = True
        directory = self.root / host / f"out-{place.replace('/', '-')}"

        def work() -> Any:
            request = FailoverRequest(directory=directory, host=host, vouched=WORD, reach=self.world.reach())
            return Failover(self.world.destination(place), GUEST, request).withdraw()

        return self._run(host, work, fault) is not None

    @rule(which=st.integers(0, 5), at=st.integers(0, 3), keeps=st.booleans(), fault=FAULTS)
    def fence(self, which: int, at: int, keeps: bool, fault: Fault) -> None:
        copy, place = self.copies[self._copy(which)], self.world.places[at % len(self.world.places)]
        disks = [(path, f"{GUEST}/{name}") for name, path in copy.images.items()]

        def work() -> Any:
            return fence_run(FenceRequest(disks=disks, host=copy.host, keeps_tail=keeps), self.world.destination(place))

        self._run(copy.host, work, fault)

    @precondition(lambda self: self.replicas and len(self.copies) > 1)
    @rule(which=st.integers(0, 5), fault=FAULTS)
    def failback(self, which: int, fault: Fault) -> None:
        """A guest that runs elsewhere comes back to the host of its first images, as a difference."""
        first, copy = self.copies[0], self.copies[self._copy(which)]
        if first.host not in self.replicas or copy.host == first.host:
            return
        if self._is_alone(copy.host, f"{first.host}/replica"):
            return
        self._stop(self._copy(which))
        endpoint = self.world.endpoint(f"{first.host}/replica")
        request = PrepareRequest(disks=[(path, f"{GUEST}/{name}") for name, path in first.images.items()])
        if self._run(first.host, lambda: failback.prepare(request, endpoint), NONE) is not None:
            self._migrate(copy, first.host, fault, is_first=True, moves=failback.run)

    @precondition(lambda self: self.withdrew)
    @rule()
    def name_the_epoch(self) -> None:
        """What a person does after a failover was withdrawn, for the host that was the master before it."""
        for place in self.world.places:
            self._name_the_epoch(place)

    def _name_the_epoch(self, place: str) -> None:
        now = self.world.standing(place)
        is_withdrawn = now is not None and now.state is GuestState.PROTECTED and now.former and now.master
        if now is None or not is_withdrawn or now.epoch < max(map(self._epoch_at, self.world.places)):
            return
        for copy in self.copies:
            if copy.host == now.master and copy.is_there and copy.epoch() == now.epoch - 2:
                with self.world.on(copy.host), suppress(Conflict):
                    for image in copy.images.values():  # as `ship --epoch` does it
                        with scan(image) as chain:
                            check_not_given(chain)
                        note_epoch(image, now.epoch)

    @rule(which=st.integers(0, 5))
    def seal(self, which: int) -> None:
        copy = self.copies[self._copy(which)]
        for image in copy.images.values():
            self._run(copy.host, ImageAtRest(image).seal, NONE)

    @precondition(lambda self: self.world.cut)
    @rule(by=st.integers(0, 2), at=st.integers(0, 3), lost=st.integers(0, 2))
    def retire(self, by: int, at: int, lost: int) -> None:
        """A person says of a silent destination that it never comes back; it does, later."""
        host, place = self.hosts[by % len(self.hosts)], self.world.places[at % len(self.world.places)]
        silent = self._silent(host, place)
        if not silent or (host, place) in self.world.cut or not self._is_true(host, place, known=1):
            return
        gone = silent[lost % len(silent)]
        asked = RetireRequest(destination=self.world.url(gone), reach=self.world.reach())
        if self._run(host, lambda: retire(self.world.destination(place), GUEST, asked), NONE) is not None:
            self.retired.add(gone)

    def _is_alone(self, host: str, place: str) -> bool:
        return place in self.retired and bool(self._silent(host, place))

    # --- the world

    @rule(by=st.integers(0, 2), at=st.integers(0, 3))
    def cut(self, by: int, at: int) -> None:
        place = self.world.places[at % len(self.world.places)]
        self.world.cut.add((self.hosts[by % len(self.hosts)], place))

    @precondition(lambda self: self.world.cut)
    @rule()
    def heal(self) -> None:
        self.world.cut.clear()

    @rule(by=st.integers(0, 2), hours=st.sampled_from([-5, 0, 7]))
    def clock(self, by: int, hours: int) -> None:
        self.world.skew[self.hosts[by % len(self.hosts)]] = hours

    @precondition(lambda self: self.backup is None)
    @rule()
    def back_up(self) -> None:
        self.backup = self.root / "backup"
        shutil.copytree(self.copies[0].images["vda"].parent, self.backup, copy_function=shutil.copy2)
        self.backed_up = self.copies[0].content

    @precondition(lambda self: self.backup is not None and 0 not in self.running and (self.moved or self.pending))
    @rule()
    def restore_old(self) -> None:
        """The directory of the first images with all its notes, as it once was."""
        place = self.copies[0].images["vda"].parent
        shutil.rmtree(place)
        assert self.backup is not None
        shutil.copytree(self.backup, place, copy_function=shutil.copy2)
        self.unaware.add(self.copies[0].host)
        self.copies[0].content = self.backed_up

    # --- what must hold

    @invariant()
    def one_master(self) -> None:
        silent = self.world.masters(self.copies, requires_answer=False, is_silent=True)
        for found in (
            self.world.masters(self.copies, requires_answer=True, is_cut=True),
            self.world.masters(self.copies, requires_answer=False),
            {disk: hosts - self.unaware for disk, hosts in silent.items()},
        ):
            for disk, hosts in found.items():
                assert len(hosts) <= 1, f"{' and '.join(sorted(hosts))} may write {disk}"

    @invariant()
    def one_guest(self) -> None:
        """See the module."""
        if not self.lied:
            running = {self.copies[number].host for number in self.running if number not in self.blind}
            assert len(running) <= 1, f"the guest runs on {running}"

    def settle(self) -> None:
        """All links are up again, and somebody ends what was interrupted."""
        self.world.cut.clear()
        for number in list(self.running):
            self._stop(number)
        self.name_the_epoch()
        for each in self.pending:
            try:
                each.again()
            except SnapchainError:
                with suppress(SnapchainError):
                    each.undo()
        self.name_the_epoch()
        self.one_guest()
        for number in list(self.running):  # a failover that was run again has started it
            self._stop(number)
        found = self.world.masters(self.copies, requires_answer=True)
        names = [each.name for each in self.pending]
        assert all(len(hosts) == 1 for hosts in found.values()), f"not one host may start it: {found}, after {names}"
        assert len(set(map(frozenset, found.values()))) == 1, f"its disks are on several hosts: {found}"
        (host,) = next(iter(found.values()))
        for copy in self.copies:
            if copy.host == host and copy.is_there:
                for image in copy.images.values():
                    assert shows(image, copy.content)

    def restores(self) -> None:
        """Every point that was ever published reads as the guest's disk of its moment."""
        for place in self.world.places:
            there = self.world.destination_here(place)
            try:
                disks = there.disks()
            except NotFound:
                continue
            for disk in disks:
                guest, _, name = disk.name.rpartition("/")
                for point in disk.points if guest == GUEST and name in self.world.names else ():
                    if point.instant is None:
                        continue
                    out = self.root / "restored.qcow2"
                    Restoration(there, disk.name, out, point=str(point.point)).run()
                    assert shows(out, self.points[place, point.instant]), f"point {point.point} of {disk.name}"
                    out.unlink()


def _lost(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        real(*arguments, **named)
        raise Unavailable("no answer came")

    return call


def _after(other: Callable[[], Any], real: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The call, the first time that it changes something after something else."""
    left = [other]

    def call(*arguments: Any, **named: Any) -> Any:
        if name == "guest_at" and len(arguments) < 3:  # how the guest stands is only looked at
            return real(*arguments, **named)
        while left:
            left.pop()()
        return real(*arguments, **named)

    return call


class RepositoryMasters(Masters):
    hosts, replicas, has_repository = ("a", "c"), (), True


class Everything(Masters):
    hosts, replicas, has_repository = ("a", "b", "c"), ("a", "b", "c"), True


class ThreeHosts(Masters):
    hosts, replicas, has_repository = ("a", "b", "c"), ("a", "b", "c"), False


def test_an_old_copy_after_a_handover() -> None:
    """It bears no mark; the epoch at the destination refuses it, though no failover is recorded there."""
    with told(Masters) as model:
        model.write(0, 0)
        model.stop(0)
        model.back_up()
        model.migrate(0, 1, stops=True, vouches=False, fault=NONE)
        model.restore_old()


def test_what_a_withdrawn_failover_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of the host that withdrew, and those of the old master: a person says whose they are."""
    with told(RepositoryMasters) as model:
        model.ship(0, 0, NONE)
        with monkeypatch.context() as patch:
            patch.setattr(Failover, "_define", _lost(Failover._define))
            model._failover("repository", "c", "fence", NONE)
        assert _standing(model).state is GuestState.PROMOTING
        model.one_master()
        assert model._withdraw("repository", "c", NONE)


def test_what_was_written_there_is_not_taken_back() -> None:
    with told(Masters) as model:
        model.migrate(0, 1, stops=True, vouches=False, fault=NONE)
        model.write(0, 0)
        model.stop(0)
        assert not model._take_back(model.copies[0], "b", NONE)


def test_a_failover_after_the_guest_was_given_on() -> None:
    """The replica has not heard of the epoch in which its host gave the guest away; its host knows it by the mark."""
    with told(Masters) as model:
        model.ship(0, 1, NONE)
        model.migrate(0, 1, stops=True, vouches=False, fault=NONE)
        model.migrate(0, 0, stops=True, vouches=False, fault=NONE)
        assert [copy.epoch() for copy in model.copies] == [1, 2, 3]
        model._failover("b/replica", "b", "fence", NONE)


def test_two_failovers_that_were_decided_on_one_record() -> None:
    """The second would replace a guest that was started after its proof."""
    with told(RepositoryMasters) as model:
        model.ship(0, 0, NONE)
        model._failover("repository", "c", "fence", Fault("meanwhile"))
        assert _standing(model).master == "a"


@pytest.mark.parametrize("fault", [Fault("meanwhile"), Fault("lost")])
@pytest.mark.parametrize("by_marks", [False, True])
def test_a_handover_that_is_interrupted_by_a_failover(fault: Fault, by_marks: bool) -> None:
    with told(Masters) as model:
        if not by_marks:
            model.ship(0, 1, NONE)
        model.migrate(0, 1, stops=True, vouches=False, fault=fault)


def _standing(model: Masters) -> GuestStanding:
    found = model.world.standing("repository")
    assert found is not None
    return found


@contextmanager
def told(world: type[Masters]) -> Iterator[Masters]:
    """A world in which a sequence is told; what must hold is checked after it, and after everything is settled."""
    model = world()
    model.begin(requires_answer=True, ships=False)
    try:
        yield model
        model.one_master()
        model.one_guest()
        model.settle()
        model.restores()
    finally:
        model.clear()


WORLDS = [
    pytest.param(Masters, 2, id="two-replicas"),
    pytest.param(RepositoryMasters, 2, id="a-repository"),
    pytest.param(ThreeHosts, 1, id="three-replicas"),
    pytest.param(Everything, 2, id="three-replicas-and-a-repository"),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("world", "count"), WORLDS)
def test_never_two_masters(world: type[Masters], count: int) -> None:
    run_state_machine_as_test(
        world,
        settings=settings(
            max_examples=examples(count, times=100), stateful_step_count=15, phases=(Phase.generate, Phase.shrink)
        ),
    )
