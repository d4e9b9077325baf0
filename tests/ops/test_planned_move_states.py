"""A planned move of all disks of a guest writes the guest's state at its destination, wherever it is cut off."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from snapchain.errors import Conflict, Unavailable
from snapchain.host.retry import RetryPolicy
from snapchain.model.guest_state import GuestChange, GuestStanding, GuestState, Place, TakenDisk, Transition, Vouched
from snapchain.ops.migrate import run as migration
from snapchain.ops.migrate.run import Move
from snapchain.replica import client, guest_handover, guest_store, handover
from snapchain.replica.client import guest_at
from snapchain.replica.stream import session
from snapchain.replica.stream.guest_messages import Handed, Handover
from snapchain.replica.stream.requests import Feature
from tests.exhaustive import some
from tests.ops.test_migrate import VDA, Host


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Host kvm1; its replica is on kvm2."""
    monkeypatch.setattr(client, "socket", SimpleNamespace(gethostname=lambda: "kvm1"))
    monkeypatch.setattr(guest_handover, "socket", SimpleNamespace(gethostname=lambda: "kvm2"))
    return Host(tmp_path)


def standing(host: Host) -> GuestStanding:
    return guest_at(host.endpoint, "web1")[0]


def stands(host: Host) -> tuple[GuestState, int, str | None, str | None]:
    now = standing(host)
    return now.state, now.epoch, now.master, now.former


SWITCHED = (GuestState.SWITCHED, 2, "kvm2", "kvm1")
BACK = (GuestState.PROTECTED, 3, "kvm1", "kvm2")


def test_there_and_back(host: Host) -> None:
    host.migrate()
    assert stands(host) == SWITCHED
    host.take_back()
    assert stands(host) == BACK
    host.migrate()
    assert stands(host) == (GuestState.SWITCHED, 4, "kvm2", "kvm1")


def test_the_start_is_recorded_before_the_hook(host: Host, tmp_path: Path) -> None:
    """So one that was overtaken starts nothing; and a guest that has written nothing goes back all the same."""
    seen = tmp_path / "seen"
    record = host.place.root / ".guests" / "web1.json"
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ncp {record} {seen}\n")
    hook.chmod(0o700)
    host.migrate(start_hook=[str(hook)])
    assert '"active"' in seen.read_text()
    assert stands(host) == (GuestState.ACTIVE, *SWITCHED[1:])
    host.take_back()
    assert stands(host) == BACK


def change(at_host: Host, transition: Transition, **more: Any) -> None:
    number = standing(at_host).number
    values: dict[str, Any] = {"token": secrets.token_hex(16), "by": "kvm3", "host": "kvm3", **more}
    guest_at(at_host.endpoint, "web1", GuestChange(guest="web1", transition=transition, seen=number, **values))


def test_one_that_was_overtaken_starts_nothing(host: Host, tmp_path: Path) -> None:
    """Its replica gave the guest back, and took it over by a failover since: another token is in the record."""
    host.migrate()
    overlays = list(host.place.root.glob("*/active/*.qcow2"))
    for overlay in overlays:
        overlay.unlink()
    taken = tuple(TakenDisk(disk=move.disk, point=1) for move in host.moves)
    word = Vouched(how="person", who="root@kvm2")
    change(host, Transition.PROMOTE, vouched=word, disks=taken)
    ran = tmp_path / "ran"
    with pytest.raises(Conflict, match="has gone on from there since"):
        host.migrate(start_hook=["touch", str(ran)])
    assert not ran.exists()


