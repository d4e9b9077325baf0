"""A repository: a destination over object storage, deduplicated, compressed and encrypted."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, SnapchainError, Unavailable, WrongPassphrase
from snapchain.host.passphrases import PassphraseSource
from snapchain.model import holds
from snapchain.model.compression import Compression
from snapchain.model.disk_name import check_disk_name
from snapchain.objects.exclusive import create_exclusively
from snapchain.objects.probe import probe, still_conditional
from snapchain.objects.reserve import fill as fill_reserve
from snapchain.objects.store import ObjectStore, check_size
from snapchain.repository import (
    catalogue as catalogues,
    damage,
    index as indexes,
    keys as slots,
    layers,
    listed,
    slot_list,
    sparse,
)
from snapchain.repository.blobs import BlobReader
from snapchain.repository.catalogue import Catalogue, Disk, Hold, Point
from snapchain.repository.crypto import AES, KEY_BYTES, NONE, SUITES, Keyring
from snapchain.repository.envelope import StoredModel, newer, parse as parse_stored
from snapchain.repository.format import (
    MAX_BLOCK_BYTES,
    MAX_PACK_BYTES,
    MIN_BLOCK_BYTES,
    MIN_PACK_BYTES,
    fresh_id,
    layer_name,
)
from snapchain.repository.index import BlobIndex
from snapchain.repository.known import SeenGenerations, Vouched
from snapchain.repository.layers import LayerHeader, PageCache, PageTable, StoredLayer
from snapchain.repository.leases import Lease, Mode
from snapchain.repository.sparse import SparseIndex
from snapchain.repository.unlisted import take_in
from snapchain.repository.vacancy import check_vacant, nothing_here

CONFIG = "config"
_READERS = 8
_AHEAD = 64
_BESIDE_A_BLOCK = 4096
"""Bytes of a pack with one blob that are not the blob, and some more."""
PATIENCE = 600.0
READERS_PATIENCE = 60.0
"""Seconds that a restore waits for a collector: it is wanted more."""
_WITNESS = "witness"
_WITNESS_BODY = b"snapchain creates this object once; a store that lets it be created again ignores conditions\n"
BLOCK_BYTES = 256 * 1024
"""Where blobs are cut, in guest bytes: docs/decisions/0003-block-size.md."""

Passphrase = Callable[[], str | None]
"""Asked only when a passphrase is needed, since asking may run a command."""


def _unheard(_: str) -> None:
    """Nobody listens."""


class Config(StoredModel):
    """The object `config`, JSON in plain text.

    block_size: guest bytes at whose multiples blobs are cut
    pack_size: bytes that a pack has at most; None: the default, and then the field is not written
    """

    format: Literal[1] = 1
    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    created: datetime
    encryption: str
    block_size: int = Field(ge=MIN_BLOCK_BYTES, le=MAX_BLOCK_BYTES)
    conditional_put: bool
    pack_size: int | None = Field(default=None, ge=MIN_PACK_BYTES, le=MAX_PACK_BYTES)


class _SlotGuard:
    """Says which slots were removed, by the newest list of key slots.

    before: what this machine found earlier. A list of one number never changes, so it is not read again for that slot
    newest: number of the newest list; notices: of lists that cannot be read. Both are set when a slot has opened.
    """

    def __init__(self, store: ObjectStore, config: Config, before: Vouched | None) -> None:
        self.newest = 0
        self.notices: list[str] = []
        self._store, self._config, self._before = store, config, before
        self._list: slot_list.SlotList | None = None

    def is_removed(self, _name: str, slot: slots.KeySlot, master: bytes) -> bool:
        """Whether a slot that opens was removed. Raises Unsupported for a list of a newer snapchain."""
        self.newest = slot_list.newest(self._store)
        if not self.newest or self._before == Vouched(slot.salt_hex, self.newest):
            return False
        if self._list is None:
            keys = Keyring(self._config.encryption, self._config.id, master)
            self._list, self.notices = slot_list.read(self._store, keys)
        return self._list.removal(slot.salt_hex) is not None


class Repository:
    """An open repository. Thread-safe for reading.

    memory: how far its disks were seen before (known.py), if known
    slot, key_slot: the name, and the content, of the key slot that opened it
    slot_list: number of the newest list of key slots
    vouched: what that list says of the slot, None where it cannot be read
    config_text: the object `config`, to which key slots are bound
    takes_notes: whether damage that is met, and what was verified, is kept in the store; not in a dry run
    pack_size: bytes that new packs and indexes have at most; None: the default
    compression: of the guest data that this process writes
    """

    def __init__(self, store: ObjectStore, config: Config, keys: Keyring, *, conditional: bool) -> None:
        self.store = store
        self.config = config
        self.keys = keys
        self.conditional = conditional
        self.notices: list[str] = list(store.warnings)
        self.memory: SeenGenerations | None = None
        self.slot: str | None = None
        self.key_slot: slots.KeySlot | None = None
        self.vouched: Vouched | None = None
        self.slot_list = 0
        self.config_text = b""
        self.pack_size = config.pack_size
        self.compression = Compression.DEFAULT
        self.takes_notes = True
        self.blobs = BlobReader(store, keys, self._load_index)
        self._pages = PageCache(self.blobs)

    @classmethod
    def create(
        cls,
        store: ObjectStore,
        *,
        passphrase: Passphrase,
        encryption: str = AES,
        block_size: int = BLOCK_BYTES,
        pack_size: int | None = None,
    ) -> Repository:
        """Make an empty repository.

        Raises Conflict when there is one already, or something else, InvalidInput for bad parameters, Corrupt for a
        repository that has lost its `config`.
        """
        check_pack_size(pack_size, block_size)
        if encryption not in SUITES:
            raise InvalidInput(f"unknown encryption {encryption!r}", hint=f"one of {', '.join(SUITES)}")
        if not MIN_BLOCK_BYTES <= block_size <= MAX_BLOCK_BYTES or block_size & (block_size - 1):
            raise InvalidInput(
                f"a block size of {block_size} bytes",
                hint=f"a power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}",
            )
        taken = Conflict("there is a snapchain repository here already", subject=store.url)
        if store.size(CONFIG) is not None:
            raise taken
        check_vacant(store)
        secret = None if encryption == NONE else passphrase()
        if encryption != NONE and not secret:
            raise InvalidInput(
                "an encrypted repository needs a passphrase",
                hint="set SNAPCHAIN_PASSWORD, --password-file or --password-command, or say --no-encryption",
            )
        found = probe(store)
        config = Config(
            id=fresh_id(),
            created=datetime.now(UTC),
            encryption=encryption,
            block_size=block_size,
            conditional_put=found.conditional_put,
            pack_size=pack_size,
        )
        text = config.model_dump_json(indent=1, exclude_none=True).encode()
        master, slot = Keyring.public_master(config.id), None
        if secret:
            master = secrets.token_bytes(KEY_BYTES)
            slot = slots.put(store, master, secret, text)
        store.put(_WITNESS, _WITNESS_BODY)
        # The configuration comes last: what has none is no repository, and a second `init` may begin anew.
        if not create_exclusively(store, CONFIG, text, conditional=found.conditional_put):
            raise taken
        made = cls(store, config, Keyring(encryption, config.id, master), conditional=found.conditional_put)
        made.notices += found.findings
        made.config_text = text
        if slot is not None:
            made.slot, made.key_slot = slot.name, slot.slot
            made.notices += _list_first_slot(made, slot)
        fill_reserve(store)
        return made

    @classmethod
    def open(
        cls,
        store: ObjectStore,
        *,
        passphrase: Passphrase,
        writing: bool = False,
        known: bool = False,
        judge: Callable[[Config], None] | None = None,
        slot: str | None = None,
        vouched: Vouched | None = None,
    ) -> Repository:
        """Open an existing repository.

        writing: find out (with one request) whether the store still honours create-if-absent.
        known: whether it was seen before, so that the caller can tell whether it has always been without encryption.
        judge: raises for a configuration that the caller does not accept; called before the passphrase is asked for.
        slot: name of the key slot that opened it before; vouched: what was found of it then
        Raises NotFound, InvalidInput (no passphrase), WrongPassphrase (also one that was removed), Corrupt (no longer
        encrypted), Unsupported (a newer format).
        """
        size = store.size(CONFIG)
        if size is None:
            raise nothing_here(store)
        text = store.get(CONFIG, length=check_size(CONFIG, size, subject=CONFIG))
        config = parse_config(text, subject=store.url)
        if judge is not None:
            judge(config)
        master, unlocked = Keyring.public_master(config.id), None
        guard = _SlotGuard(store, config, vouched)
        if config.encryption != NONE:
            unlocked = _unlocked(store, passphrase, text, slot, guard)
            master = unlocked.master
        elif not known and _is_given(passphrase):
            raise Corrupt(
                "a passphrase is given, and the repository says that it is not encrypted: it may have been changed",
                subject=store.url,
                hint="if it was made with --no-encryption, give no passphrase once (SNAPCHAIN_PASSWORD, --password-..)",
            )
        conditional = config.conditional_put
        opened = cls(store, config, Keyring(config.encryption, config.id, master), conditional=conditional)
        opened.config_text = text
        if unlocked is not None:
            opened.slot, opened.key_slot, opened.slot_list = unlocked.name, unlocked.slot, guard.newest
            opened.vouched = None if guard.notices else Vouched(unlocked.slot.salt_hex, guard.newest)
            opened.notices += guard.notices
        if writing and conditional and not still_conditional(store, _WITNESS, _WITNESS_BODY):
            opened.conditional = False
            opened.notices.append(
                f"{store.url} no longer honours create-if-absent: run one writer at a time on this repository"
            )
        return opened

    def lease(
        self,
        mode: Mode,
        work: str,
        *,
        on_wait: Callable[[str], None],
        patience: float | None = None,
        disks: Sequence[str] = (),
        spends: bool = False,
    ) -> Lease:
        """The right to write, or to collect, for the length of a `with` block.

        work: for people, e.g. `ship web1/vda`; patience: seconds to wait for who works alone; on_wait: told of it,
        once; disks: those to which it may publish, none where these may be any; spends: as in Lease
        """
        seconds = PATIENCE if patience is None else patience
        return Lease(
            self.store, self.keys, mode, work=work, patience=seconds, on_wait=on_wait, disks=disks, spends=spends
        )

    @contextmanager
    def reading(
        self, layers: Mapping[str, Collection[str]], work: str, *, on_wait: Callable[[str], None] = _unheard
    ) -> Iterator[None]:
        """For the length of a `with` block no collector takes away what these layers need.

        layers: disk -> layers that are read; work, on_wait: as in `lease`.
        Where nothing can be written, or a collector is at work for long, reading goes on without, and on_wait is told.
        Raises Conflict when some of the layers were merged away and collected before the block began.
        """
        chosen = [layer for some in layers.values() for layer in some]
        lease = Lease(
            self.store, self.keys, Mode.READ, work=work, patience=READERS_PATIENCE, on_wait=on_wait, layers=chosen
        )
        with ExitStack() as stack:
            try:
                stack.enter_context(lease)
            except (Busy, Unavailable) as error:
                on_wait(f"reading without a lease: what a gc takes away meanwhile is missed ({error.message})")
            self.check_there(layers)
            try:
                yield
            except Corrupt:
                self.check_there(layers)
                raise
            finally:
                with suppress(SnapchainError):  # without the permission to write
                    self.record_damage()

    def record_damage(self) -> bool:
        """Store a record of the packs in which damage was met. Returns whether some of them were not recorded yet.

        Costs nothing where no damage was met.
        """
        if not (self.blobs.damaged and self.takes_notes):
            return False
        fresh = self.blobs.damaged - damage.recorded(self.store, self.keys)
        if fresh:
            damage.record(self.store, self.keys, fresh)
        return bool(fresh)

    def check_there(self, layers: Mapping[str, Collection[str]]) -> None:
        """Raises Conflict when some of these layers, by disk, were collected."""
        for disk, some in layers.items():
            current = self.disk(disk).read()
            for layer in set(some) - set(current[0].parents if current else ()):
                if self.store.size(layer_name(layer)) is None:
                    raise Conflict(
                        "layers were merged away and collected before they were read",
                        subject=disk,
                        hint="run it again",
                    )

    def disk(self, name: str) -> Disk:
        """The catalogue of a disk, whether or not it exists yet. Raises InvalidInput for a bad name."""
        check_disk_name(name)
        return Disk(self.store, self.keys, name, conditional=self.conditional, memory=self.memory)

    def hold(
        self, disk: str, point: int, tag: str, *, reason: str = "", on_wait: Callable[[str], None] = _unheard
    ) -> Point:
        """Keep a point whatever the rules of retention say, until it is released; the point as it is now.

        tag: names the hold; one that is there already gets this reason and keeps its date.  on_wait: as in `lease`.
        Raises NotFound for a disk or point that is not there, InvalidInput for a bad tag.
        """
        holds.check_tag(tag)

        def change(catalogue: Catalogue) -> Sequence[Point] | None:
            return holds.held(catalogue.points, point, tag, reason=reason, make=Hold.made(tag, reason), disk=disk)

        return self._change(disk, point, change, f"hold {disk}", on_wait)

    def release(self, disk: str, point: int, tag: str, *, on_wait: Callable[[str], None] = _unheard) -> Point:
        """Take a hold off a point; the point as it is now. Raises NotFound when disk, point or hold is not there."""

        def change(catalogue: Catalogue) -> Sequence[Point]:
            return holds.released(catalogue.points, point, tag, disk=disk)

        return self._change(disk, point, change, f"release {disk}", on_wait)

    def _change(
        self,
        disk: str,
        point: int,
        change: Callable[[Catalogue], Sequence[Point] | None],
        work: str,
        on_wait: Callable[[str], None],
    ) -> Point:
        """Give a disk other points, by its next generation; one of them."""

        def fields(catalogue: Catalogue) -> dict[str, object] | None:
            catalogue.check_not_renamed()
            points = change(catalogue)
            return None if points is None else {"points": tuple(points)}

        with self.lease(Mode.WRITE, work, on_wait=on_wait, disks=[disk], spends=True) as lease:
            catalogue = self.disk(disk).update(fields, time=datetime.now(UTC), check=lease.check)
        return next(each for each in catalogue.points if each.point == point)

    def catalogue(self, name: str) -> Catalogue:
        """The newest catalogue of a disk. Raises NotFound."""
        return self.disk(name).existing()[0]

    def catalogues(self) -> list[Catalogue]:
        """The newest catalogues of all disks, by name, but of those that were renamed to another.

        Raises Corrupt where one that this machine has seen is gone.
        """
        return sorted(self.each_catalogue(), key=lambda each: each.disk)

    def each_catalogue(self) -> Iterator[Catalogue]:
        """As `catalogues`, one after the other in no order: all points of 10,000 disks take gigabytes of memory."""
        for key in self.disk_keys():
            found = self.catalogue_of(key)
            if found is not None and not found.is_gone:
                yield found
        if self.memory is not None:
            self.memory.flush()

    def disk_keys(self) -> list[str]:
        """The folders of all disks, also of those that this machine has seen and the store leaves out of its list."""
        known = () if self.memory is None else self.memory.floors()
        return list(dict.fromkeys([*self.store.list_dirs("disks/"), *known]))

    def catalogue_of(self, key: str) -> Catalogue | None:
        """The newest catalogue in a disk's folder, None when there is none."""
        return catalogues.read_any(self.store, self.keys, key, self.memory)

    def layer(self, layer: str) -> StoredLayer:
        """One layer. Raises Corrupt when it is missing or unsound."""
        return StoredLayer(*layers.read(self.store, self.keys, layer), self._pages)

    def written(self, header: LayerHeader, pages: PageTable) -> StoredLayer:
        """The layer of a record that was just written."""
        return StoredLayer(header, pages, self._pages)

    def chain(self, catalogue: Catalogue, layer: str) -> list[StoredLayer]:
        """The layers that end in `layer`, root first."""
        with self.as_of(catalogue):
            return list(self.layers(catalogue.chain(layer)).values())

    def chain_of(self, catalogue: Catalogue, point: Point) -> list[StoredLayer]:
        """The layers of a point, root first. Raises Corrupt where the point and its layer disagree, and as `chain`."""
        found = self.chain(catalogue, point.layer)
        check_agrees(catalogue.disk, point, found[-1])
        return found

    @contextmanager
    def as_of(self, catalogue: Catalogue) -> Iterator[None]:
        """Reads what a catalogue names without a lease: what misses because there is a newer one is no damage.

        Raises Conflict instead of Corrupt when the disk has another generation by now.
        """
        try:
            yield
        except Corrupt as error:
            current = self.disk(catalogue.disk).read()
            if current is None or current[0].generation == catalogue.generation:
                with suppress(SnapchainError):  # without the permission to write
                    self.record_damage()
                raise
            raise Conflict(
                "the disk was changed, and old data collected, while it was looked at",
                subject=catalogue.disk,
                hint="run it again",
            ) from error

    def layers(self, ids: Iterable[str]) -> dict[str, StoredLayer]:
        """Several layers at once, in the order given. Raises as `layer`."""
        names = list(ids)
        if len(names) < 2:
            return {each: self.layer(each) for each in names}
        with ThreadPoolExecutor(min(len(names), _READERS), "layers") as pool:
            # Some at a time: after the first that is missing nobody waits for all others.
            groups = (names[at : at + _AHEAD] for at in range(0, len(names), _AHEAD))
            return {layer.id: layer for group in groups for layer in pool.map(self.layer, group)}

    def index(self) -> BlobIndex:
        """All blobs of the repository. Packs that are missing or damaged are known as such: see BlobIndex.avoid.

        The packs are listed after the indexes: one of an index that is missing, or has another size, is damaged.
        """
        index = listed.load(self.store, self.keys)
        self._compare(index)
        self.blobs.use(index)
        return index

    def near_index(self) -> SparseIndex:
        """What a shipment needs to know of the blobs. Of a small repository it is all, as of `index`."""
        index = sparse.load(self.store, self.keys)
        if index.is_whole:
            self._compare(index)
        self.blobs.use(index)
        return index

    def _compare(self, index: BlobIndex) -> None:
        bad, index.unlisted = damage.compare(self.store, index.sizes)
        index.avoid |= bad
        self.blobs.damaged |= index.avoid & index.sizes.keys()

    def _load_index(self) -> BlobIndex:
        """For who has met damage, and looks for copies."""
        index = indexes.load(self.store, self.keys)
        there = damage.list_packs(self.store)
        index.unlisted = {pack: info for pack, info in there.items() if pack not in index.sizes}
        take_in(self.store, self.keys, index)
        return index


