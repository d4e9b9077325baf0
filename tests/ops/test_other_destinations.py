"""A guest with several destinations has one master: the orders of events in which these must ask each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError, Unavailable
from snapchain.image import scan
from snapchain.model.events import ignore
from snapchain.model.guest_state import GuestChange, GuestStanding, GuestState, Place, Transition, after, unrecorded
from snapchain.model.lease import Lease
from snapchain.ops.failover.request import FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.migrate import run as migration
from snapchain.ops.migrate.elsewhere import Elsewhere
from snapchain.ops.other_destinations import Reach
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.disk_writer import ReplicaWriting
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.permissions import Permissions
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import AskGuest
from snapchain.replica.stream.requests import Right
from snapchain.repository.disk_writer import RepositoryWriting
from snapchain.source.ownership import check_not_given
from tests.ops.guest_points import GUEST
from tests.ops.masters import Copy, ship as ship_images
from tests.ops.test_masters_model import NONE, WORD, Everything, Masters, told

A, B, C, REPOSITORY = "a/replica", "b/replica", "c/replica", "repository"


def ship(model: Masters, *places: str) -> None:
    for place in places:
        model.ship(0, model.world.places.index(place), NONE)


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
        model.write(0, 0)
        model._stop(1)
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


def test_a_silent_replica_on_the_host_that_is_down_needs_no_word() -> None:
    """b is the master, and down; its own replica is silent, and the proof is about b."""
    with told(Everything) as model:
        ship(model, REPOSITORY)
        migrate(model, 0, "b")
        model._stop(1)
        model.world.cut |= {("c", B)}
        with failover(model, REPOSITORY, "c") as work:
            assert work.plan().silent == (f"{model.world.url(B)} on b",)
            model._took_over(REPOSITORY, "c", work.run())


def test_a_word_for_a_silent_destination_is_recorded() -> None:
    with told(Everything) as model:
        ship(model, B, C, REPOSITORY)
        model._stop(0)
        model.world.cut |= {("c", B)}
        with failover(model, REPOSITORY, "c") as work, pytest.raises(Unavailable, match="does not answer"):
            work.run()
        assert standing(model, REPOSITORY).state is GuestState.PROTECTED
        with failover(model, REPOSITORY, "c", reach=model.world.reach(B)) as work:
            model._took_over(REPOSITORY, "c", work.run())
        vouched = standing(model, REPOSITORY).vouched
        assert vouched is not None
        assert (vouched.how, f"without {model.world.url(B)} on b, as " in vouched.words) == ("fence", True)
        assert standing(model, C).master == "c"


def test_a_guest_that_is_shipped_again_costs_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    with told(Everything) as model:
        ship(model, B, REPOSITORY)
        places = {place: standing(model, place).others for place in (B, REPOSITORY)}
        assert [each.url for each in places[B]] == [model.world.url(REPOSITORY)]
        assert [(each.url, each.host) for each in places[REPOSITORY]] == [(model.world.url(B), "b")]
        ship(model, B, REPOSITORY)  # the first that was told by the second is asked once more
        numbers = [standing(model, place).number for place in (B, REPOSITORY)]
        for place in (ReplicaWriting, RepositoryWriting):
            monkeypatch.setattr(place, "guest_state", None)
            monkeypatch.setattr(place, "change_guest", None)
        ship(model, B, REPOSITORY)
        monkeypatch.undo()
        assert [standing(model, place).number for place in (B, REPOSITORY)] == numbers


def test_a_destination_is_told_before_it_has_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shipment that is cut off leaves no guest point where the others are not known."""
    with told(Everything) as model:
        ship(model, REPOSITORY)

        def stop(*_arguments: Any, **_options: Any) -> Any:
            raise Unavailable("the link is cut")

        with monkeypatch.context() as patch:
            patch.setattr(ReplicaWriting, "write", stop)
            with model.world.on("a"), pytest.raises(Unavailable, match="link is cut"):
                ship_images(model.world, model.copies[0], B, 50)
        assert [each.url for each in standing(model, B).others] == [model.world.url(REPOSITORY)]
        with model.world.on("b"), pytest.raises(NotFound, match="there is no such guest"):
            Failover(model.world.destination(B), GUEST, FailoverRequest(directory=model.root / "out", vouched=WORD))


