"""The repositories that this machine has used: the id at each address, and the newest generation of each disk.

A store in hostile hands could put another repository at a known address: an older one of the same passphrase, or one
without encryption, which would be sent the next point in plain text.  Or it could take the newest generations of a disk
away: the older ones are valid, and only a machine that has seen a newer one can tell.  So are the lists of key slots,
of which an older one lets removed slots count again.  A machine that has seen more refuses all of these, until its user
accepts by id what is there now (`snapchain log DEST --accept-repository ID`).

One address may be written in several ways, so it is remembered under several: as it was given, and without links.
A notice reports where no state exists or can be written: then these attacks would go undetected.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.errors import Corrupt, NotFound, SnapchainError
from snapchain.host.private import PrivateDirectory
from snapchain.host.records import cache_dir, state_dir
from snapchain.repository.crypto import NONE

_LARGEST = 64 * 1024 * 1024
_LARGEST_KNOWN = 64 * 1024
_UNSEEN = "another repository put in its place, or an older state of it, is not noticed"
Result = TypeVar("Result")


class Vouched(NamedTuple):
    """A key slot that was found in use. salt: of it, in hex; generation: of the list of key slots (slot_list.py)"""

    salt: str
    generation: int


class Known(BaseModel):
    """One remembered repository.

    place: its address and endpoint; slot: name of the key slot that opened it; slot_salt: of that slot, in hex,
    which is in use by the list of key slots with the number slot_list
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    place: str
    id: str
    encryption: str
    slot: str | None = None
    slot_salt: str | None = None
    slot_list: int = 0

    def found(self, vouched: Vouched | None) -> Known:
        """With what was found of its slot."""
        if vouched is None:
            return self
        return self.model_copy(update={"slot_salt": vouched.salt, "slot_list": vouched.generation})


