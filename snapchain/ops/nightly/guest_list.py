"""The guests of this run, their names at the destinations, and the guests of earlier runs that are gone.

libvirt is asked for all domains, running and defined ones; monitors are found by their sockets.  A guest that was
shipped once and is not defined any more is a fault, unless `retired` names it: a mistyped pattern would go unnoticed.
What cannot be decided stays in the list with its fault, so no other guest suffers.
"""

from __future__ import annotations

import glob
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path

from snapchain.errors import InvalidInput, NotFound, SnapchainError
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.host.virsh import Virsh
from snapchain.ops.nightly.config import Guests, Nightly
from snapchain.ops.nightly.plan import order
from snapchain.ops.nightly.state import State
from snapchain.ops.nightly.values import guest_name


@dataclass(frozen=True, slots=True)
class SelectedGuest:
    """A guest to work on.

    name: at the destinations; guest: what it is called here; address: None for one that could not be named
    settings: what the configuration says of it; is_new: no earlier run has known it; fault: why it cannot be worked on
    """

    name: str
    guest: str
    address: GuestAddress | None
    settings: Guests
    is_new: bool = False
    fault: SnapchainError | None = None

    @property
    def option(self) -> str:
        """As it would be typed."""
        return self.guest if self.address is None else self.address.option


@dataclass(frozen=True, slots=True)
class GuestList:
    """guests: in the order of work; gone: names that should be there, former: names that nobody expects any more

    faults: of patterns, of libvirt, and of those that are gone
    """

    guests: tuple[SelectedGuest, ...] = ()
    gone: tuple[str, ...] = ()
    former: frozenset[str] = frozenset()
    faults: tuple[SnapchainError, ...] = ()


def guest_list(config: Nightly, state: State, *, now: datetime | None = None) -> GuestList:
    """Look which guests there are. now: by the clock of this run."""
    faults: list[SnapchainError] = []
    found: list[SelectedGuest] = []
    taken: set[tuple[str | None, str]] = set()
    domains = _Domains()
    for settings in config.guests:
        try:
            mine = list(_of(settings, state, domains, named=_named(config)))
        except SnapchainError as error:
            faults.append(error)
            continue
        if not mine and settings.domain is None:
            pattern = settings.pattern or settings.qmp
            faults.append(NotFound("the pattern finds no guest", subject=pattern, hint="`snapchain guests` lists them"))
        for guest in mine:
            key = (settings.connect if settings.qmp is None else "qmp", guest.option)
            if key not in taken:
                taken.add(key)
                found.append(guest)
    counts = Counter(guest.name for guest in found)
    guests = [_ambiguous(guest) if counts[guest.name] > 1 else guest for guest in found]
    missed = {name for name in state.guests if name not in {guest.name for guest in guests}}
    former = {name for name in missed if any(fnmatchcase(name, pattern) for pattern in config.retired)}
    gone = tuple(name for name in sorted(missed - former) if state.guests[name].destinations)
    turns = {name: turn for name, guest in state.guests.items() if (turn := guest.turn)}
    return GuestList(
        guests=tuple(order(guests, lambda guest: guest.name, turns, now=now)),
        gone=gone,
        former=frozenset(former),
        faults=(*faults, *([_gone(gone)] if gone else [])),
    )


class _Domains:
    """The names of all domains of each libvirt, asked once."""

    def __init__(self) -> None:
        self._known: dict[str | None, list[str] | SnapchainError] = {}

    def of(self, connect: str | None) -> list[str]:
        """Raises what asking raises, each time."""
        if connect not in self._known:
            try:
                self._known[connect] = Virsh(connect, read_only=True).names("list", "--all", "--name")
            except SnapchainError as error:
                self._known[connect] = error
        found = self._known[connect]
        if isinstance(found, SnapchainError):
            raise found
        return found


def _named(config: Nightly) -> set[tuple[str | None, str]]:
    """Domains that have a table of their own: a pattern leaves them to it."""
    return {(each.connect, each.domain) for each in config.guests if each.domain is not None}


def _of(
    settings: Guests, state: State, domains: _Domains, *, named: set[tuple[str | None, str]]
) -> Iterator[SelectedGuest]:
    if settings.qmp is not None:
        yield from _by_socket(settings, state)
        return
    if settings.domain is not None:
        if settings.domain in domains.of(settings.connect):
            yield _selected(settings, settings.domain, _domain(settings, settings.domain), state)
        elif guest_name(settings.name, settings.domain) not in state.guests:  # else it is one that is gone
            raise NotFound("libvirt has no such domain", subject=settings.domain, hint="`snapchain guests` lists them")
        return
    for domain in sorted(domains.of(settings.connect)):
        excluded = any(fnmatchcase(domain, pattern) for pattern in settings.exclude)
        if fnmatchcase(domain, settings.pattern or "") and not excluded and (settings.connect, domain) not in named:
            yield _selected(settings, domain, _domain(settings, domain), state)


def _domain(settings: Guests, domain: str) -> GuestAddress:
    return GuestAddress(domain=domain, connect=settings.connect)


def _by_socket(settings: Guests, state: State) -> Iterator[SelectedGuest]:
    assert settings.qmp is not None
    known = {each.option: each.guest for each in state.guests.values()}
    for match in sorted(glob.glob(settings.qmp)):  # noqa: PTH207 -- the pattern is absolute
        path = Path(match)
        if any(fnmatch(match, pattern) for pattern in settings.exclude) or not _is_socket(path):
            continue
        address = GuestAddress(qmp=path, agent=settings.agent)
        try:
            with open_guest(address) as guest:
                name = guest.name
        except SnapchainError as error:
            # A socket stays when its QEMU is gone. Its name is known from an earlier night.
            name = known.get(address.option, path.stem)
            yield _selected(settings, name, address, state, fault=error)
        else:
            yield _selected(settings, name or path.stem, replace(address, name=name or path.stem), state)


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def _selected(
    settings: Guests, guest: str, address: GuestAddress, state: State, *, fault: SnapchainError | None = None
) -> SelectedGuest:
    try:
        name = guest_name(settings.name, guest)
    except InvalidInput as error:
        return SelectedGuest(guest, guest, address, settings, fault=error)
    return SelectedGuest(name, guest, address, settings, is_new=name not in state.guests, fault=fault)


def _ambiguous(guest: SelectedGuest) -> SelectedGuest:
    message = f"more than one guest is called {guest.name}"
    hint = 'tell them apart by their names: name = "{host}/{guest}"'
    return replace(guest, name=guest.option, fault=InvalidInput(message, subject=guest.option, hint=hint))


def _gone(names: tuple[str, ...]) -> NotFound:
    return NotFound(
        "earlier runs shipped this guest, and it is not defined any more",
        subject=", ".join(names),
        hint='is libvirt another one? Guests that may be gone are named in the configuration: retired = ["..."]',
    )
