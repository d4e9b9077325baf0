"""A guest under a lease, with a real QEMU: it stops when nothing renews the lease, whatever ends our processes."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pytest

from snapchain.cli import main
from snapchain.errors import Busy, Conflict, Unavailable
from snapchain.guest import journal
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.agent import SocketAgent
from snapchain.guest.disks import disks_to_protect
from snapchain.guest.protocol import Guest, State
from snapchain.guest.quiesce import frozen
from snapchain.host.deadman import clock, is_stopped
from snapchain.host.private import make_private
from snapchain.host.process_identity import Identity
from snapchain.host.qemu_processes import qemu_processes
from snapchain.model.events import ignore
from snapchain.model.guest_state import GuestChange, TakenDisk, Transition, Vouched
from snapchain.ops import guests
from snapchain.ops.lease_notes import NAME
from snapchain.ops.migrate.live_check import check_guest
from snapchain.ops.watch.start import directory_of
from tests.guest.agent_guest import AgentGuest, formatted
from tests.guest.leases import LONG, SHORT, Leased, Link
from tests.guest.libvirt import Domain
from tests.guest.nights import DISKS, Host
from tests.libvirtd import LibvirtHost
from tests.waiting import HANG, gone, wait_until


@pytest.fixture
def leased(tmp_path: Path) -> Iterator[Leased]:
    world = Leased(tmp_path)
    with world.host.machine() as machine:
        world.machine = machine
        world.ship()
        yield world
        world.machine.kill()  # which may be stopped


def guards(leased: Leased) -> list[Identity]:
    return [(pid, started) for pid, started in json.loads(leased.note.read_text())["guards"]]


def renewals(link: Link, number: int) -> None:
    """Wait until so many renewals more have succeeded at a place."""

    def count() -> int:
        lease = link().guest_state("web1").lease
        assert lease is not None
        return lease.count

    before = count()
    wait_until(lambda: count() >= before + number)


def test_it_is_held_renewed_and_ended(leased: Leased) -> None:
    process = leased.process()
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        for link in (leased.destination, leased.witness):
            lease = leased.standing(link).lease
            assert lease is not None
            assert (lease.seconds, lease.host, lease.witness) == (LONG, "kvm1", leased.witness.url)
            assert lease.is_witness is (link is leased.witness)
        renewals(leased.destination, 3)
        assert not is_stopped(process)
        assert leased.machine.status() == "running"
        alive = guards(leased)
    assert leased.standing().lease is None
    assert leased.standing(leased.witness).lease is None
    assert all(gone(pid) for pid, _ in alive)
    assert not is_stopped(process)
    assert not leased.note.exists()


@pytest.mark.soak
def test_it_is_taken_while_the_watch_is_at_work_with_the_guest(leased: Leased) -> None:
    """As during a long shipment: QEMU serves one client, and so the holder sees what the watch has opened."""
    door = leased.door
    seen: list[Guest] = []
    door.on_opened = seen.append
    with door.opened() as guest:
        door.look()  # another one would wait for QEMU here
        assert seen == [guest]
    door.look()
    assert len(seen) == 2
    with door.turn(None), open_guest(leased.address) as guest, leased.holder() as holder:
        wait_until(lambda: any("no process of its QEMU was found" in words for words in leased.said))
        assert holder.report().state == "none"
        door.on_opened(guest)
        wait_until(lambda: holder.report().state == "held")
        renewals(leased.destination, 2)
    assert leased.standing().lease is None


def test_a_witness_that_takes_longer_than_the_lease_stops_nothing(leased: Leased) -> None:
    """Before the destination has the lease, nobody takes the guest over by it: so no guard waits for the witness."""
    process = leased.process()
    leased.seconds, link = SHORT, leased.witness
    with link.holding(Transition.LEASE) as let_go, leased.holder() as holder, ExitStack() as stack:
        stack.callback(let_go)  # also where this fails: the holder waits for the answer when it ends
        wait_until(lambda: link.held)
        assert holder._qemu.guards == ()
        assert not is_stopped(process)
        let_go()
        wait_until(lambda: holder.report().state == "held")


def test_a_witness_that_is_the_destination_is_none(leased: Leased) -> None:
    """By another address."""
    leased.witness = Link(f"dir:{leased.folder}/./replica")
    with leased.holder() as holder:
        wait_until(lambda: any("the witness is the destination itself" in words for words in leased.said))
        assert holder.report().state == "none"


@pytest.mark.soak
def test_the_watch_does_not_begin_while_the_guest_is_stopped(leased: Leased) -> None:
    """The resume needs its turn: a guest that was paused would stay so for the length of a shipment."""
    leased.seconds = SHORT
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        leased.destination.cut = leased.witness.cut = True
        wait_until(lambda: holder.report().state == "paused")
        with pytest.raises(Busy, match="its lease was not renewed in time"), leased.door.opened():
            pytest.fail("it is closed")
        leased.destination.cut = leased.witness.cut = False
        wait_until(lambda: leased.door.closed() is None)
        assert leased.machine.status() == "running"
        with leased.door.opened() as guest:
            assert guest.state() is State.RUNNING


@pytest.mark.soak
def test_others_see_it(leased: Leased, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`guests` on the host, `status` at the destination, and `migrate`, which leaves it alone."""
    leased.seconds = SHORT
    leased.note = directory_of(leased.address) / NAME
    make_private(leased.note.parent)
    mine = [each for each in qemu_processes() if each.pid == leased.process()[0]]
    monkeypatch.setattr(guests, "qemu_processes", lambda: mine)

    def row() -> guests.GuestRow:
        (found,) = guests.guests("web1").guests
        return found

    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        wait_until(lambda: "It runs under a lease of 4 s" in str(row().lease))
        with open_guest(leased.address) as guest, pytest.raises(Busy, match="runs under a lease of 4 s, which a watch"):
            check_guest(guest, disks_to_protect(guest, ()))
        renewals(leased.witness, 1)
        assert main(["status", leased.witness.url]) == 0
        assert re.search(r"lease +4 s, of kvm1, renewed .* times\), this is the witness", capsys.readouterr().out)
        leased.destination.cut = leased.witness.cut = True
        wait_until(lambda: holder.report().state == "paused")
        assert (row().state, "the kernel has stopped its QEMU" in str(row().lease)) == ("paused", True)
        leased.destination.cut = leased.witness.cut = False
        wait_until(lambda: holder.report().state == "held")
    assert row().lease is None


