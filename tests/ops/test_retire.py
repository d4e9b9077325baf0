"""A destination that is gone for good: others no longer wait for its word, and it can take nothing over by itself."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from snapchain.errors import Conflict, InvalidInput, Unavailable
from snapchain.model.guest_state import Gone, GuestChange, Place, Transition, after, gone_of, unrecorded
from snapchain.ops.guest_status import status
from snapchain.ops.retire import RetireReport, RetireRequest, retire
from snapchain.replica.permissions import Permissions
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import AskGuest
from snapchain.replica.stream.requests import Right
from tests.ops.guest_points import GUEST
from tests.ops.test_masters_model import NONE, WORD, Everything, Masters, told
from tests.ops.test_other_destinations import REPOSITORY, B, C, failover, migrate, refused, ship, standing


def said(
    model: Masters, place: str, gone: str, *, host: str = "c", undo: bool = False, dry_run: bool = False
) -> RetireReport:
    world = model.world
    with world.on(host):
        asked = RetireRequest(destination=world.url(gone), undo=undo, reach=world.reach())
        return retire(world.destination(place), GUEST, asked, dry_run=dry_run)


def test_a_failover_and_a_move_no_longer_wait_for_it() -> None:
    with told(Everything) as model:
        ship(model, B, C, REPOSITORY, C)
        world = model.world
        for host in ("a", "c"):
            world.cut.add((host, B))
        refused(model, model.copies[0], "c", "it does not answer", Unavailable)
        report = said(model, REPOSITORY, B)
        assert report.who.endswith("@c")
        assert report.told == (world.url(REPOSITORY), f"{world.url(C)} on c")
        assert report.silent == ()
        assert [str(each.place.id) for each in standing(model, C).gone] == [standing(model, B).here.id]  # type: ignore[union-attr]
        migrate(model, 0, "c")
        model._stop(1)
        with failover(model, REPOSITORY, "a") as work:
            assert work.plan().silent == ()
            model._took_over(REPOSITORY, "a", work.run())
        with world.on("c"):
            (row,) = status([(world.destination(REPOSITORY), GUEST)], reach=world.reach()).guests
        assert world.url(B) in row.gone[0]
        assert not any(world.url(B) in each for each in row.silent)


def test_it_can_take_nothing_over_when_it_comes_back() -> None:
    """Others have decided without asking it. The word of a person about the old host is none about this."""
    with told(Everything) as model:
        ship(model, B, C, B)
        world = model.world
        world.cut.add(("c", B))
        said(model, C, B)
        world.cut.clear()
        model._stop(0)
        for proof in ({}, {"fence": [], "vouched": WORD}):
            with (
                failover(model, B, "b", **proof) as work,
                pytest.raises(Conflict, match=r"gone for good: \w+@c said so"),
            ):
                work.run()
        refused(model, model.copies[0], "b", "count it as gone for good")
        assert said(model, C, B, undo=True).told == (f"{world.url(C)} on c",)
        with failover(model, B, "b") as work:
            model._took_over(B, "b", work.run())


def test_one_that_answers_is_not_gone_and_a_new_one_at_its_address_is_another() -> None:
    with told(Everything) as model:
        ship(model, B, C, REPOSITORY, B)
        with pytest.raises(Conflict, match="it answers, and has the guest"):
            said(model, REPOSITORY, B)
        with pytest.raises(InvalidInput, match="no other destination of the guest") as caught:
            said(model, REPOSITORY, REPOSITORY)
        assert model.world.url(C) in (caught.value.hint or "")
        with pytest.raises(InvalidInput, match="no destination of the guest says that it is gone"):
            said(model, REPOSITORY, B, undo=True)
    old, new = Place(id="1", url="ssh://b/r"), Place(id="2", url="ssh://b/r")
    bare = Place(url="ssh://b/r")
    gone = [Gone(place=old, who="root@c", time=datetime.now(UTC))]
    assert gone_of(gone, old) is gone[0]
    assert gone_of(gone, new) is gone_of(gone, bare) is gone_of([], old) is gone_of(gone, None) is None
    assert gone_of([gone[0].model_copy(update={"place": bare})], new) is None


def test_one_at_which_the_guest_was_taken_over_is_not_gone() -> None:
    with told(Everything) as model:
        ship(model, B, REPOSITORY)
        migrate(model, 0, "b")
        model.world.cut.add(("c", B))
        with pytest.raises(Conflict, match="the guest was taken over there"):
            said(model, REPOSITORY, B)
        assert standing(model, REPOSITORY).gone == ()


def test_what_is_shipped_to_later_hears_of_it_from_the_others() -> None:
    """The new destination knows nothing of it: of those that it asks one says so."""
    with told(Everything) as model:
        ship(model, B, REPOSITORY)
        world = model.world
        for host in ("a", "c"):
            world.cut.add((host, B))
        assert said(model, REPOSITORY, B, host="a", dry_run=True).told == (world.url(REPOSITORY),)
        assert standing(model, REPOSITORY).gone == ()
        said(model, REPOSITORY, B, host="a")
        number = standing(model, REPOSITORY).number
        said(model, REPOSITORY, B)
        assert standing(model, REPOSITORY).number == number, "it was said before"
        ship(model, C)
        assert {each.url for each in standing(model, C).others} == {world.url(REPOSITORY), world.url(B)}
        model._stop(0)
        with failover(model, C, "c") as work:
            model._took_over(C, "c", work.run())
        assert model._failover(REPOSITORY, "a", "fence", NONE), "as before"


def test_one_that_is_not_told_waits_as_before() -> None:
    with told(Everything) as model:
        ship(model, B, C, REPOSITORY, C)
        model.world.cut |= {("c", B), ("c", C)}
        report = said(model, REPOSITORY, B)
        assert report.silent == (f"{model.world.url(C)} on c",)
        model.world.cut.discard(("c", C))
        assert said(model, REPOSITORY, B).told == (model.world.url(REPOSITORY), f"{model.world.url(C)} on c")


def test_it_takes_the_right_to_change_who_is_the_master() -> None:
    """A key that may only send could else have a destination left out, and take the guest over there."""
    place = Place(id="1", url="ssh://b/r")
    gone = Gone(place=place, who="root@c", time=datetime.now(UTC))
    only = Permissions(frozenset({Right.SEND}), append_only=True)
    for words in ({"gone": (gone,)}, {"back": (place,)}):
        step = GuestChange(guest=GUEST, transition=Transition.KNOW, seen=0, token="0" * 32, by="a", host="a", **words)
        with pytest.raises(InvalidInput, match="'handover' is missing"):
            only.check(Kind.GUEST, AskGuest(guest=GUEST, change=step), subject="it")
    now = unrecorded(GUEST, 1).model_copy(update={"here": place})
    with pytest.raises(Conflict, match="and is here"):
        after(now, step.model_copy(update={"back": (), "gone": (gone,)}), time=datetime.now(UTC), subject="it")
