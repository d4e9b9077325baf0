"""SIGKILL of libvirtd before and after each request of snapchain: the guest runs on, and the next run is clean."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError
from snapchain.guest import journal
from snapchain.guest.address import open_guest
from snapchain.guest.snapshot import Quiesce, SnapshotRequest, plan, run
from snapchain.host.virsh import Virsh
from snapchain.host.virsh_session import VirshSession
from snapchain.merge import live, live_run
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from snapchain.ops import doctor
from tests.exhaustive import some
from tests.guest.libvirt import Domain
from tests.guest.live_chain import MIB, Chain, K, names, sound
from tests.libvirtd import LibvirtHost

NO = SnapshotRequest(quiesce=Quiesce.NO)
_NAMES = itertools.count(1)


def snapshot(domain: Domain) -> None:
    with open_guest(domain.address) as guest:
        run(guest, plan(guest, NO), NO)


def merge(domain: Domain, to_layer: str | None) -> None:
    """The layers from 1.qcow2 to another one, or to the active one; or what a run before has left of that."""
    with open_guest(domain.address) as guest:
        top = guest.disks()[0].active.path
        assert top is not None
        wanted = MergeRequest(image=top, from_layer="1.qcow2", to_layer=to_layer, strategy=Strategy.COMMIT)
        try:
            planned = live.plan(guest, "vda", wanted)
        except (NotFound, InvalidInput):  # they are merged already
            planned = live.plan(guest, "vda", MergeRequest(image=top, max_layers=5))
        live_run.run(guest, planned)


def merge_again(domain: Domain, to_layer: str | None) -> None:
    """Where libvirtd dies between QEMU's end of a merge and its own record, it forgets that: until the next start."""
    try:
        merge(domain, to_layer)
    except Conflict as error:
        assert "libvirt lists layers that QEMU has merged already" in error.message  # noqa: PT017
        domain.io("vda", "flush")
        domain.virsh("destroy")
        domain.virsh("start")
        merge(domain, to_layer)


@contextmanager
def dies_at(number: int, host: LibvirtHost | None, patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """libvirtd is killed and started again at a request: 2 * n before the n-th, 2 * n + 1 after it. The requests."""
    asked: list[str] = []

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(virsh: Virsh | VirshSession, *words: Any, **more: Any) -> Any:
            at = len(asked)
            asked.append(" ".join(map(str, words)))
            for after in (False, True):
                if after:
                    answer = real(virsh, *words, **more)
                if host is not None and number == 2 * at + after:
                    host.kill()
                    host.start()
            return answer

        return call

    with patch.context() as within:
        within.setattr(Virsh, "text", dying(Virsh.text))
        within.setattr(Virsh, "texts", dying(Virsh.texts))
        within.setattr(VirshSession, "text", dying(VirshSession.text))
        yield asked


def check(domain: Domain, chain: Chain, number: int) -> None:
    """The guest runs on, and sees what it should."""
    assert domain.state() == "running"
    domain.write("vda", 3 * MIB + number % 8 * 64 * K, 64 * K, 90)
    assert domain.reads("vda", 3 * MIB + number % 8 * 64 * K, 64 * K, 90)
    assert all(domain.reads("vda", n * 256 * K, 192 * K, n + 1) for n in range(chain.count))


@pytest.mark.root
@pytest.mark.soak
def test_a_snapshot(libvirt_host: LibvirtHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One domain for all: what the deaths leave must not add up."""
    chain = Chain(tmp_path / "images")
    domain = Domain.started(libvirt_host, tmp_path / "domain", {"vda": chain.active}, name=f"dies{next(_NAMES)}")
    try:
        with dies_at(-1, None, monkeypatch) as asked:
            snapshot(domain)
        for number in some(range(2 * len(asked)), each=len(asked) // 2):
            with dies_at(number, libvirt_host, monkeypatch), suppress(SnapchainError):
                snapshot(domain)
            check(domain, chain, number)
            assert doctor.run(doctor.plan([], guest=domain.address)).well, asked[number // 2]
            snapshot(domain)
            assert journal.find() == ([], [])
            assert domain.source("vda") == domain.source("vda", "--inactive")
            assert set(names(domain.source("vda"))) == {path.name for path in chain.folder.glob("*.qcow2")}
        top = domain.source("vda")
        domain.io("vda", "flush")
        domain.kill()
        sound(top)
    finally:
        domain.remove()


@pytest.mark.root
@pytest.mark.soak
@pytest.mark.parametrize(("to_layer", "left"), [("3.qcow2", 3), (None, 2)], ids=["commit", "active commit"])
def test_a_merge(
    libvirt_host: LibvirtHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_layer: str | None, left: int
) -> None:
    asked: Sequence[str] = ()
    for number in itertools.chain([-1], itertools.count()):
        if number >= 0 and number not in set(some(range(2 * len(asked)), each=len(asked) // 2)):
            if number >= 2 * len(asked):
                break
            continue
        chain = Chain(tmp_path / f"images{number}")
        domain = Domain.started(libvirt_host, tmp_path / "domain", {"vda": chain.active}, name=f"dies{next(_NAMES)}")
        try:
            with dies_at(number, libvirt_host, monkeypatch) as requests, suppress(SnapchainError):
                merge(domain, to_layer)
            asked = asked or requests
            check(domain, chain, number)
            merge_again(domain, to_layer)
            check(domain, chain, number)
            assert not list(chain.folder.glob(".snapchain-merge*")), requests
            assert journal.find() == ([], []), requests
            top = domain.source("vda")
            assert domain.source("vda", "--inactive") == top
            assert len(names(top)) == left
            assert set(names(top)) == {path.name for path in chain.folder.glob("*.qcow2")}
            domain.io("vda", "flush")
            domain.kill()
            sound(top)
        finally:
            domain.remove()