@pytest.mark.soak
@pytest.mark.root
def test_a_domain_of_libvirt(libvirt_host: LibvirtHost, tmp_path: Path) -> None:
    host = Host(tmp_path)
    domain = Domain.started(libvirt_host, tmp_path / "domain", {name: host.top(name) for name in DISKS})
    leased = Leased(tmp_path, address=domain.address, seconds=SHORT, is_there=True)
    leased.ship()
    process = leased.process()
    try:
        domain.virsh("autostart")
        with leased.holder() as holder:
            wait_until(lambda: any("it starts with its host" in words for words in leased.said))
            assert leased.standing().lease is None
            domain.virsh("autostart", "--disable")
            wait_until(lambda: holder.report().state == "held")
            leased.destination.cut = leased.witness.cut = True
            wait_until(lambda: is_stopped(process))
            wait_until(lambda: holder.report().state == "paused")
            leased.witness.cut = leased.destination.cut = False
            wait_until(lambda: not is_stopped(process))
            wait_until(lambda: domain.state() == "running")
        wait_until(lambda: domain.state() == "running")
        assert not is_stopped(process)
    finally:
        domain.remove()


@pytest.mark.soak
def test_it_runs_out_while_the_guest_is_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a snapshot: the agent answers when the guest continues, and is then told to thaw."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "disks").mkdir()
    disks = {name: formatted(tmp_path / "disks" / f"{name}.qcow2", size="16M") for name in DISKS}
    with TemporaryDirectory() as folder, AgentGuest(Path(folder), disks=disks) as machine:
        leased = Leased(tmp_path, address=GuestAddress(qmp=machine.qmp), seconds=SHORT)
        leased.ship()
        process = leased.process()
        with leased.holder() as holder:
            wait_until(lambda: holder.report().state == "held")
            with (
                leased.door.opened() as guest,
                frozen(guest, required=True, freeze_seconds=60, bound_seconds=600, on_event=ignore),
            ):
                leased.destination.cut = leased.witness.cut = True
                wait_until(lambda: is_stopped(process))
            leased.destination.cut = leased.witness.cut = False
            wait_until(lambda: not is_stopped(process))
            wait_until(lambda: not journal.find()[0])
            assert not SocketAgent(machine.agent).is_frozen(timeout=HANG)
            assert machine.status() == "running"
            machine.sh("echo one >/mnt/vda/file && echo two >/mnt/vdb/file && sync")


