"""A catalogue at a glance: the disk's name, how many points, and the newest ones, in a seventh of the time of `parse`.

`parse` validates each point. For 10,000 disks of 365 points that takes 22 s of processor. Here all points are looked at
at once, as an array of bytes:

    ...,"points":[{"point":1,"time":"2026-...Z",...},{"point":2,...},...],"parents":{...}}
                  ^ the first and the last are read  ^ of the others: begin, number, time, and how many fields
                    field by field                     all of them have

Checked here: the seal, so the bytes are unaltered and at their place; the fields at the top; the form of the first and
of the last point; that the points have as many fields as these, and lie side by side, so that none has a field that is
unknown; that numbers ascend; that times have the form of UTC, and the newest one is a time.
Not checked: the rest of the points, such as layers and content ids, and the chains of layers.  Whoever reads or writes
a point parses the whole.

A catalogue of another form, such as one of another program, is parsed as a whole here, too.  So a damaged or a newer
form is refused as `parse` refuses it.
"""

from __future__ import annotations

import json
import re
from datetime import datetime

import numpy as np
import numpy.typing as npt

from snapchain.destination.guest_record import guest_of
from snapchain.destination.summary import DiskSummary, PointSummary, possible_guest
from snapchain.model.disk_name import is_disk_name
from snapchain.model.extents import Int64s
from snapchain.model.freshness import candidates
from snapchain.model.retention import is_future
from snapchain.repository.catalogue import KIND, MOST_LAYERS, Catalogue
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import parse as parse_stored, unseal

_Bytes = npt.NDArray[np.uint8]

_POINTS, _PARENTS = b',"points":[', b'],"parents":{'
_POINT = re.compile(
    rb'\{"point":(?P<number>[0-9]+),"time":"(?P<time>[^"]+)","labels":\[[^\]]*\],"layer":"[^"]{32}","size":(?P<size>[0-9]+),'
    rb'"content_id":"[^"]{64}","holds":\[[^\]]*\]'
    rb'(?P<rest>(?:,"instant":(?:null|(?P<instant>"[0-9a-f]{32}")))?'
    rb'(?:,"consistency":(?:null|"[a-z]+"))?(?:,"made_by":(?:null|"[^"\\]*"))?)\}'
)
_FIELDS = 7
"""That each point has."""
_FIELDS_OF_A_HOLD = 3
_INSTANT = b',"instant":"'
_BEFORE_NUMBER, _BEFORE_TIME = len('{"point":'), len(',"time":"')
_TIME = np.frombuffer(b"0000-00-00T00:00:00.000000Z", np.uint8)
_SPANS = np.where(ord("0") == _TIME, 9, 0).astype(np.uint8)
"""How far a byte of a time may be above that of _TIME."""
_SECONDS = len("0000-00-00T00:00:00")
_ZERO, _BRACE, _END, _COMMA, _QUOTE, _COLON, _ZULU, _P, _T = b'0{},":Zpt'
_LONGEST_HEAD = 8192
"""Bytes before the points."""
_LONGEST_NUMBER = 15
"""Digits."""
_HEAD = frozenset(Catalogue.model_fields) - {"points", "parents"}


class _NotPlain(Exception):
    """The text has another form than snapchain gives it."""


def glance(keys: Keyring, name: str, data: bytes, now: datetime) -> tuple[DiskSummary, int]:
    """A catalogue as stored, in short, and its generation. `guest` is set where the points or the name tell of one.

    name: of the object; now: the clock, see model/freshness.py
    Raises Corrupt, or Unsupported for a newer one.
    """
    body = unseal(keys, KIND, name, data)
    try:
        return _glance(body, now)
    except (_NotPlain, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):  # for `parse`
        found = parse_stored(Catalogue, body, what="the catalogue", subject=name)
    kept = candidates(found.points, now)
    summary = DiskSummary(
        name=found.disk,
        epoch=found.epoch,
        points=len(found.points),
        layers=len(found.parents),
        newest=tuple(PointSummary(point=each.point, time=each.time, virtual_size=each.size) for each in kept),
        guest=_guest(found.disk, has_instant=any(point.instant for point in found.points)),
        renamed=found.is_gone,
    )
    return summary, found.generation


def _glance(body: bytes, now: datetime) -> tuple[DiskSummary, int]:
    first = body.find(_POINTS, 0, _LONGEST_HEAD)
    stop = body.rfind(b"{") + 1 - len(_PARENTS)
    if not 0 < first < stop or not body.startswith(_PARENTS, stop) or body.find(b"}", stop) != len(body) - 2:
        raise _NotPlain
    head = json.loads(body[:first] + b"}")
    if head.keys() - _HEAD or head["format"] != 1:
        raise _NotPlain
    generation, epoch, following = head["generation"], head.get("epoch", 0), head["next_point"]
    points = _Points(body, first + len(_POINTS), stop)
    layers = body.count(b":", stop) - 1
    if (
        not is_disk_name(head["disk"])
        or any(type(number) is not int for number in (generation, epoch, following))
        or points.highest >= following
        or layers > MOST_LAYERS
    ):
        raise _NotPlain
    summary = DiskSummary(
        name=head["disk"],
        epoch=epoch,
        points=points.count,
        layers=layers,
        newest=points.newest(now),
        guest=_guest(head["disk"], has_instant=possible_guest(head["disk"]) is not None and points.has_instant),
    )
    return summary, generation


