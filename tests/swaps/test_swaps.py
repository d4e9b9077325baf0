"""Root at work in a directory whose owner swaps each name just before it is used: nothing of root's comes to harm.

Of some verbs a share of the attacks; `make soak` does them all. One that was found is repeated by
`python -m tests.swaps VERB --only ATTACK`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from snapchain.host.openers import OpenFiles
from snapchain.host.rights import Rights, acting_as
from tests.exhaustive import EXHAUSTIVE, chosen
from tests.swaps.attacks import OF_NAMES, Attack, Kind
from tests.swaps.campaign import Campaign, preload
from tests.swaps.verbs import VERBS, Verb
from tests.swaps.world import USER, World, place_of_its_own

pytestmark = pytest.mark.root
EACH = 5
"""Of so many verbs `make test` attacks one: neighbours in the list are of one kind."""
SHARE = 3
"""Attacks on each of these verbs in `make test`."""


@pytest.fixture
def place() -> Iterator[Path]:
    """Reachable for everybody, as what pytest makes is not, and in memory."""
    with place_of_its_own() as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def _preloaded() -> None:
    preload()


def share(attacks: list[Attack], first: int) -> list[Attack]:
    """All of them, or SHARE of them, of all parts of the run and of all kinds."""
    step = max(1, len(attacks) // SHARE)
    # Kinds alternate; an odd distance meets them all in turn.
    return attacks if EXHAUSTIVE else attacks[first % step :: step | 1]


def _cases() -> Iterator[object]:
    for number, verb in enumerate(VERBS):
        yield pytest.param(verb, id=verb.name, marks=[] if chosen(number, each=EACH) else [pytest.mark.soak])


@pytest.mark.sampled
@pytest.mark.parametrize("verb", list(_cases()))
def test_root_is_not_led_astray(verb: Verb, place: Path) -> None:
    with closing(Campaign(verb, place)) as campaign:
        found = list(campaign.record())
        assert [str(finding) for finding in found] == [], "it does not end well without a swap"
        for attack in share(list(campaign.attacks()), first=7 * VERBS.index(verb)):
            found += campaign.attack(attack)
        assert [str(finding) for finding in found if finding.harm] == []


# What the test above rests on: that each kind of harm is seen, and none where there is none.


def _campaign(function: Callable[[World], object], place: Path) -> Campaign:
    return Campaign(Verb("function", "", function=function, layers=2), place)


def _harms(campaign: Campaign, *kinds: Kind) -> list[str]:
    found = [*campaign.record()]
    for attack in campaign.attacks():
        if attack.kind in kinds and not attack.back:
            found += campaign.attack(attack)
    return [str(finding) for finding in found if finding.harm]


def _temporary(world: World) -> Path:
    """A new file, closed and gone on with by name."""
    path = world.images / "temporary"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o600))
    return path


def _read(world: World) -> None:
    world.disk.read_bytes()


def _read_after_a_check(world: World) -> None:
    if not world.disk.is_symlink():
        world.disk.read_bytes()


def _copied(world: World) -> None:
    (world.images / "copy").write_bytes(world.disk.read_bytes())


def _written_over(world: World) -> None:
    with _temporary(world).open("r+b") as file:
        file.write(b"over")


def _chown_by_a_program(world: World) -> None:
    subprocess.run(["chown", str(USER), _temporary(world)], check=False)


def _linked(world: World) -> None:
    (world.root / "second").hardlink_to(world.disk)


def _looked_for_users(world: World) -> None:
    with acting_as(Rights.of_user(USER)):
        OpenFiles()


SECRET, IMAGE = Kind.LINK_TO_SECRET, Kind.LINK_TO_IMAGE
HARMS: dict[str, tuple[Callable[[World], object], Kind | None, str]] = {
    "owner": (lambda world: os.chown(_temporary(world), USER, USER), SECRET, "changed: out/etc/shadow: owner, group"),
    "by another program": (_chown_by_a_program, SECRET, "changed: out/etc/shadow: owner"),
    "mode": (lambda world: _temporary(world).chmod(0o640), SECRET, "changed: out/etc/shadow: mode"),
    "attributes": (lambda world: os.setxattr(_temporary(world), "user.a", b"b"), SECRET, "etc/shadow: xattrs"),
    "content": (_written_over, Kind.HARD_LINK_SHARED, "changed: out/etc/shared.log: content"),
    "made": (lambda world: (world.images / "new").write_bytes(b""), Kind.LINK_TO_NOTHING, "made: out/etc/new"),
    "removed": (lambda world: world.disk.unlink(), Kind.PARENT, "removed: out/images/disk.qcow2"),
    "linked": (_linked, Kind.PARENT, "changed: out/images/disk.qcow2: links"),
    "read": (_read, IMAGE, "read: out/images/disk.qcow2"),
    "read by a hard link": (_read, Kind.HARD_LINK_SECRET, "read: out/images/disk.qcow2"),
    "read after a check": (_read_after_a_check, IMAGE, "read: out/images/disk.qcow2"),
    "a device": (_read, Kind.LINK_TO_DEVICE, "read: out/dev/disk"),
    "a FIFO": (_read, Kind.FIFO, "hangs in openat u/images/disk.qcow2"),
    "copied": (_copied, IMAGE, "secret bytes in u/images/copy"),
    "a traceback": (lambda world: world.disk.stat(), Kind.LINK_TO_NOTHING, "ends with 1"),
    "set-id": (lambda world: _temporary(world).chmod(0o4755), None, "a set-id file: u/images/temporary"),
    "open to all": (lambda world: _temporary(world).chmod(0o666), None, "others may write u/images/temporary"),
    "a look at processes": (_looked_for_users, None, f"looks at processes as ({USER}, "),
    "a device node": (lambda world: os.mknod(world.images / "n", 0o20600, 0x103), None, "a device node: u/images/n"),
}


@pytest.mark.parametrize("name", HARMS)
def test_each_harm_is_seen(name: str, place: Path) -> None:
    function, kind, words = HARMS[name]
    with closing(_campaign(function, place)) as campaign:
        found = _harms(campaign, *([kind] if kind else []))
    assert any(words in finding for finding in found), found


def test_no_harm_is_seen_where_there_is_none(place: Path) -> None:
    def careful(world: World) -> None:
        try:
            directory = os.open(world.images, os.O_DIRECTORY | os.O_NOFOLLOW)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            os.fchown(os.open("new", flags, 0o600, dir_fd=directory), USER, USER)
            os.rename("new", "newer", src_dir_fd=directory, dst_dir_fd=directory)
        except OSError as error:
            sys.stderr.write(f"snapchain: error: {error}\n")
            sys.exit(2)

    with closing(_campaign(careful, place)) as campaign:
        assert _harms(campaign, *Kind) == []


def test_every_name_is_attacked_and_each_in_every_way(place: Path) -> None:
    def looking(world: World) -> None:
        for _ in range(20):
            world.disk.stat()

    with closing(_campaign(looking, place)) as campaign:
        campaign.record()
        attacks = list(campaign.attacks())
        last = [name for name in campaign.names if name.is_last]
    assert {(attack.number, attack.step) for attack in attacks} == {(each.number, each.step) for each in campaign.names}
    ways = {(attack.kind, attack.back) for attack in attacks if any(each.number == attack.number for each in last)}
    assert {(kind, back) for kind in OF_NAMES for back in (False, True)} <= ways
    assert all(Attack.parse(str(attack)) == attack for attack in attacks)
