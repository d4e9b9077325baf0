"""Opening a repository: passphrases, key slots, and stores that alter them."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported, WrongPassphrase
from snapchain.model.disk_name import check_disk_name
from snapchain.objects.memory import MemoryStore
from snapchain.repository import keys as slots
from snapchain.repository.crypto import NONE
from snapchain.repository.repository import Repository, parse_config


def secret() -> str:
    return "correct horse"


def slot_of(store: MemoryStore) -> str:
    (info,) = store.list("keys/")
    return info.name


def test_what_was_made_opens_with_the_passphrase_and_nothing_else() -> None:
    store = MemoryStore()
    made = Repository.create(store, passphrase=secret)
    opened = Repository.open(store, passphrase=secret)
    assert opened.keys.disk_key("a") == made.keys.disk_key("a")
    for wrong in ("", None, "Correct horse", "correct horse ", "correct horse\n"):
        with pytest.raises(InvalidInput, match="passphrase"):
            Repository.open(store, passphrase=lambda wrong=wrong: wrong)  # type: ignore[misc]


def test_passphrases_of_any_letters() -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=lambda: "pässwörd \N{SNOWMAN} \0")
    Repository.open(store, passphrase=lambda: "pässwörd \N{SNOWMAN} \0")


@pytest.mark.costly_slots
def test_many_threads_open_repositories_at_once() -> None:
    """Two derivations that overlap in OpenSSL never end."""
    store = MemoryStore()
    Repository.create(store, passphrase=secret)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: Repository.open(store, passphrase=secret).keys.disk_key("a"), range(4)))
    assert len(set(opened)) == 1


@pytest.mark.costly_slots
def test_the_slot_costs_what_it_should() -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=secret)
    slot = json.loads(store.get(slot_of(store)))
    assert (slot["kdf"], slot["memory_kib"], slot["iterations"], slot["lanes"]) == ("argon2id", 65536, 3, 4)
    assert len(base64.b64decode(slot["salt"])) == 32
    assert len(base64.b64decode(slot["wrapped"])) == 48


def test_every_altered_byte_of_config_and_slot_is_noticed() -> None:
    """Or changes nothing: the last letter of a base64 text has bits that nobody reads."""
    store = MemoryStore()
    made = Repository.create(store, passphrase=secret)
    for name in ("config", slot_of(store)):
        text = store.get(name)
        for at in range(len(text)):
            for flip in (0x01, 0x20, 0x80):
                store.put(name, text[:at] + bytes([text[at] ^ flip]) + text[at + 1 :])
                try:
                    opened = Repository.open(store, passphrase=secret)
                except SnapchainError as error:
                    assert isinstance(error, InvalidInput | Corrupt | Unsupported)  # noqa: PT017
                else:
                    assert name != "config"
                    assert opened.keys.disk_key("x") == made.keys.disk_key("x")
        store.put(name, text)
    Repository.open(store, passphrase=secret)


def test_turning_encryption_off_in_the_config_gives_no_key_that_opens_anything() -> None:
    store = MemoryStore()
    made = Repository.create(store, passphrase=secret)
    made.disk("a").advance(None, time=made.config.created)
    config = json.loads(store.get("config")) | {"encryption": NONE}
    store.put("config", json.dumps(config).encode())
    with pytest.raises(Corrupt, match="says that it is not encrypted"):
        Repository.open(store, passphrase=secret)
    opened = Repository.open(store, passphrase=lambda: None)
    with pytest.raises(Corrupt, match="altered or belong elsewhere"):
        opened.catalogues()


@pytest.mark.parametrize("name", ["config", "slot"])
def test_what_is_implausibly_large_is_not_even_read(name: str) -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=secret)
    where = "config" if name == "config" else slot_of(store)
    store.put(where, store.get(where) + b" " * 70_000)
    with pytest.raises((Corrupt, InvalidInput), match=r"at most 65536 are plausible|wrong passphrase"):
        Repository.open(store, passphrase=secret)


@pytest.mark.parametrize(
    "costs",
    [
        {"memory_kib": 4 * 65536 + 1},
        {"memory_kib": 2**40},
        {"memory_kib": 0},
        {"iterations": 13},
        {"iterations": 0},
        {"lanes": 17},
        {"lanes": 0},
        {"memory_kib": 8, "lanes": 16},
        {"kdf": "md5"},
        {"format": 2},
        {"salt": ""},
        {"salt": "AAAA"},
        {"salt": "not base64!"},
        {"wrapped": "not base64!"},
        {"wrapped": ""},
        {"wrapped": base64.b64encode(bytes(49)).decode()},
        {"wrapped": base64.b64encode(bytes(4096)).decode()},
        {"salt": base64.b64encode(bytes(31)).decode()},
        {"more": 1},
    ],
)
def test_hostile_slots_are_refused_at_once(costs: dict[str, object]) -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=secret)
    name = slot_of(store)
    store.put(name, json.dumps(json.loads(store.get(name)) | costs).encode())
    with pytest.raises((Corrupt, InvalidInput, Unsupported), match=r"^keys/.*: the key slot|wrong passphrase"):
        Repository.open(store, passphrase=secret)


def test_a_damaged_slot_does_not_shut_out_the_others() -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=secret)
    good = slot_of(store)
    for name, body in [("keys/0", b"damaged"), ("keys/zz", b"{}"), ("keys/00", store.get(good)[:-20])]:
        store.put(name, body)
    Repository.open(store, passphrase=secret)
    store.delete(good)
    with pytest.raises(Corrupt, match="damaged"):
        Repository.open(store, passphrase=secret)


def test_a_slot_of_another_repository_does_not_open_this_one() -> None:
    mine, other = MemoryStore(), MemoryStore()
    Repository.create(mine, passphrase=secret)
    Repository.create(other, passphrase=secret)
    mine.put(slot_of(mine), other.get(slot_of(other)))
    with pytest.raises(WrongPassphrase, match="wrong passphrase"):
        Repository.open(mine, passphrase=secret)


def test_thousands_of_slots_do_not_keep_us_busy() -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=secret)
    slot = store.get(slot_of(store))
    asked: list[str] = []

    class Asked(MemoryStore):
        def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
            asked.append(name)
            return super().get(name, offset=offset, length=length)

    many = Asked()
    many.put("config", store.get("config"))
    for number in range(1000):
        many.put(f"keys/{number:04}", slot)
    with pytest.raises(WrongPassphrase, match="wrong passphrase"):
        Repository.open(many, passphrase=lambda: "wrong")
    assert len(asked) < 100


PLANTED = {
    "format": 1,
    "kdf": "argon2id",
    "memory_kib": 65536,
    "iterations": 3,
    "lanes": 4,
    "salt": base64.b64encode(bytes(32)).decode(),
    "wrapped": base64.b64encode(bytes(48)).decode(),
}


@pytest.mark.costly_slots
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory_kib": 65535}, "memory_kib"),
        ({"memory_kib": 8}, "memory_kib"),
        ({"memory_kib": 262145}, "memory_kib"),
        ({"memory_kib": 1048576, "iterations": 16, "lanes": 1}, "memory_kib"),
        ({"iterations": 2}, "iterations"),
        ({"iterations": 13}, "iterations"),
        ({"lanes": 0}, "lanes"),
        ({"lanes": 17}, "lanes"),
    ],
)
def test_no_slot_is_cheaper_or_much_dearer_than_those_that_are_written(change: dict[str, int], words: str) -> None:
    with pytest.raises(Corrupt, match=rf"^keys/0: the key slot is damaged: {words}"):
        slots.parse(json.dumps(PLANTED | change).encode(), subject="keys/0")
    slots.parse(json.dumps(PLANTED).encode(), subject="keys/0")


def test_a_slot_that_opens_and_holds_a_key_of_another_length_is_damaged() -> None:
    """A longer text can be made to open with more keys than one."""
    for master in (bytes(31), bytes(33), bytes(48)):
        slot = slots.wrap(master, "secret", b"config")
        with pytest.raises(Corrupt, match=r"^keys/0: the key slot is damaged: .* another length"):
            slots.unwrap(slot, "secret", b"config", subject="keys/0")


class Derived:
    """Counts what would be derived, and derives nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work = 0.0
        self.slots: list[str] = []

        def unwrap(slot: slots.KeySlot, _passphrase: str, _config: bytes, *, subject: str) -> bytes | None:
            self.work += slot.cost
            self.slots.append(subject)
            return None

        monkeypatch.setattr(slots, "unwrap", unwrap)