def test_the_deadline_counts_from_before_a_renewal_was_sent(leased: Leased) -> None:
    """However late its answer comes."""
    link = leased.destination
    with leased.holder(with_witness=False) as holder:
        wait_until(lambda: holder.report().state == "held")
        with link.holding():
            wait_until(lambda: link.held)
            sent = clock()
            wait_until(lambda: clock() > sent + 2)
            leased.renewed.clear()
        wait_until(lambda: leased.renewed)
        assert leased.renewed[0] <= sent + LONG


@pytest.mark.parametrize("link", [pytest.param("destination", marks=pytest.mark.soak), "witness"])
def test_one_of_both_is_enough(leased: Leased, link: str) -> None:
    process = leased.process()
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        cut: Link = getattr(leased, link)
        other = leased.witness if cut is leased.destination else leased.destination
        cut.cut = True
        until = clock() + (holder.report().left_seconds or 0)
        renewals(other, 3)
        wait_until(lambda: clock() + (holder.report().left_seconds or 0) > until + 1)
        assert not is_stopped(process)
        assert any("the link is cut" in fault for fault in holder.report().faults)
        cut.cut = False


def test_without_renewals_the_guest_stops_and_continues_with_the_next(leased: Leased) -> None:
    process = leased.process()
    leased.seconds = SHORT
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        leased.destination.cut = leased.witness.cut = True
        wait_until(lambda: is_stopped(process))
        wait_until(lambda: holder.report().state == "paused")
        wait_until(lambda: any("is stopped until a renewal succeeds" in words for words in leased.said))
        leased.witness.cut = False
        wait_until(lambda: not is_stopped(process))
        wait_until(lambda: leased.machine.status() == "running")
        wait_until(lambda: holder.report().state == "held")
        leased.destination.cut = False
    wait_until(lambda: leased.machine.status() == "running")


@pytest.mark.parametrize("by", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.soak)])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_guards_that_are_killed_or_stopped_are_replaced(
    leased: Leased, which: tuple[int, ...], by: signal.Signals
) -> None:
    process = leased.process()
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        wait_until(lambda: len(guards(leased)) == 2)
        before = guards(leased)
        for each in which:
            with suppress(ProcessLookupError):  # it ended with the other one
                os.kill(before[each][0], by)
        wait_until(lambda: not set(guards(leased)) & set(before))
        wait_until(lambda: not is_stopped(process) and holder.report().state == "held")
        wait_until(lambda: all(gone(pid) for pid, _ in before))
    assert leased.machine.status() == "running"


def test_a_taken_guest_is_stopped_for_good(leased: Leased) -> None:
    process = leased.process()
    with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"), leased.holder() as holder:  # noqa: PT012
        wait_until(lambda: holder.report().state == "held")
        taken_over(leased)
        wait_until(lambda: is_stopped(process))
        wait_until(lambda: holder.report().state == "taken")
    assert is_stopped(process)
    assert any("kvm2 has taken the guest web1 over" in words for words in leased.said)


def taken_over(leased: Leased, how: Literal["fence", "lease"] = "fence") -> None:
    """By another host, at the destination; the witness goes on to renew."""
    place = leased.destination()
    points = {disk.name: disk.points[-1].point for disk in place.disks() if disk.name.startswith("web1/v")}
    place.change_guest(
        GuestChange(
            guest="web1",
            transition=Transition.PROMOTE,
            seen=leased.standing().number,
            token="9" * 32,
            by="kvm2",
            host="kvm2",
            former="kvm1",
            vouched=Vouched(how=how, who="root@kvm2"),
            disks=tuple(TakenDisk(disk=name, point=point) for name, point in points.items()),
        )
    )


def test_a_lease_that_cannot_be_ended_stops_the_guest(leased: Leased) -> None:
    process = leased.process()
    leased.seconds = SHORT
    with pytest.raises(Unavailable, match="could not be ended"), leased.holder() as holder:  # noqa: PT012
        wait_until(lambda: holder.report().state == "held")
        leased.destination.cut = leased.witness.cut = True
    assert leased.standing().lease is not None
    wait_until(lambda: is_stopped(process))
    leased.destination.cut = leased.witness.cut = False
    with leased.holder():
        wait_until(lambda: not is_stopped(process))
        wait_until(lambda: leased.machine.status() == "running")
    assert leased.standing().lease is None
    assert leased.machine.status() == "running"