@pytest.mark.parametrize("by", ["take-back", "failover elsewhere"])
def test_one_that_is_overtaken_before_the_start_starts_nothing(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Between the handover and its hook: taken back by another run here, or taken over where this one does not look."""
    real = migration._noted

    def overtaken(*asked: Any) -> None:
        real(*asked)
        if by == "take-back":
            host.take_back()
        else:
            there = Place(url="ssh://kvm3/srv/replica")
            change(host, Transition.FOLLOW, epoch=3, seen_epoch=2, host="kvm3", at=there, former="kvm2")

    monkeypatch.setattr(migration, "_noted", overtaken)
    ran = tmp_path / "ran"
    words = "it was taken back meanwhile" if by == "take-back" else "kvm3 has taken the guest web1 over"
    with pytest.raises(Conflict, match=words):
        host.migrate(start_hook=["touch", str(ran)])
    assert not ran.exists()


def test_some_disks_leave_the_record(host: Host) -> None:
    host.migrate()
    host.take_back()
    host.migrate(moves=[Move(host.vda, VDA)])
    now = standing(host)
    assert (now.state, now.epoch, now.former) == (GuestState.PROTECTED, 4, "kvm1")


def test_a_move_that_nobody_works_at_is_in_nobodys_way(host: Host) -> None:
    host.migrate()
    host.take_back()
    change(host, Transition.MOVE)
    host.migrate()
    assert stands(host)[0] is GuestState.SWITCHED


def test_a_failover_under_way_is(host: Host) -> None:
    host.migrate()
    host.take_back()
    taken = tuple(TakenDisk(disk=move.disk, point=1) for move in host.moves)
    change(host, Transition.PROMOTE, vouched=Vouched(how="person", who="root@kvm2"), disks=taken)
    with pytest.raises(Conflict, match=r"another handover|kvm3 has taken the guest web1 over"):
        host.migrate()
    assert standing(host).state is GuestState.PROMOTING


def test_a_receiver_without_states_is_asked_as_before(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = guest_handover.hand_over, []

    def heard(request: Handover, root: Path) -> Handed:
        asked.append(request.model_dump_json())
        return real(request, root)

    monkeypatch.setattr(guest_handover, "hand_over", heard)
    monkeypatch.setattr(session, "FEATURES", tuple(each for each in Feature if each is not Feature.GUEST_STATE))
    report = host.migrate(start_hook=["true"])
    assert report.started
    assert asked
    assert not any('"by"' in each for each in asked)


STEPS = 6
"""Before and after the record, and the catalogue of each disk."""


def cut_off(patch: pytest.MonkeyPatch, step: int) -> list[int]:
    """The receiver dies before or after one of the files that it writes; the number of those so far."""
    count = [0]

    def cutting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            count[0] += 1
            if count[0] == step + 1:
                raise Unavailable("the receiver died")
            found = real(*args, **more)
            count[0] += 1
            if count[0] == step + 1:
                raise Unavailable("the receiver died")
            return found

        return call

    patch.setattr(migration, "_HANDOVER", RetryPolicy(give_up_after=0.0))
    patch.setattr(guest_handover, "write_standing", cutting(guest_store.write_standing))
    patch.setattr(handover, "_written", cutting(handover._written))
    return count


@pytest.mark.sampled
@pytest.mark.parametrize("then", ["there", "back"])
@pytest.mark.parametrize("goes", ["there", "back"])
def test_it_is_cut_off_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes: str, then: str) -> None:
    """The same command ends it, and the other one undoes it; the record and the disks name one master."""
    monkeypatch.setattr(client, "socket", SimpleNamespace(gethostname=lambda: "kvm1"))
    monkeypatch.setattr(guest_handover, "socket", SimpleNamespace(gethostname=lambda: "kvm2"))
    for step in some(range(STEPS), each=3):
        (tmp_path / f"{step}").mkdir()
        host = Host(tmp_path / f"{step}")
        if goes == "back":
            host.migrate()
        with monkeypatch.context() as patch:
            count = cut_off(patch, step)
            with pytest.raises(Unavailable, match="the receiver died"):
                host.migrate() if goes == "there" else host.take_back()
        assert count == [step + 1]
        try:
            host.migrate() if then == "there" else host.take_back()
        except Conflict:
            assert (goes, then) == ("back", "there"), "a disk is back already"
            host.take_back()
        now, masters = standing(host), host.masters()
        if masters == {f"{move.disk} there" for move in host.moves}:
            assert (now.state, now.master, now.former) == (GuestState.SWITCHED, "kvm2", "kvm1")
        else:
            assert masters == {f"{move.disk} here" for move in host.moves}
            assert now.state is GuestState.PROTECTED
            assert now.master in ("kvm1", None), "nothing is recorded of what never came there"
        assert {host.catalogue(move.disk)["epoch"] for move in host.moves} == {now.epoch}
