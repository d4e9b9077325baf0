"""A merge at a replica while others are at work there: one waits or goes round, and nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, Unavailable
from snapchain.model.events import Event, Notice
from snapchain.model.merging import Strategy
from snapchain.model.retention import Policy
from snapchain.ops import doctor
from snapchain.ops.log import log
from snapchain.ops.ship.run import ShipRequest
from snapchain.ops.sync.run import SyncRequest, check, sealed_request, sync_set
from snapchain.replica import merge_journal as unfinished, store as waiting
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.points_merge import ReplicaMerge
from snapchain.replica.store import open_replica
from snapchain.replica.stream import session as voice
from snapchain.replica.verification import verify_replica
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build
from tests.replica.conftest import DISK, Place
from tests.replica.merging import Pointed, endpoint, merged_by
from tests.replica.sending import send_to_replica
from tests.replica.test_merge_replica import seal
from tests.servers import qemu_nbd
from tests.waiting import HANG, wait_until

LAYERS = [Layer(4 * MiB, [f"write -P {n} {n * 64}k 512k"]) for n in range(1, 6)]


def merging(pointed: Pointed, **rules: Any) -> ReplicaMerge:
    return ReplicaMerge(endpoint(pointed.place.root), DISK, Policy(**rules), zone="UTC")


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", LAYERS)


@pytest.fixture
def sent(place: Place, chain: list[Path], tmp_path: Path) -> Pointed:
    pointed = Pointed(place, tmp_path / "shots")
    for path in chain:
        pointed.send(path)
    return pointed


@contextmanager
def held_up(pointed: Pointed, **rules: Any) -> Iterator[threading.Event]:
    """A merge that stays in the middle of its work until the event is set; it must end well."""
    there, go = threading.Event(), threading.Event()

    def wait() -> None:
        there.set()
        assert go.wait(HANG)

    with merged_by(None, wait), ThreadPoolExecutor(1) as pool:
        merge = pool.submit(merging(pointed, **rules).run)
        try:
            assert there.wait(HANG)
            yield go
        finally:
            go.set()
            merge.result(HANG)


def test_a_transfer_waits_for_a_merge(sent: Pointed, chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voice, "BEAT_SECONDS", 0.1)
    seal(chain[-1], "write -P 77 2M 64k")
    events: list[Event] = []
    with held_up(sent, last=2) as go, ThreadPoolExecutor(1) as pool:
        request = ShipRequest(image=chain[-1], disk=DISK)
        report = pool.submit(send_to_replica, request, endpoint(sent.place.root), on_event=events.append)
        wait_until(lambda: [event for event in events if isinstance(event, Notice) and "makes us wait" in str(event)])
        assert not report.done()
        go.set()
        assert report.result(HANG).layers_sent == 1
    sent.send(chain[-1])
    assert verify_replica(endpoint(sent.place.root), DISK, share=1.0).ok
    assert sent.points() == [4, 5, 6, 7]
    assert len(sent.place.files()) == 3


def test_whoever_only_looks_sees_nothing_wrong(sent: Pointed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points that the merge drops are told no more before a file is touched; what is judged waits for it."""
    with held_up(sent, last=2) as go, ThreadPoolExecutor(2) as pool:
        assert [point.point for point in log(ReplicaDestination(endpoint(sent.place.root)), DISK).disks[0].points] == [
            4,
            5,
        ]
        looks = [
            pool.submit(verify_replica, endpoint(sent.place.root), DISK, share=float(data)) for data in (True, False)
        ]
        time.sleep(0.5)
        assert not any(look.done() for look in looks)
        go.set()
        assert all(look.result(HANG).ok for look in looks)
    monkeypatch.setattr(unfinished, "_PATIENCE", 0.2)
    with held_up(sent, last=1), pytest.raises(Busy, match="being merged"):
        sent.plan(last=1)
    sent.check(kept=[5])


