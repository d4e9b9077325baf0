"""A guest with several destinations has one master: the orders of events in which these must ask each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Conflict, InvalidInput, SnapchainError, Unavailable
from snapchain.image import scan
from snapchain.model.guest_state import GuestStanding, GuestState
from snapchain.ops.failover.request import FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.migrate import run as migration
from snapchain.source.ownership import check_not_given
from tests.ops.guest_points import GUEST
from tests.ops.masters import Copy, ship as ship_images
from tests.ops.test_masters_model import NONE, Everything, Masters, told

A, B, C, REPOSITORY = "a/replica", "b/replica", "c/replica", "repository"


def ship(model: Masters, *places: str, which: int = 0) -> None:
    for place in places:
        model.ship(which, model.world.places.index(place), NONE)


def migrate(model: Masters, which: int, host: str) -> int:
    """The number of the images that the guest has there."""
    model._stop(which)
    assert model._migrate(model.copies[which], host, NONE)
    return len(model.copies) - 1


@contextmanager
def failover(model: Masters, place: str, host: str, **asked: Any) -> Iterator[Failover]:
    """It begins, on that host; the old host is down only as far as `asked` proves."""
    world = model.world
    model.unaware |= {*model.hosts} - {host}
    with world.on(host):
        values = {"fence": ["true"], "reach": world.reach(), **asked}
        request = FailoverRequest(directory=world.root / host / f"out-{place.replace('/', '-')}", host=host, **values)
        yield Failover(world.destination(place), GUEST, request)


def standing(model: Masters, place: str) -> GuestStanding:
    found = model.world.standing(place)
    assert found is not None
    return found


def refused(model: Masters, copy: Copy, host: str, match: str, kind: type[SnapchainError] = Conflict) -> None:
    with model.world.on(copy.host), pytest.raises(kind, match=match):
        migration.migrate(model._moves(copy), model.world.endpoint(f"{host}/replica"))


@pytest.mark.parametrize("is_told", [True, False])
def test_an_old_host_moves_its_images_to_a_third_destination(is_told: bool) -> None:
    """ship to b; failover at b, fenced truly; the old host comes back unaware, and gives its unmarked images to c."""
    with told(Everything) as model:
        ship(model, B, *([C] if is_told else []))
        model.back_up()
        assert model._failover(B, "b", "fence", NONE)
        model.restore_old()
        refused(model, model.copies[0], "c", r"b has taken the guest web1 over|in epoch 2: another host has taken it")
        with (
            model.world.on("a"),
            scan(model.copies[0].images["vda"]) as chain,
            pytest.raises(Conflict, match="taken the"),
        ):
            check_not_given(chain)
        assert model.world.masters(model.copies, requires_answer=False)["vda"] == {"b"}


def test_images_of_which_a_silent_destination_may_know_better() -> None:
    """As before, but the one destination that knows does not answer. Only a word goes on; a true one hurts nobody."""
    with told(Everything) as model:
        ship(model, A, B)
        model.world.cut.add(("a", B))
        refused(model, model.copies[0], "c", "may have been taken over there, and it does not answer", Unavailable)
        with model.world.on("a"), scan(model.copies[0].images["vda"]) as chain:
            check_not_given(chain)
        model.without = (B,)
        migrate(model, 0, "c")
        model.without = (C,)
        refused(model, model.copies[1], "b", "no other destination of the guest", InvalidInput)


def test_a_failover_is_about_the_host_to_which_the_guest_was_moved(tmp_path: Path) -> None:
    """ship to a repository, migrate a -> b; then another host fails over at the repository."""
    with told(Everything) as model:
        ship(model, REPOSITORY)
        migrate(model, 0, "b")
        assert standing(model, REPOSITORY).at is not None
        model._stop(1)
        log = tmp_path / "log"
        fence = tmp_path / "fence"
        fence.write_text(f"#!/bin/sh\necho $SNAPCHAIN_HOST >> {log}\n")
        fence.chmod(0o700)
        with failover(model, REPOSITORY, "c", fence=[str(fence)]) as work:
            assert work.plan().master == "b"
            assert "b/replica" in (work.plan().master_at or "")
            model._took_over(REPOSITORY, "c", work.run())
        assert log.read_text().split() == ["b", "b"]
        assert standing(model, B).master == "c"


def test_a_failover_is_about_the_end_of_the_trail() -> None:
    """a -> b -> c -> a without a shipment in between; then a failover at b."""
    with told(Everything) as model:
        ship(model, B)
        for which, host in enumerate(("b", "c", "a")):
            migrate(model, which, host)
        model._stop(3)
        with failover(model, B, "b") as work:
            assert work.plan().master == "a"
            assert "a/replica" in (work.plan().master_at or "")
            model._took_over(B, "b", work.run())
        assert {standing(model, place).epoch for place in (A, B)} == {5}


def test_a_trail_that_cannot_be_followed_needs_a_word() -> None:
    with told(Everything) as model:
        ship(model, B)
        migrate(model, 0, "b")
        migrate(model, 1, "c")
        model.world.cut.add(("b", C))
        with failover(model, B, "b") as work, pytest.raises(Unavailable, match="may have been taken over there"):
            work.run()
        assert standing(model, B).state is GuestState.PROTECTED


def test_failovers_one_after_the_other() -> None:
    """At b, and later from the repository: the second is about b, and b is refused from then on."""
    with told(Everything) as model:
        ship(model, B, REPOSITORY)
        assert model._failover(B, "b", "fence", NONE)
        assert standing(model, REPOSITORY).master == "b"
        model._stop(1)
        with failover(model, REPOSITORY, "c") as work:
            assert (work.plan().master, work.plan().epoch) == ("b", 3)
            model._took_over(REPOSITORY, "c", work.run())
        assert model.world.masters(model.copies, requires_answer=False)["vda"] == {"c"}


@pytest.mark.parametrize("step", ["_promote", "_tell_others", "_lay_out"])
def test_failovers_at_the_same_time(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The one at b comes in whole before a step of the one at the repository. One of them ends, and starts nothing."""
    with told(Everything) as model:
        ship(model, B, REPOSITORY)
        model._stop(0)
        real: Callable[..., Any] = getattr(Failover, step)
        errors: list[SnapchainError] = []

        def meanwhile(work: Failover, *arguments: Any) -> Any:
            monkeypatch.setattr(Failover, step, real)
            try:
                with failover(model, B, "b") as other:
                    model._took_over(B, "b", other.run())
            except SnapchainError as error:
                errors.append(error)
            return real(work, *arguments)

        monkeypatch.setattr(Failover, step, meanwhile)
        try:
            with failover(model, REPOSITORY, "c") as work:
                model._took_over(REPOSITORY, "c", work.run())
        except SnapchainError as error:
            errors.append(error)
        masters = model.world.masters(model.copies, requires_answer=False)
        assert set(map(frozenset, masters.values())) in ({frozenset("b")}, {frozenset("c")})
        assert len(errors) == 1


def test_a_destination_that_was_told_refuses_the_old_host() -> None:
    with told(Everything) as model:
        ship(model, B, C, REPOSITORY)
        assert model._failover(B, "b", "fence", NONE)
        for place in (C, REPOSITORY):
            found = standing(model, place)
            assert (found.state, found.master, found.epoch) == (GuestState.PROTECTED, "b", 2)
            with (
                model.world.on("a"),
                pytest.raises(Conflict, match=r"b has taken the guest web1 over .* at dir:.*b/replica"),
            ):
                ship_images(model.world, model.copies[0], place, 99)
