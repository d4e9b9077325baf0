"""Opening and making repositories: which store an address means, and whether this machine knows what is there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from snapchain.destination.address import located
from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError
from snapchain.host import replica_layout
from snapchain.model.compression import Compression
from snapchain.objects import open_store
from snapchain.objects.cache import CachedStore
from snapchain.objects.store import ObjectStore, Placed, innermost
from snapchain.objects.throttle import ThrottledStore
from snapchain.repository import known
from snapchain.repository.crypto import AES
from snapchain.repository.known import Recalled
from snapchain.repository.repository import BLOCK_BYTES, CONFIG, Config, Passphrase, Repository, check_pack_size
from snapchain.repository.vacancy import check_vacant


def open_repository(
    url: str,
    *,
    passphrase: Passphrase,
    writing: bool = False,
    limit_rate: int | None = None,
    pack_size: int | None = None,
    compression: Compression | None = None,
    accept: str | None = None,
    endpoint: str | None = None,
    profile: str | None = None,
) -> Repository:
    """The repository at `url`: a path, file:///path, or s3://bucket/prefix.

    passphrase: asked when the repository is encrypted; writing: whether points will be published or layers merged;
    limit_rate: bytes per second to and from the store; pack_size: bytes that new objects have at most, instead of what
    the repository was made with; compression: of guest data that are written
    accept: id of a repository that is taken whatever this machine knew of the address (repository/known.py)
    endpoint, profile: of S3, as `open_store`
    Raises NotFound when there is none, Corrupt when it is another one or an older one than this machine knows, and what
    its store raises.
    """
    check_pack_size(pack_size)
    store = _store(url, limit_rate=limit_rate, endpoint=endpoint, profile=profile)
    recalled = Recalled(_places(store), store.url)

    def judge(config: Config) -> None:
        if accept is None:
            recalled.judge(config.id, config.encryption)
        elif accept != config.id:
            raise InvalidInput(f"the id of the repository here is {config.id}, not {accept}", subject=store.url)

    try:
        opened = Repository.open(
            store,
            passphrase=passphrase,
            writing=writing,
            known=recalled.is_known,
            judge=judge,
            slot=recalled.slot,
            vouched=recalled.vouched,
        )
    except NotFound:
        _check_no_replica(store, NotFound)
        raise
    if accept is not None:
        _remember(opened)
    else:
        recalled.judge_slots(opened.config.id, opened.slot_list)
        opened.memory = recalled.begin(opened.config.id, opened.config.encryption, opened.slot, opened.vouched)
        opened.notices += recalled.notices
    check_pack_size(pack_size, opened.config.block_size)
    opened.pack_size = pack_size or opened.pack_size
    opened.compression = compression or Compression.DEFAULT
    return opened


def create_repository(
    url: str,
    *,
    passphrase: Passphrase,
    encryption: str = AES,
    block_size: int = BLOCK_BYTES,
    pack_size: int | None = None,
) -> Repository:
    """A new, empty repository at `url`. Raises Conflict when there is one, or something else."""
    store = _store(url, make=True)
    _check_no_replica(store, Conflict)
    made = Repository.create(
        store, passphrase=passphrase, encryption=encryption, block_size=block_size, pack_size=pack_size
    )
    _remember(made)
    return made


def check_can_be_made(url: str) -> None:
    """Raises what `create_repository` would find in the way at `url`; makes nothing."""
    try:
        store = _store(url)
    except NotFound:  # a directory that would be made
        return
    _check_no_replica(store, Conflict)
    if store.size(CONFIG) is not None:
        raise Conflict("there is a snapchain repository here already", subject=store.url)
    check_vacant(store)


def _check_no_replica(store: ObjectStore, error: type[SnapchainError]) -> None:
    root = Path(store.url)
    if not root.is_absolute():
        return
    place = next((path for path in (root, root.parent) if (path / replica_layout.MARKER).is_file()), None)
    if place is not None and (place == root or (root / replica_layout.CATALOGUE).is_file()):
        raise error(
            "this is a replica, not a repository" if place == root else "this is a disk of a replica, not a repository",
            subject=root,
            hint=f"use dir:{place} for the replica, or ssh://HOST{place} from another host",
        )


def _remember(repository: Repository) -> None:
    """Know this repository, and no other one, at its address."""
    repository.memory, notices = known.remember(
        _places(repository.store),
        repository.store.url,
        id=repository.config.id,
        encryption=repository.config.encryption,
        slot=repository.slot,
        vouched=repository.vouched,
    )
    repository.notices += notices


def note_slot(repository: Repository) -> None:
    """Remember the key slot of an open repository after its slots were changed. A failure is a notice."""
    if repository.vouched is None:
        return
    config = repository.config
    try:
        known.note_slot(
            _places(repository.store),
            id=config.id,
            encryption=config.encryption,
            slot=repository.slot,
            vouched=repository.vouched,
        )
    except (SnapchainError, OSError, RuntimeError) as error:
        repository.notices.append(f"this machine cannot remember the change of the key slots: {error}")


def _places(store: ObjectStore) -> list[str]:
    """The address of a store in all the ways in which it is remembered: without links or spellings, and as it is given.

    With the endpoint that it was found at: one bucket name may be several buckets.
    """
    bottom = innermost(store)
    as_given = _place(store)
    if isinstance(bottom, Placed):
        return [f"{store.url} ({bottom.place})", as_given]
    if store.url.startswith("/"):
        real = os.path.realpath(store.url)
        return [f"{real} (directory {real})", as_given]
    return [as_given]


def _place(store: ObjectStore) -> str:
    return f"{store.url} ({store.properties.description})"


def _store(
    url: str,
    *,
    limit_rate: int | None = None,
    make: bool = False,
    endpoint: str | None = None,
    profile: str | None = None,
) -> ObjectStore:
    url = located(url)
    store = open_store(url, make=make, endpoint=endpoint, profile=profile)
    if store.properties.is_remote:
        kept = hashlib.sha256(_place(store).encode()).hexdigest()[:32]
        store = CachedStore(store, known.cache_dir() / kept / "index", prefix="index/")
    return store if limit_rate is None else ThrottledStore(store, upload=limit_rate, download=limit_rate)
