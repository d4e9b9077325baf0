"""The destinations to which this host ships a guest: remembered here, and each is told of the others.

    STATE/places/HASH.json     of one guest, whose images lie in one directory

A destination asks another one about a failover only if it knows of it.  So it is told before the first layer comes, and
that takes a request only where the set of destinations has changed.  The directory of the images stands for the guest:
images keep neither their names nor their inodes, and what lies beside them may come back from an old copy.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field

from snapchain.destination.guest_record import guest_of
from snapchain.destination.writing import Writing
from snapchain.errors import Conflict, NotFound, SnapchainError, Unsupported
from snapchain.host.private import read_record, write_record
from snapchain.host.records import state_dir
from snapchain.host.replica_layout import layers_of
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.guest_state import (
    MOST_PLACES,
    Gone,
    GuestChange,
    GuestStanding,
    Place,
    Transition,
    apart_from,
    gone_of,
    joined,
    updated,
)

_CAP = 1 << 20
_NO_TOKEN = "0" * 32
"""Of a step that belongs to no move or failover."""
_TRIES = 5


class _Kept(BaseModel):
    """A destination, and the ids and addresses of the others that it was told of."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    place: Place
    told: tuple[str, ...] = ()
    is_new: bool = Field(default=False, exclude=True)


class _Memory(BaseModel):
    """What this host remembers of a guest. directory: of its images; guest: its name at the destinations."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    directory: str
    guest: str
    kept: tuple[_Kept, ...] = Field(default=(), max_length=MOST_PLACES)


def guest_named_by(disk: str) -> str | None:
    """The guest that a disk belongs to by its name; None for none, and for the disk of a guest's records."""
    guest = disk.rpartition("/")[0]
    return guest if guest and guest_of(disk) is None else None


def places_of(images: Iterable[Path], guest: str) -> tuple[Place, ...]:
    """All destinations of a guest that are known on this host, by its images here. Raises Corrupt for damaged records.

    Those to which it was shipped from here; and where it runs on the files of a replica, that and those that it names.
    """
    found: list[Place] = []
    for directory in _directories(images):
        found += [each.place for each in _recall(directory, guest).kept]
        found += _of_replica(directory, guest)
    return joined(*found)


def own_places(images: Iterable[Path]) -> tuple[Place, ...]:
    """The replicas on whose files a guest runs here: there the marks beside the images say what became of it."""
    return joined(*(each for directory in _directories(images) for each in _own_replica(directory)))


def told_of(images: Iterable[Path], guest: str, place: Place) -> tuple[Place, ...]:
    """The destinations that are known to know of another one."""
    word = _word(place)
    kept = [each for directory in _directories(images) for each in _recall(directory, guest).kept]
    return tuple(each.place for each in kept if word in each.told)


def _word(place: Place) -> str:
    return f"{place.id} {place.url}"


def remember(images: Iterable[Path], guest: str, places: Iterable[Place]) -> None:
    """This host ships a guest to these destinations, or has got it from there. Raises as writing a small file."""
    known = tuple(places)
    for directory in _directories(images):
        memory = _recall(directory, guest)
        told = {each.place.url: each.told for each in memory.kept}
        merged = updated([each.place for each in memory.kept], known)
        _write(memory, [_Kept(place=each, told=told.get(each.url, ())) for each in merged])


@contextmanager
def introduced(image: Path, disk: str, destination: Writing, *, on_event: OnEvent = ignore) -> Iterator[None]:
    """Ship a disk of a guest within the block: the destination is told of the guest's others before, where it was not.

    Raises as `Writing.change_guest`.
    """
    guest = guest_named_by(disk)
    if guest is None:
        yield
        return
    known: _Kept | None = None
    try:
        known = _introduce(image, guest, destination, on_event)
    except (_NotRemembered, RuntimeError) as error:  # no home directory
        on_event(Notice(f"this host cannot remember where the guest is shipped to: {error}"))
    yield
    if known is not None and known.place.id is None:
        with suppress(SnapchainError):  # the next run asks again
            standing = destination.guest_state(guest)
            if standing.here is not None:
                remember([image], guest, [standing.here])
                known = known.model_copy(update={"place": standing.here})
    if known is not None and known.is_new:
        _announce(image, guest, known.place)


def _announce(image: Path, guest: str, new: Place) -> None:
    """Tell the others of a new destination, as far as they can be reached without a passphrase; once.

    Those that do not hear of it are told when the guest is shipped there again.  Until then it asks them.
    """
    for place in apart_from(places_of([image], guest), new):
        with suppress(SnapchainError):
            tell_others(open_other(place.url), guest, [new], by=socket.gethostname())


def open_other(url: str) -> Writing:
    """The destination at an address that is remembered."""
    from snapchain.destinations import open_destination

    return open_destination(url, writing=True)