class _Generations(BaseModel):
    """The newest generation seen of each disk. id: of the repository; disks: generation by key of the disk."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    disks: dict[str, int]


class Recalled:
    """The state remembered for one address, before the repository there is opened.

    places: the ways in which its address is written, the one that counts first; url: for hints
    """

    def __init__(self, places: Sequence[str], url: str) -> None:
        self.places = tuple(dict.fromkeys(places))
        self.notices: list[str] = []
        self._url = url
        self._known: list[Known] = []
        self._damaged: Path | None = None
        self._is_readable = True
        for place in self.places:
            name = _file_of(place)
            try:
                text = _in_state(partial(_read_known, name))
                self._known.append(Known.model_validate_json(text))
            except NotFound:
                pass
            except ValidationError:
                self._damaged = _directory() / name
            except (SnapchainError, OSError, RuntimeError) as error:
                if not self._is_readable:
                    continue
                self._is_readable = False
                self.notices.append(f"what this machine knows of the repository cannot be read ({error}): {_UNSEEN}")

    @property
    def is_known(self) -> bool:
        """Whether the address was used before."""
        return bool(self._known)

    @property
    def slot(self) -> str | None:
        """The key slot that opened the repository last."""
        return self._known[0].slot if self._known else None

    @property
    def vouched(self) -> Vouched | None:
        """What was found of that slot."""
        before = self._known[0] if self._known else None
        return Vouched(before.slot_salt, before.slot_list) if before and before.slot_salt else None

    def judge(self, repository: str, encryption: str) -> None:
        """Raises Corrupt when another repository was here, when it was encrypted and is no longer, or cannot be told.

        repository: the id of the one that is here now
        """
        if self._damaged is not None:
            raise Corrupt(
                "this file is damaged, by which this machine would know the repository again",
                subject=self._damaged,
                hint=self.remedy(repository),
            )
        for before in self._known:
            if before.id != repository:
                raise Corrupt(
                    "another repository is here than this machine last used: "
                    f"its id is {repository}, and was {before.id}",
                    subject=self._url,
                    hint=self.remedy(repository),
                )
            if before.encryption != NONE and encryption == NONE:
                raise Corrupt(
                    "this repository was encrypted when this machine last used it, and now says that it is not",
                    subject=self._url,
                    hint=self.remedy(repository),
                )

    def judge_slots(self, repository: str, slot_list: int) -> None:
        """Raises Corrupt when the newest list of key slots is an older one than this machine has seen."""
        before = max((each.slot_list for each in self._known), default=0)
        if slot_list < before:
            raise Corrupt(
                f"the list of key slots has the number {slot_list}, and had {before} when this machine last saw it: "
                "key slots that were removed would count again",
                subject=self._url,
                hint=self.remedy(repository),
            )

    def begin(
        self, repository: str, encryption: str, slot: str | None, vouched: Vouched | None = None
    ) -> SeenGenerations:
        """Remember the repository that was opened; how far its disks were seen. Raises Corrupt for damaged state.

        vouched: what was found of the slot; None: nothing, and what was found before stays
        """
        fresh = not self._known
        seen = Known(place=self.places[0], id=repository, encryption=encryption, slot=slot).found(
            vouched or self.vouched
        )
        memory = SeenGenerations(seen, self.remedy(repository))
        try:
            for place in self.places:
                if (there := seen.model_copy(update={"place": place})) not in self._known:
                    _write_known(there)
            is_new = memory.begin()
        except Corrupt:
            raise
        except (SnapchainError, OSError, RuntimeError) as error:
            if self._is_readable:
                self.notices.append(f"this machine cannot remember the repository ({error}): {_UNSEEN}")
            return memory
        if fresh and self._is_readable:
            self.notices.append(
                f"this machine does not know the repository at {self._url} yet (id {repository}): from now on it "
                "notices when another one, or an older state, is put there"
            )
        elif is_new and self._is_readable:
            self.notices.append(
                f"this machine no longer knows how far the disks at {self._url} had come: an older state is not "
                "noticed this time"
            )
        return memory

    def forget(self) -> None:
        """Forget the address. Raises as the state directory."""

        def remove(state: PrivateDirectory) -> None:
            for place in self.places:
                state.remove(_generations_of(place))
                state.remove(_file_of(place))

        _in_state(remove)
        self._known, self._damaged = [], None

    def remedy(self, repository: str) -> str:
        """What to do about another repository, or an older state."""
        return (
            "if nobody has put it there on purpose, the store is not to be trusted. If you know why, accept it: "
            f"snapchain log {shlex.quote(self._url)} --accept-repository {repository}"
        )


class SeenGenerations:
    """How far the disks of one repository had come when this machine last saw them. Thread-safe.

    Kept in a file beside the Known of the place, which several processes may extend at once.
    """

    def __init__(self, seen: Known, remedy: str | None = None) -> None:
        self._name = _generations_of(seen.place)
        self._seen = seen
        self._remedy = remedy
        self._lock = threading.Lock()
        self._generations: dict[str, int] | None = None
        self._written: dict[str, int] = {}

    def begin(self) -> bool:
        """Read the remembered generations, and write them again. Returns whether there were none.

        Raises Corrupt for a damaged file, and as the state directory.
        """
        with self._lock:

            def make(state: PrivateDirectory) -> bool:
                with state.locked():
                    there = self._read(state)
                    self._write(state, there or {})  # always: a state that cannot be written is reported at once
                    self._generations = {} if there is None else there
                    self._written = dict(self._generations)
                    return there is None

            return _in_state(make)

    def floor(self, disk: str) -> int:
        """The highest generation known of a disk (its key); ask before looking at the store. 0: none."""
        with self._lock:
            return self._loaded().get(disk, 0)

    def floors(self) -> dict[str, int]:
        """The same of every disk that is known."""
        with self._lock:
            return dict(self._loaded())

    def note(self, disk: str, generation: int, floor: int) -> None:
        """A disk was seen at a generation, 0 if there is none, after `floor` was asked for.

        Raises Corrupt when it has been further.
        """
        if generation < floor:
            raise Corrupt(
                f"a disk is at generation {generation}, and was at {floor} when this machine last saw it: "
                "its newest points were taken away",
                subject=self._seen.place,
                hint=self._remedy,
            )
        with self._lock:
            known = self._loaded()
            known[disk] = max(generation, known.get(disk, 0))

    def flush(self) -> None:
        """Write new generations. A state that cannot be written was reported when the repository was opened."""
        with self._lock:
            known = self._loaded()
            if known == self._written:
                return

            def write(state: PrivateDirectory) -> None:
                with state.locked():
                    for disk, generation in (self._read(state) or {}).items():
                        known[disk] = max(generation, known.get(disk, 0))
                    self._write(state, known)

            try:
                _in_state(write)
            except (SnapchainError, OSError, RuntimeError):
                return
            self._written = dict(known)

    def _loaded(self) -> dict[str, int]:
        if self._generations is None:
            try:
                self._generations = _in_state(self._read) or {}
            except Corrupt:
                raise
            except (SnapchainError, OSError, RuntimeError):
                self._generations = {}
            self._written = dict(self._generations)
        return self._generations

    def _read(self, state: PrivateDirectory) -> dict[str, int] | None:
        """None: nothing is remembered of this repository."""
        try:
            text = state.read(self._name, cap=_LARGEST)
        except NotFound:
            return None
        try:
            found = _Generations.model_validate_json(text)
        except ValidationError as error:
            raise Corrupt(
                "this file is damaged, by which this machine would know an older state of the repository",
                subject=state.path / self._name,
                hint=self._remedy or "remove it",
            ) from error
        return dict(found.disks) if found.id == self._seen.id else None

    def _write(self, state: PrivateDirectory, disks: dict[str, int]) -> None:
        state.write(self._name, _Generations(id=self._seen.id, disks=disks).model_dump_json().encode())


def remember(
    places: Sequence[str], url: str, *, id: str, encryption: str, slot: str | None, vouched: Vouched | None = None
) -> tuple[SeenGenerations, list[str]]:
    """Note a repository that was just made here, whatever was known of its address; notices where that fails."""
    recalled = Recalled(places, url)
    notices = [notice for notice in recalled.notices if not recalled.is_known]
    seen = Known(place=recalled.places[0], id=id, encryption=encryption, slot=slot).found(vouched)
    memory = SeenGenerations(seen, recalled.remedy(id))
    try:
        recalled.forget()
        for place in recalled.places:
            _write_known(seen.model_copy(update={"place": place}))
        memory.begin()
    except (SnapchainError, OSError, RuntimeError) as error:
        notices = [f"this machine cannot remember the repository ({error}): {_UNSEEN}"]
    return memory, notices


def note_slot(places: Sequence[str], *, id: str, encryption: str, slot: str | None, vouched: Vouched) -> None:
    """Note a key slot of a repository that is known here: others were removed. Raises as the state directory."""
    for place in dict.fromkeys(places):
        _write_known(Known(place=place, id=id, encryption=encryption, slot=slot).found(vouched))


def _write_known(seen: Known) -> None:
    """Write what is known of a place, unless another process has seen a newer list of key slots there."""

    def write(state: PrivateDirectory) -> None:
        with state.locked():
            try:
                before = Known.model_validate_json(_read_known(_file_of(seen.place), state))
            except (NotFound, ValidationError):
                before = seen
            if before.id != seen.id or before.slot_list <= seen.slot_list:
                state.write(_file_of(seen.place), seen.model_dump_json().encode())

    _in_state(write)


def _read_known(name: str, state: PrivateDirectory) -> bytes:
    return state.read(name, cap=_LARGEST_KNOWN)


def _in_state(act: Callable[[PrivateDirectory], Result]) -> Result:
    with PrivateDirectory(state_dir(), make=True), PrivateDirectory(_directory(), make=True) as state:
        return act(state)


def _directory() -> Path:
    return state_dir() / "repositories"


def _file_of(place: str) -> str:
    return f"{blake3.blake3(place.encode()).hexdigest(length=16)}.json"


def _generations_of(place: str) -> str:
    return _file_of(place).replace(".json", ".generations")


__all__ = ["Known", "Recalled", "SeenGenerations", "cache_dir", "remember", "state_dir"]
