"""How long it is tried again, how often a retry is announced, and what is not tried again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import Busy, Diverged, ToolFailed, Unavailable
from snapchain.host.retry import Lasting, Retry, RetryPolicy, retry


class World:
    """A clock that only sleeping and attempts move, and a far end that has so many bytes."""

    def __init__(self, *attempts: Callable[[World], str], policy: RetryPolicy = RetryPolicy()) -> None:  # noqa: B008
        self.now = 0.0
        self.durable = 0
        self.told: list[Retry] = []
        self.called = 0
        self._attempts = attempts
        self._policy = policy

    def run(self) -> str:
        return retry(
            self._attempt,
            policy=self._policy,
            progress=lambda: self.durable,
            on_retry=self.told.append,
            clock=lambda: self.now,
            sleep=self._sleep,
        )

    def _attempt(self) -> str:
        attempt = self._attempts[min(self.called, len(self._attempts) - 1)]
        self.called += 1
        return attempt(self)

    def _sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


def lost(*, after: float = 0.0, moved: int = 0) -> Callable[[World], str]:
    def attempt(world: World) -> str:
        world.now += after
        world.durable += moved
        raise Unavailable("the connection was lost", subject="kvm2")

    return attempt


def done(_world: World) -> str:
    return "done"


def test_what_works_is_called_once() -> None:
    world = World(done)
    assert world.run() == "done"
    assert (world.called, world.told) == (1, [])


def test_it_goes_on_after_a_cut() -> None:
    world = World(lost(), lost(), lost(), done)
    assert world.run() == "done"
    assert [retry.failures for retry in world.told] == [1, 2, 3]
    assert "kvm2: the connection was lost; trying again in" in str(world.told[0])
    assert world.now < 1 + 2 + 4


def test_a_host_that_stays_away_is_given_up() -> None:
    world = World(lost(after=2), policy=RetryPolicy(give_up_after=100))
    with pytest.raises(Unavailable, match="connection was lost"):
        world.run()
    assert 100 <= world.now <= 104
    assert world.called > 5


def test_an_attempt_that_gets_somewhere_starts_the_count_anew() -> None:
    bad_link = [lost(after=60, moved=1) for _ in range(50)]
    world = World(*bad_link, done, policy=RetryPolicy(give_up_after=90))
    assert world.run() == "done"
    assert world.now > 50 * 60
    assert {retry.failures for retry in world.told} == {1}


def test_moving_once_does_not_help_for_ever() -> None:
    world = World(lost(), lost(moved=5), lost(), policy=RetryPolicy(give_up_after=50))
    with pytest.raises(Unavailable, match="the connection was lost"):
        world.run()
    assert 50 <= world.now <= 53


@pytest.mark.parametrize("error", [Diverged("two histories"), ToolFailed("no", argv=(), status=1, stderr="")])
def test_what_will_not_pass_is_not_tried_again(error: Exception) -> None:
    def refuse(_world: World) -> str:
        raise error

    world = World(lost(), refuse)
    with pytest.raises(type(error), match=f"^{error}$"):
        world.run()
    assert world.called == 2


def busy(_world: World) -> str:
    raise Busy("another transfer to this disk is under way", subject="kvm2")


def test_busy_may_be_our_own_ghost_but_not_at_first() -> None:
    world = World(lost(), busy, busy, done)
    assert world.run() == "done"
    assert isinstance(world.told[1].error, Busy)
    with pytest.raises(Busy, match="another transfer to this disk"):
        World(busy, done).run()


@given(st.integers(1, 10_000))
def test_pauses_grow_to_a_bound(failures: int) -> None:
    policy = RetryPolicy()
    whole = min(30.0, 2.0 ** min(failures - 1, 60))
    assert whole / 2 <= policy.pause(failures) <= whole


@given(
    st.lists(st.tuples(st.floats(0, 200), st.integers(0, 1)), max_size=30),
    st.floats(1, 500),
)
def test_it_always_ends(history: list[tuple[float, int]], give_up_after: float) -> None:
    attempts = [lost(after=after, moved=moved) for after, moved in history]
    world = World(*attempts, lost(), policy=RetryPolicy(give_up_after=give_up_after))
    with pytest.raises(Unavailable, match="the connection was lost"):
        world.run()
    assert world.now <= sum(after for after, _ in history) + (1 + len(history)) * (give_up_after + 1)
    assert all(retry.pause <= retry.left for retry in world.told)


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("no space left on device", subject="/srv/replica/web1"),
        Lasting("no space left on device", subject="kvm2: /srv/replica/web1"),
    ],
)
def test_what_a_disk_fails_by_is_not_asked_for_again(error: Unavailable) -> None:
    def attempt(_world: World) -> str:
        raise error

    world = World(lost(moved=1), attempt, done)
    with pytest.raises(Unavailable, match="no space"):
        world.run()
    assert world.called == 2