def check_agrees(disk: str, point: Point, layer: StoredLayer) -> None:
    """Raises Corrupt unless a point and the layer that it names have the same size and content id."""
    if (layer.size, layer.header.content_id) != (point.size, point.content_id):
        raise Corrupt(
            "the point and its layer disagree about the content id",
            subject=f"{disk}@{point.point}",
            hint="snapchain verify shows which points are sound; restore one of those",
        )


def parse_config(text: bytes, *, subject: str) -> Config:
    """The object `config`. Raises Corrupt, or Unsupported for a newer one."""
    found = parse_stored(Config, text, what="the repository", subject=subject)
    if found.encryption not in SUITES:
        raise newer("the repository", subject)
    return found


def check_pack_size(size: int | None, block_size: int = 0) -> None:
    """Raises InvalidInput for a size that no pack can have, or in which no block fits."""
    if size is None:
        return
    if not MIN_PACK_BYTES <= size <= MAX_PACK_BYTES:
        raise InvalidInput(
            f"the pack size is out of range: {size} bytes",
            hint=f"from {MIN_PACK_BYTES >> 10}K to {MAX_PACK_BYTES >> 20}M, such as 1M",
        )
    if size < block_size + _BESIDE_A_BLOCK:
        raise InvalidInput(
            f"a pack of {size} bytes has no room for a block of {block_size}", hint=f"at least {2 * block_size >> 10}K"
        )