def test_an_address_that_is_another_destination_here_is_no_answer() -> None:
    """Of a path that means something else on this host, only the id tells. --at names the right one."""
    with told(Everything) as model:
        ship(model, A, REPOSITORY)
        migrate(model, 0, "b")
        model._stop(1)
        world = model.world
        moved = world.root / "c" / "elsewhere"
        (world.root / A).rename(moved)
        ship(model, C)
        shutil.copytree(world.root / C, world.root / A)
        with (
            failover(model, REPOSITORY, "c") as work,
            pytest.raises(Unavailable, match="another destination is at that"),
        ):
            work.run()
        here = f"dir:{moved}"
        opens = lambda url: ReplicaDestination(DirectoryEndpoint(moved)) if url == here else world._opened(url)  # noqa: E731
        with failover(model, REPOSITORY, "c", reach=Reach(at=[here], opens=opens)) as work:
            model._took_over(REPOSITORY, "c", work.run())
        shutil.rmtree(world.root / A)
        moved.rename(world.root / A)


def test_a_key_that_may_only_send_names_destinations_and_takes_none_away() -> None:
    def change(transition: Transition) -> AskGuest:
        lease = Lease(token="0" * 32, seconds=30, host="a", epoch=1) if transition is Transition.LEASE else None
        step = GuestChange(guest=GUEST, transition=transition, seen=0, token="0" * 32, by="a", host="a", lease=lease)
        return AskGuest(guest=GUEST, change=step)

    only = Permissions(frozenset({Right.SEND}), append_only=True)
    only.check(Kind.GUEST, change(Transition.KNOW), subject="it")
    for transition in set(Transition) - {Transition.KNOW}:
        with pytest.raises(InvalidInput, match="'handover' is missing"):
            only.check(Kind.GUEST, change(transition), subject="it")
    now = unrecorded(GUEST, 1)
    known = Place(id="1", url="ssh://b/r")
    for more in ([known], [Place(id="2", url="/x")], [], [Place(id="1", url="dir:/r", host="b")]):
        asked = change(Transition.KNOW).change
        assert asked is not None
        asked = asked.model_copy(update={"others": tuple(more), "seen": now.number})
        now = after(now, asked, time=datetime.now(UTC), subject="it")
    assert now.others == (Place(id="1", url="ssh://b/r", host="b"), Place(id="2", url="/x"))


def test_an_older_program_is_sent_what_it_knows() -> None:
    place = Place(id="1", url="ssh://b/r")
    now = unrecorded(GUEST, 2).model_copy(update={"others": (place,), "at": place, "here": place, "master": "b"})
    assert not {"others", "at", "here"} & set(now.for_older().model_dump())
    assert GuestStanding.model_validate_json(now.model_dump_json()) == now
    step = GuestChange(guest=GUEST, transition=Transition.START, seen=0, token="0" * 32, by="a", host="a")
    assert not {"others", "at", "epoch", "seen_epoch"} & set(step.model_dump())


def test_a_guest_that_moves_while_it_runs_is_announced_before() -> None:
    """A silent destination needs no word if it was told of the place to which the guest goes: it would ask there."""
    model = Everything()
    model.begin(requires_answer=True, ships=False)
    try:
        ship(model, B, C, REPOSITORY, B)
        world = model.world
        world.cut.add(("a", B))
        with world.on("a"):
            request = model._moves(model.copies[0])
            moving = Elsewhere(request, world.endpoint(C), ignore)
            moving.announce(1)
            with pytest.raises(Unavailable, match="may have been taken over there"):
                Elsewhere(request, world.endpoint(A), ignore).announce(1)
            with pytest.raises(Unavailable, match="may have been taken over there"):
                # Images at rest are no proof that this host is the master.
                Elsewhere(request, world.endpoint(C), ignore).check(1, "0" * 32)
            moving.tell_afterwards("1" * 32, 2)
        for place in (B, REPOSITORY):
            assert world.url(C) in [each.url for each in standing(model, place).others]
        assert (standing(model, REPOSITORY).master, standing(model, REPOSITORY).epoch) == ("c", 2)
        assert standing(model, B).epoch == 1
    finally:
        model.clear()


def test_a_failover_asks_where_the_guest_went() -> None:
    """The repository was silent when the guest moved, and a person vouched for it. It knows the place, and asks."""
    with told(Everything) as model:
        ship(model, B, REPOSITORY)
        model.world.cut.add(("a", REPOSITORY))
        model.without = (REPOSITORY,)
        migrate(model, 0, "b")
        model.without = ()
        model.world.cut.clear()
        assert standing(model, REPOSITORY).master is None
        model._stop(1)
        with failover(model, REPOSITORY, "c") as work:
            assert (work.plan().master, work.plan().epoch) == ("b", 3)
            model._took_over(REPOSITORY, "c", work.run())