@pytest.mark.parametrize("place", ["destination", "witness"])
def test_a_lost_answer_to_the_first_request(leased: Leased, place: str) -> None:
    """Renewals tell whether the destination has recorded the lease; the witness is asked once more."""
    process = leased.process()
    link: Link = getattr(leased, place)
    link.deaf = Transition.LEASE
    with leased.holder() as holder:
        wait_until(lambda: any("the answer was lost" in words for words in leased.said))
        link.deaf = None
        wait_until(lambda: holder.report().state == "held")
        wait_until(lambda: not is_stopped(process))
    assert leased.standing().lease is None
    assert leased.machine.status() == "running"


def test_a_renewal_at_the_witness_counts_once_the_destination_has_the_lease(leased: Leased) -> None:
    """Else an older lease may be recorded there, which names no witness or another one."""
    process = leased.process()
    link, leased.seconds = leased.destination, SHORT
    link.lost = Transition.LEASE
    with leased.holder() as holder:
        wait_until(lambda: any("it did not arrive" in words for words in leased.said))
        link.cut = True
        wait_until(lambda: is_stopped(process))
        renewals(leased.witness, 2)
        assert is_stopped(process)
        assert holder.report().state == "paused"
        link.cut, link.lost = False, None
        wait_until(lambda: holder.report().state == "held" and not is_stopped(process))


def test_a_lease_that_the_destination_has_lost_is_taken_anew(leased: Leased) -> None:
    """As where a watch was killed after it had ended the lease there, and before its guards were gone."""
    process = leased.process()
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        before = leased.standing()
        lost = (before.lease or pytest.fail("there is none")).token
        leased.destination().change_guest(
            GuestChange(
                guest="web1", transition=Transition.UNLEASE, seen=before.number, token=lost, by="kvm1", host="kvm1"
            )
        )
        wait_until(lambda: (now := leased.standing().lease) is not None and now.token != lost)
        wait_until(lambda: holder.report().state == "held" and not is_stopped(process))
    assert leased.standing().lease is None
    assert leased.machine.status() == "running"


def test_an_unknown_lease_is_ended_with_the_watch(leased: Leased) -> None:
    """The answer to the request for it was lost, and so it is asked for once more, and ended."""
    process = leased.process()
    leased.destination.deaf = Transition.LEASE
    with leased.holder():
        wait_until(lambda: leased.standing().lease is not None)
        wait_until(lambda: any("answer was lost" in words for words in leased.said))
        leased.destination.deaf = None
    assert leased.standing().lease is None
    assert not is_stopped(process)
    assert not leased.note.exists()


def test_the_lease_of_a_guest_that_is_shut_down_ends(leased: Leased) -> None:
    """Nobody shall take it over; its next QEMU gets a lease of its own."""
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        before = guards(leased)
        leased.machine.quit()
        wait_until(lambda: leased.standing().lease is None)
        wait_until(lambda: all(gone(pid) for pid, _ in before))
        with leased.host.machine() as machine:
            leased.machine = machine
            wait_until(lambda: leased.standing().lease is not None)
            wait_until(lambda: holder.report().state == "held")


def test_another_qemu_is_guarded_while_its_lease_cannot_be_ended(leased: Leased) -> None:
    leased.seconds = SHORT
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        before = guards(leased)
        leased.destination.cut = leased.witness.cut = True
        leased.machine.quit()
        wait_until(lambda: all(gone(pid) for pid, _ in before))
        with leased.host.machine() as machine:
            leased.machine = machine
            process = leased.process()
            wait_until(lambda: is_stopped(process))
            leased.destination.cut = leased.witness.cut = False
            wait_until(lambda: not is_stopped(process))


def test_another_qemu_is_stopped_while_the_destination_hangs(leased: Leased) -> None:
    """Nothing that stops it waits for an answer."""
    leased.seconds = SHORT
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        before = guards(leased)
        with ExitStack() as stack:
            let_go = stack.enter_context(leased.destination.holding())
            leased.witness.cut = True
            leased.machine.quit()
            wait_until(lambda: all(gone(pid) for pid, _ in before))
            leased.machine = stack.enter_context(leased.host.machine())
            process = leased.process()
            wait_until(lambda: is_stopped(process))
            let_go()
            leased.witness.cut = False
            wait_until(lambda: holder.report().state == "held" and not is_stopped(process))