@pytest.mark.costly_slots
@pytest.mark.parametrize("change", [{}, {"memory_kib": 262144}, {"memory_kib": 262144, "iterations": 12}])
def test_all_planted_slots_together_have_a_budget(change: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    for number in range(200):
        store.put(f"keys/{number:032x}", json.dumps(PLANTED | change).encode())
    derived = Derived(monkeypatch)
    with pytest.raises(InvalidInput, match="were not tried") as caught:
        slots.unlock(store, "secret", b"config")
    assert caught.value.hint is not None
    assert "planted" in caught.value.hint
    assert 0 < derived.work <= 16, "times the work of a true slot"


def test_the_slot_that_opened_before_comes_first_and_then_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100, 0, -1))
    store = MemoryStore(clock=lambda: next(times))
    names = [f"keys/{number:032x}" for number in range(5)]  # the last one is the oldest
    for name in names:
        store.put(name, json.dumps(PLANTED).encode())
    derived = Derived(monkeypatch)
    with pytest.raises(WrongPassphrase, match="wrong passphrase"):
        slots.unlock(store, "secret", b"config", first=names[2])
    assert derived.slots == [names[2], names[4], names[3], names[1], names[0]]


def test_opening_says_which_slot_it_was() -> None:
    store = MemoryStore()
    made = Repository.create(store, passphrase=secret)
    assert made.slot == slot_of(store) == Repository.open(store, passphrase=secret, slot="keys/gone").slot