def _guest(disk: str, *, has_instant: bool) -> str | None:
    return possible_guest(disk) if has_instant or guest_of(disk) is not None else None


class _Points:
    """The points of a catalogue's text, from `first` to `stop`. Raises _NotPlain, and IndexError, for another form.

    count: how many; highest: the number of the last one, 0 where there is none
    """

    def __init__(self, body: bytes, first: int, stop: int) -> None:
        self._body, self._first, self._stop = body, first, stop
        self.count = self.highest = 0
        if first == stop:
            return
        text = np.frombuffer(body, np.uint8)
        within = text[first:stop]
        opened = _places(within, _BRACE) + first
        kinds = text[opened + 2]
        self._begins = opened[kinds == _P]
        self.count = len(self._begins)
        if int(self._begins[0]) != first:
            raise _NotPlain
        lowest, last = self._point(0), self._point(-1)
        fields = _FIELDS + last["rest"].count(b":")
        is_key = (within[:-1] == _QUOTE) & (within[1:] == _COLON)
        holds = len(opened) - self.count
        further = self._begins[1:]
        if (
            last.end() != stop
            or lowest["rest"].count(b":") + _FIELDS != fields
            or np.count_nonzero(is_key) != fields * self.count + _FIELDS_OF_A_HOLD * holds
            or np.count_nonzero(kinds == _T) != holds
            or not ((text[further - 1] == _COMMA) & (text[further - 2] == _END)).all()
        ):
            raise _NotPlain
        self._numbers, begins = _numbers(body, self._begins + _BEFORE_NUMBER, len(last["number"]))
        self.highest = int(self._numbers[-1])
        if self._numbers[0] < 1 or (np.diff(self._numbers) <= 0).any():
            raise _NotPlain
        self._times = _times(body, begins + _BEFORE_TIME)

    @property
    def has_instant(self) -> bool:
        """Whether some point belongs to a guest point."""
        return self.count > 0 and self._body.find(_INSTANT, self._first, self._stop) >= 0

    def newest(self, now: datetime) -> tuple[PointSummary, ...]:
        """As `candidates`; quick where no point is of the future."""
        if not self.count:
            return ()
        latest = max(self._times)
        if is_future(_time(latest), now):
            return candidates(map(self._summary, range(self.count)), now)
        return (self._summary(self.count - 1 - self._times[::-1].index(latest)),)

    def _summary(self, at: int) -> PointSummary:
        size = int(self._point(at)["size"])
        return PointSummary(point=int(self._numbers[at]), time=_time(self._times[at]), virtual_size=size)

    def _point(self, at: int) -> re.Match[bytes]:
        found = _POINT.match(self._body, int(self._begins[at]), self._stop)
        if found is None:
            raise _NotPlain
        return found


def _time(text: bytes) -> datetime:
    return datetime.fromisoformat(text.decode())


def _numbers(body: bytes, begins: Int64s, most: int) -> tuple[Int64s, Int64s]:
    """The numbers that begin there, of at most so many digits and a comma, and where each ends."""
    if not 0 < most <= _LONGEST_NUMBER:
        raise _NotPlain
    digits = (_cut(body, begins, most + 1) == _COMMA).argmax(axis=1)
    figures = _cut(body, begins + digits - most, most) - _ZERO
    figures[np.arange(most) < most - digits[:, None]] = 0  # what is before a shorter number
    if not digits.all() or (figures > 9).any():
        raise _NotPlain
    return figures @ 10 ** np.arange(most - 1, -1, -1), begins + digits


def _times(body: bytes, begins: Int64s) -> list[bytes]:
    """The times in UTC that begin there, all with six digits after the second, so that they compare as text."""
    found = _cut(body, begins, len(_TIME))
    found[found[:, _SECONDS] == _ZULU, _SECONDS:] = _TIME[_SECONDS:]
    if (found - _TIME > _SPANS).any():
        raise _NotPlain
    texts: list[bytes] = found.view(f"S{len(_TIME)}")[:, 0].tolist()
    return texts


def _cut(body: bytes, begins: Int64s, length: int) -> _Bytes:
    """uint8[begins, length]: the bytes that begin there. Raises IndexError beyond the end."""
    windows: npt.NDArray[np.bytes_] = np.ndarray((len(body) - length + 1,), f"S{length}", body, strides=(1,))
    return windows[begins].view(np.uint8).reshape(-1, length)


def _places(text: _Bytes, byte: int) -> Int64s:
    """Where a rare byte is. Eight bytes at a time, which takes a quarter of the time of np.flatnonzero."""
    is_it = np.zeros(-(-len(text) // 8) * 8, np.bool_)
    np.equal(text, byte, out=is_it[: len(text)])
    lots = is_it.reshape(-1, 8)
    some = np.flatnonzero(lots.view(np.uint64))
    lot, place = np.nonzero(lots[some])
    return some[lot] * 8 + place