def tell_others(
    destination: Writing, guest: str, others: Sequence[Place], *, by: str, begins: bool = False
) -> GuestStanding | None:
    """Make a destination know of others; how the guest stands there then.

    begins: it may have nothing of the guest yet: its first layer is still to come, and the replica is made
    Nothing is written where it knows them all: None where it has nothing of the guest either.
    Raises NotFound where nothing is there, and as `Writing.change_guest`.
    """

    def more(standing: GuestStanding | None) -> dict[str, object]:
        known = () if standing is None else (standing.here, *standing.others)
        return {"others": found} if (found := apart_from(others, *known)) else {}

    return _say(destination, guest, more, by=by, begins=begins)


def tell_gone(destination: Writing, guest: str, gone: Gone, *, by: str, undo: bool = False) -> None:
    """Make a destination count another one as gone, or with undo no longer. Raises as `Writing.change_guest`."""

    def more(standing: GuestStanding | None) -> dict[str, object]:
        is_known = standing is not None and gone_of(standing.gone, gone.place) is not None
        if is_known is not undo:
            return {}
        return {"back": (gone.place,)} if undo else {"gone": (gone,)}

    _say(destination, guest, more, by=by)


def _say(
    destination: Writing,
    guest: str,
    more: Callable[[GuestStanding | None], dict[str, object]],
    *,
    by: str,
    begins: bool = False,
) -> GuestStanding | None:
    """KNOW, decided anew where another change came first. more: its fields, none where all of it is known."""
    for attempt in range(_TRIES):
        standing: GuestStanding | None = None
        try:
            standing = destination.guest_state(guest)
        except NotFound:
            if not begins:
                raise
        fields = more(standing)
        if not fields:
            return standing
        change = GuestChange.model_validate(
            {
                "guest": guest,
                "transition": Transition.KNOW,
                "seen": 0 if standing is None else standing.number,
                "token": _NO_TOKEN,
                "by": by,
                "host": by,
                **fields,
            }
        )
        try:
            return destination.change_guest(change)[0]
        except Conflict:
            if attempt == _TRIES - 1:
                raise
    raise AssertionError("the loop returns or raises")


# --- what is remembered


class _NotRemembered(Exception):
    """The state directory cannot be read or written."""


def _introduce(image: Path, guest: str, destination: Writing, on_event: OnEvent) -> _Kept:
    """The destination, as it is remembered here, before anything goes there."""
    me = Place(url=destination.url)
    (directory,) = _directories([image])
    try:
        memory = _recall(directory, guest)
        others = apart_from(joined(*(each.place for each in memory.kept), *_of_replica(directory, guest)), me)
        mine = next((each for each in memory.kept if each.place.is_same(me)), None)
        if mine is None:
            mine = _Kept(place=me, is_new=True)
            _write(memory, [*memory.kept, mine])
    except SnapchainError as error:
        raise _NotRemembered(str(error)) from error
    told = tuple(sorted(map(_word, others)))
    if told != mine.told:
        try:
            standing = tell_others(destination, guest, others, by=socket.gethostname(), begins=True)
        except Unsupported as error:
            on_event(Notice(f"it is not told of the guest's other destinations: {error}"))
            return mine
        if standing is not None and standing.here is not None:
            mine = mine.model_copy(update={"place": updated([mine.place], [standing.here])[0]})
        mine = mine.model_copy(update={"told": told})
        try:
            kept = [mine if each.place.is_same(me) else each for each in _recall(directory, guest).kept]
            _write(memory, kept)
        except SnapchainError as error:
            raise _NotRemembered(str(error)) from error
    return mine


def _directories(images: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(Path(os.path.realpath(image)).parent for image in images))


def _file(directory: Path, guest: str) -> Path:
    text = f"{directory}\0{guest}"
    return state_dir() / "places" / f"{blake3(text.encode()).hexdigest(length=16)}.json"


def _recall(directory: Path, guest: str) -> _Memory:
    try:
        return read_record(_file(directory, guest), _Memory, cap=_CAP)
    except (NotFound, RuntimeError):  # no home directory
        return _Memory(directory=str(directory), guest=guest)


def _write(memory: _Memory, kept: Sequence[_Kept]) -> None:
    write_record(
        _file(Path(memory.directory), memory.guest), memory.model_copy(update={"kept": tuple(kept)[:MOST_PLACES]})
    )


# --- a guest that runs on the files of a replica here


def _own_replica(directory: Path) -> tuple[Place, ...]:
    from snapchain.replica.guest_states import place_of  # inside: few guests run on the files of a replica
    from snapchain.replica.store import open_replica

    layers = layers_of(directory)
    return () if layers is None else (place_of(open_replica(layers.parent)),)


def _of_replica(directory: Path, guest: str) -> tuple[Place, ...]:
    """That replica, and the destinations that it names."""
    from snapchain.replica.guest_store import read_standing

    own = _own_replica(directory)
    if not own:
        return ()
    standing = read_standing(directory.parent.parent, guest)
    return (*own, *(() if standing is None else standing.others))