def _list_first_slot(made: Repository, slot: slots.NamedSlot) -> list[str]:
    """Store the first list of key slots. Where that fails there is none, as in an older repository: a notice."""
    first = slot_list.ListedSlot.of(slot.name, slot.slot)
    try:
        listed = slot_list.change(
            made.store,
            made.keys,
            lambda _: slot_list.SlotList(slots=(first,)),
            conditional=made.conditional,
        )
    except SnapchainError as error:
        return [f"the key slot could not be listed; `snapchain key list` will not know who made it: {error}"]
    made.slot_list = listed.generation
    made.vouched = Vouched(slot.slot.salt_hex, listed.generation)
    return []


def _is_given(passphrase: Passphrase) -> bool:
    """Whether there is a passphrase that nobody has to be asked for."""
    given = passphrase.given if isinstance(passphrase, PassphraseSource) else passphrase
    try:
        return bool(given())
    except InvalidInput:  # nobody has set one
        return False


def _unlocked(
    store: ObjectStore, passphrase: Passphrase, config: bytes, slot: str | None, guard: _SlotGuard
) -> slots.Unlocked:
    """What the passphrase opens. A person who has mistyped it is asked again. Raises as `Repository.open`."""
    while True:
        secret = _secret(store, passphrase)
        try:
            return slots.unlock(store, secret, config, first=slot, is_removed=guard.is_removed)
        except WrongPassphrase as error:
            if not isinstance(passphrase, PassphraseSource) or not passphrase.may_ask_again(error.message):
                raise


def _secret(store: ObjectStore, passphrase: Passphrase) -> str:
    secret = passphrase()
    if not secret:
        raise InvalidInput(
            "the repository is encrypted and no passphrase was given",
            subject=store.url,
            hint="set SNAPCHAIN_PASSWORD, --password-file or --password-command",
        )
    return secret