def test_a_repository_without_a_slot_says_that_its_key_is_lost() -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=secret)
    store.delete(slot_of(store))
    with pytest.raises(Corrupt, match="no key slot"):
        Repository.open(store, passphrase=secret)


def test_no_passphrase_no_encrypted_repository() -> None:
    store = MemoryStore()
    for nothing in ("", None):
        with pytest.raises(InvalidInput, match="needs a passphrase"):
            Repository.create(store, passphrase=lambda nothing=nothing: nothing)  # type: ignore[misc]
    assert list(store.list("")) == []


def test_one_place_holds_one_repository() -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=secret)
    with pytest.raises(Conflict, match="already"):
        Repository.create(store, passphrase=secret)
    Repository.open(store, passphrase=secret)


def test_nothing_there() -> None:
    with pytest.raises(NotFound, match="no snapchain repository"):
        Repository.open(MemoryStore(), passphrase=secret)


@pytest.mark.parametrize("size", [0, 1, 65535, 65536 * 3, 2 * 1024 * 1024, -65536])
def test_block_sizes_are_powers_of_two_within_bounds(size: int) -> None:
    with pytest.raises(InvalidInput, match="block size"):
        Repository.create(MemoryStore(), passphrase=secret, block_size=size)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": "1"},
        {"id": "x" * 32},
        {"id": "0" * 31},
        {"id": "zz" + "0" * 32},
        {"id": "0" * 32 + "zz"},
        {"id": "A" * 32},
        {"block_size": 1},
        {"block_size": 2**30},
        {"created": "yesterday"},
        {"conditional_put": "perhaps"},
        {"more": 1},
    ],
)
def test_hostile_configs(change: dict[str, object]) -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=secret, encryption=NONE)
    text = json.dumps(json.loads(store.get("config")) | change).encode()
    with pytest.raises((Corrupt, Unsupported), match=r"^here: the repository (is damaged|was written by a newer)"):
        parse_config(text, subject="here")
    for broken in (b"", b"{", b"[]", b"null", b"\xff\xfe"):
        with pytest.raises(Corrupt, match=r"^here: the repository is damaged: JSON"):
            parse_config(broken, subject="here")


@pytest.mark.parametrize(
    "name", ["", " a", "a ", "a:b", "a@b", "a//b", "/a", "a/", "a\nb", "a\0", "x" * 201, "é" * 101]
)
def test_names_that_no_disk_may_have(name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot name a disk"):
        check_disk_name(name)


def test_names_that_a_disk_may_have() -> None:
    for name in ("vda", "web1/vda", "a b", "Übung/ä", "x" * 200, ".", "..", "a/../b"):
        assert check_disk_name(name) == name