def test_a_watch_that_comes_after_the_guest_was_started_again(leased: Leased) -> None:
    """As after a crash of the host: the destination may have the lease of the QEMU that is gone."""
    with leased.begin() as watch:
        wait_until(lambda: leased.standing().lease is not None)
        renewals(leased.destination, 1)
        watch.kill()
    leased.machine.kill()
    leased.destination.cut = leased.witness.cut = True
    with leased.host.machine() as machine:
        leased.machine = machine
        process = leased.process()
        with leased.holder() as holder:
            wait_until(lambda: is_stopped(process))
            leased.destination.cut = leased.witness.cut = False
            wait_until(lambda: holder.report().state == "held" and not is_stopped(process))
        assert leased.standing().lease is None
        assert not leased.note.exists()


def test_a_lease_of_which_the_note_is_lost_is_ended_first(leased: Leased) -> None:
    """Nothing guards the guest that it says is guarded."""
    process = leased.process()
    with leased.begin() as watch:
        wait_until(lambda: leased.standing().lease is not None)
        renewals(leased.destination, 1)
        watch.kill()
    ending = [pid for pid, _ in guards(leased)]
    for pid in ending:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    leased.note.unlink()
    wait_until(lambda: all(map(gone, ending)) and is_stopped(process))  # each of them stops it as it ends
    os.kill(process[0], signal.SIGCONT)
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        link = leased.destination
        assert link.sent.index(Transition.UNLEASE) < link.sent.index(Transition.LEASE)


def test_a_watch_at_another_destination_does_not_go_on(leased: Leased) -> None:
    """The guest may still be taken over from the one that has recorded the lease."""
    with leased.begin() as watch:
        wait_until(lambda: leased.standing().lease is not None)
        renewals(leased.destination, 1)
        watch.kill()
    leased.destination, leased.witness = leased.witness, leased.destination
    with leased.holder() as holder:
        wait_until(lambda: any("its lease is at another destination" in words for words in leased.said))
        assert holder.report().state == "none"
    assert not leased.destination.sent
    assert leased.standing(leased.witness).lease is not None


def test_another_watch_of_the_same_guest(leased: Leased) -> None:
    """By another path of its socket."""
    leased.note = directory_of(leased.address) / NAME
    make_private(leased.note.parent)
    with leased.holder() as holder:
        wait_until(lambda: holder.report().state == "held")
        leased.note = directory_of(GuestAddress(qmp=leased.folder / "run" / ".." / "run" / "qmp")) / NAME
        make_private(leased.note.parent)
        with leased.holder() as other:
            wait_until(lambda: any("another watch has taken a lease of it" in words for words in leased.said))
            assert other.report().state == "none"
        assert holder.report().state == "held"


def test_a_guest_that_was_taken_over_by_its_lease_does_not_run_here_again(leased: Leased) -> None:
    """Its host has come back, without a note, and somebody has started it."""
    with leased.begin() as watch:
        wait_until(lambda: leased.standing().lease is not None)
        watch.kill()
    taken_over(leased, how="lease")
    leased.machine.kill()
    leased.note.unlink()
    with leased.host.machine() as machine:
        leased.machine = machine
        process = leased.process()
        with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"), leased.holder() as holder:
            wait_until(lambda: is_stopped(process) and holder.report().state == "taken")


@pytest.mark.soak
def test_a_killed_or_stopped_watch(leased: Leased) -> None:
    """The guards do what it cannot do any more; started again it goes on with the same lease."""
    process = leased.process()
    leased.seconds = SHORT
    with leased.begin() as watch:
        wait_until(lambda: leased.standing().lease is not None)
        token = (leased.standing().lease or pytest.fail("none")).token
        renewals(leased.destination, 2)
        watch.send_signal(signal.SIGSTOP)
        wait_until(lambda: is_stopped(process))
        watch.send_signal(signal.SIGCONT)
        wait_until(lambda: not is_stopped(process))
        watch.kill()
    wait_until(lambda: is_stopped(process))
    with leased.begin() as watch:
        wait_until(lambda: not is_stopped(process))
        wait_until(lambda: leased.machine.status() == "running")
        assert (leased.standing().lease or pytest.fail("none")).token == token
        watch.terminate()
        assert watch.wait() == 0
    assert leased.standing().lease is None
    assert leased.machine.status() == "running"