def test_a_merge_waits_for_a_transfer_but_not_for_ever(sent: Pointed, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_replica(sent.place.root).disk(DISK)
    with ThreadPoolExecutor(1) as pool:
        with disk.locked(make=False):
            report = pool.submit(sent.merge, last=1)
            time.sleep(0.7)
            assert not report.done()
        assert report.result(HANG).layers_after == 1
    monkeypatch.setattr(waiting, "LIMITS", {})
    with disk.locked(make=False), pytest.raises(Busy, match="a transfer"):
        sent.merge(last=1)
    sent.check(kept=[5])


def test_all_at_once(sent: Pointed, chain: list[Path]) -> None:
    """Sends, merges, and looks, again and again: none fails, and what is kept at the end is right."""
    over = threading.Event()

    def until_over(what: Callable[[], object]) -> int:
        count = 0
        while not over.is_set():
            what()
            count += 1
        return count

    to = endpoint(sent.place.root)

    def verified() -> None:
        found = verify_replica(to, DISK, share=1.0)
        assert found.ok, found.findings

    with ThreadPoolExecutor(4) as pool:
        others = [
            pool.submit(until_over, lambda: sent.merge(last=2)),
            pool.submit(until_over, lambda: sent.plan(last=1)),
            pool.submit(until_over, verified),
            pool.submit(until_over, lambda: log(ReplicaDestination(to), DISK)),
        ]
        try:
            for number in range(8):
                seal(chain[-1], f"write -P {100 + number} {number * 192}k 64k")
                sent.send(chain[-1])
        finally:
            over.set()
        assert all(other.result(HANG) for other in others)
    sent.merge(last=2)
    sent.check(kept=[12, 13])


@pytest.mark.parametrize("strategy", [Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT])
def test_the_asker_is_gone(sent: Pointed, chain: list[Path], strategy: Strategy) -> None:
    """What could not be told ends the merge that is at work; the next who comes finds all in order, or puts it so."""

    def gone() -> None:
        raise Unavailable("the connection was closed by the other side")

    with pytest.raises(Unavailable, match="closed by the other side"), merged_by(strategy, gone):
        merging(sent, last=2).run()
    assert (sent.place.directory / ".merging.json").exists() is (strategy is Strategy.COMMIT)
    assert sent.send(chain[-1]).layers_sent == 0
    sent.check()
    assert len(sent.place.files()) == (2 if strategy is Strategy.COMMIT else 5)
    sent.merge(last=2)
    sent.check(kept=[5, 6])


def test_interrupted_in_this_process(sent: Pointed, chain: list[Path]) -> None:
    """A replica in a directory: Ctrl-C reaches the side that asks, and the other one stops at once."""
    began, say = os.pipe()
    if not (child := os.fork()):

        def slow() -> None:
            os.write(say, b".")
            time.sleep(0.4)

        try:
            with merged_by(Strategy.ABSORB, slow):
                merging(sent, last=1).run()
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(1)
    os.read(began, 1)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert sent.send(chain[-1]).layers_sent == 0
    sent.check(kept=[5, 6])
    assert len(sent.place.files()) == 5


@pytest.mark.parametrize("strategy", [Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT])
def test_one_of_two_merges_is_refused_half_way(sent: Pointed, chain: list[Path], strategy: Strategy) -> None:
    """What was undone is gone round; what was begun comes first, and is settled before anything else."""
    disk = open_replica(sent.place.root).disk(DISK)
    catalogue = disk.read()
    assert catalogue is not None
    disk.write(catalogue.after(points=tuple(point for point in catalogue.points if point.point in {3, 5})))
    refused: list[int] = []

    def refuse() -> None:
        if not refused:
            refused.append(1)
            raise Conflict("somebody has written to it")

    if strategy is Strategy.COMMIT:
        with pytest.raises(Conflict, match="has written"), merged_by(strategy, refuse):
            merging(sent, last=2).run()
        assert (sent.place.directory / ".merging.json").exists()
        assert sent.send(chain[-1]).layers_sent == 0
        assert len(sent.place.files()) == 3
    else:
        with merged_by(strategy, refuse):
            report = merging(sent, last=2).run()
        assert [each.reason for each in report.staying] == ["somebody has written to it"] * 2
        assert report.layers_after == 4
    sent.check()


def killed(pointed: Pointed, strategy: Strategy) -> None:
    """A merge that dies in the middle of its work."""
    if not (child := os.fork()):
        with merged_by(strategy, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            merging(pointed, last=1).run()
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert (pointed.place.directory / ".merging.json").exists()


@pytest.mark.parametrize("strategy", [Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT])
def test_the_doctor_was_there_first(sent: Pointed, chain: list[Path], strategy: Strategy) -> None:
    """It knows the files and not the catalogue: whoever comes next sees what the files are."""
    killed(sent, strategy)
    doctor.run(doctor.plan([sent.place.directory]))
    assert sent.send(chain[-1]).layers_sent == 0
    assert verify_replica(endpoint(sent.place.root), DISK, share=1.0).ok
    assert len(sent.place.files()) == (1 if strategy is Strategy.COMMIT else 5)
    assert sent.merge(last=2).layers_after == 1
    notes = [path.name for path in sent.place.directory.glob(".snapchain-layer-*")]
    sent.check(kept=[5, 6], besides=notes)


def test_somebody_opens_a_layer_before_a_killed_merge_is_settled(sent: Pointed, chain: list[Path]) -> None:
    killed(sent, Strategy.COMMIT)
    with qemu_nbd(sent.place.directory / "disk.qcow2", "-r"), pytest.raises(Busy, match="qemu-nbd"):
        sent.send(chain[-1])
    sent.send(chain[-1])
    sent.check(kept=[5, 6])


def test_a_sync_looks_while_and_after_layers_are_merged(sent: Pointed, chain: list[Path]) -> None:
    to = endpoint(sent.place.root)
    asked = SyncRequest(send=sealed_request(chain[-1], DISK))
    seal(chain[-1], "write -P 77 2M 64k")
    assert sync_set([asked], to).ready
    with held_up(sent, last=2) as go, ThreadPoolExecutor(1) as pool:
        look = pool.submit(check, asked, to)
        time.sleep(0.5)
        assert not look.done()
        go.set()
        found = look.result(HANG)
    assert (found.ready, found.layers_to_send) == (True, ())


def test_a_disk_that_is_full(tmp_path: Path, chain: list[Path], place: Place) -> None:
    """No room for what is to be moved: told before a point is dropped, and everything is as before."""
    pointed = Pointed(place, tmp_path / "shots")
    for path in chain:
        pointed.send(path)
    from snapchain.replica import layer_merge

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_merge, "free_bytes", lambda _directory: 1 << 19)
        with pytest.raises(Unavailable, match="are free"):
            pointed.merge(last=1)
    pointed.check(kept=[1, 2, 3, 4, 5])
