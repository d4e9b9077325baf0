"""The negotiation, option by option, without a socket."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import NotFound, SnapchainError, Unavailable
from snapchain.nbd.handshake import Described, Handshake, Next
from snapchain.nbd.protocol import HandshakeFlag, Option, Reply

FIXED = HandshakeFlag.FIXED_NEWSTYLE
BOTH = FIXED | HandshakeFlag.NO_ZEROES
NAMES = ("web1/vda", "web1/vdb")


class Offered:
    """Two exports, one of which may not be opened."""

    def __init__(self, fault: SnapchainError | None = None, *, block_status: bool = True) -> None:
        self.fault, self.block_status = fault, block_status

    def names(self) -> Sequence[str]:
        return NAMES

    def describe(self, name: str) -> Described:
        if name not in NAMES:
            raise NotFound(f"there is no export {name!r}")
        return Described(name, 1 << 20, "a disk", self.block_status)

    def open(self, name: str) -> str:
        if self.fault is not None:
            raise self.fault
        return name


def info(name: str, *kinds: int) -> bytes:
    text = name.encode()
    return struct.pack(">I", len(text)) + text + struct.pack(f">H{len(kinds)}H", len(kinds), *kinds)


def contexts(name: str, *queries: bytes) -> bytes:
    text = name.encode()
    told = b"".join(struct.pack(">I", len(each)) + each for each in queries)
    return struct.pack(">I", len(text)) + text + struct.pack(">I", len(queries)) + told


def replies(raw: bytes) -> list[tuple[int, bytes]]:
    """(type, data) of each reply."""
    found = []
    while raw:
        magic, _, kind, length = struct.unpack_from(">QIII", raw)
        assert magic == 0x3E889045565A9
        found.append((kind, raw[20 : 20 + length]))
        raw = raw[20 + length :]
    return found


def flags_of(raw: bytes) -> int:
    """The transmission flags in the answer to GO or INFO."""
    return next(int.from_bytes(data[10:]) for kind, data in replies(raw) if kind == Reply.INFO and len(data) == 12)


def test_an_export_is_chosen_with_all_that_was_agreed() -> None:
    begun = Handshake(Offered(), BOTH)
    assert begun.answer(Option.STRUCTURED_REPLY, b"")[1] is Next.OPTION
    found, _ = begun.answer(Option.SET_META_CONTEXT, contexts("web1/vda", b"base:allocation", b"qemu:x"))
    assert replies(found) == [(Reply.META_CONTEXT, struct.pack(">I", 1) + b"base:allocation"), (Reply.ACK, b"")]
    listed, then = begun.answer(Option.LIST, b"")
    assert [data[4:] for kind, data in replies(listed) if kind == Reply.SERVER] == [b"web1/vda", b"web1/vdb"]
    told, then = begun.answer(Option.INFO, info("web1/vdb", 1, 2))
    assert then is Next.OPTION
    assert {data[:2] for _, data in replies(told)[:-1]} == {b"\0\0", b"\0\1", b"\0\2", b"\0\3"}
    chosen, then = begun.answer(Option.GO, info("web1/vda"))
    assert then is Next.SERVE
    assert (begun.opened, begun.structured, begun.contexts) == ("web1/vda", True, True)
    assert replies(chosen)[1] == (Reply.INFO, struct.pack(">HIII", 3, 1, 256 << 10, 32 << 20))
    assert flags_of(chosen) == 1 | 2 | 4 | 8 | 128 | 256 | 1024, "read-only, DF, several connections"


def test_flags_follow_what_was_agreed() -> None:
    begun = Handshake(Offered(), BOTH)
    chosen, _ = begun.answer(Option.GO, info("web1/vda"))
    assert not flags_of(chosen) & 128, "no DF without structured replies"
    assert not begun.contexts


def test_an_export_without_block_status_agrees_to_no_context() -> None:
    begun = Handshake(Offered(block_status=False), BOTH)
    begun.answer(Option.STRUCTURED_REPLY, b"")
    for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        found, _ = begun.answer(option, contexts("web1/vda", b"base:allocation"))
        assert replies(found) == [(Reply.ACK, b"")]
    begun.answer(Option.GO, info("web1/vda"))
    assert not begun.contexts


def test_contexts_are_those_of_the_export_that_is_chosen() -> None:
    begun = Handshake(Offered(), BOTH)
    refused, _ = begun.answer(Option.SET_META_CONTEXT, contexts("web1/vda", b"base:allocation"))
    assert replies(refused)[0][0] == Reply.ERR_INVALID, "structured replies come first"
    begun.answer(Option.STRUCTURED_REPLY, b"")
    begun.answer(Option.SET_META_CONTEXT, contexts("web1/vda", b"base:allocation"))
    begun.answer(Option.GO, info("web1/vdb"))
    assert not begun.contexts
    for query, count in ((b"base:", 0), (b"base:allocation", 1), (b"x:y", 0)):
        found, _ = begun.answer(Option.SET_META_CONTEXT, contexts("web1/vda", query))
        assert len(replies(found)) == count + 1
    for queries in ((), (b"base:",), (b"base:allocation",)):
        found, _ = begun.answer(Option.LIST_META_CONTEXT, contexts("web1/vda", *queries))
        assert replies(found)[0] == (Reply.META_CONTEXT, bytes(4) + b"base:allocation")


@pytest.mark.parametrize(
    ("option", "data", "kind"),
    [
        (Option.GO, info("none"), Reply.ERR_UNKNOWN),
        (Option.INFO, info("none"), Reply.ERR_UNKNOWN),
        (Option.SET_META_CONTEXT, contexts("none", b"base:allocation"), Reply.ERR_UNKNOWN),
        (Option.GO, b"\0\0", Reply.ERR_INVALID),
        (Option.LIST, b"x", Reply.ERR_INVALID),
        (Option.STRUCTURED_REPLY, b"x", Reply.ERR_INVALID),
        (Option.STARTTLS, b"", Reply.ERR_POLICY),
        (11, b"", Reply.ERR_UNSUP),
        (4711, b"x" * 9, Reply.ERR_UNSUP),
    ],
)
def test_what_cannot_be_done_is_an_error_and_no_end(option: int, data: bytes, kind: Reply) -> None:
    begun = Handshake(Offered(), BOTH)
    begun.answer(Option.STRUCTURED_REPLY, b"")
    reply, then = begun.answer(option, data)
    assert (replies(reply)[-1][0], then) == (kind, Next.OPTION)
    assert begun.answer(Option.GO, info("web1/vda"))[1] is Next.SERVE


def test_an_export_that_cannot_be_opened_is_told_with_the_reason() -> None:
    begun = Handshake(Offered(Unavailable("the store does not answer")), BOTH)
    (reply,) = replies(begun.answer(Option.GO, info("web1/vda"))[0])
    assert reply == (Reply.ERR_PLATFORM, b"the store does not answer")
    assert begun.opened is None
    assert begun.answer(Option.EXPORT_NAME, b"web1/vda") == (b"", Next.CLOSE)


def test_abort_is_answered_and_ends() -> None:
    assert Handshake(Offered(), BOTH).answer(Option.ABORT, b"")[1] is Next.CLOSE


@pytest.mark.parametrize(("flags", "zeroes"), [(HandshakeFlag(0), 124), (FIXED, 124), (BOTH, 0)])
def test_the_old_way_to_an_export(flags: HandshakeFlag, zeroes: int) -> None:
    begun = Handshake(Offered(), flags)
    reply, then = begun.answer(Option.EXPORT_NAME, b"web1/vdb")
    assert (len(reply), then, begun.opened) == (10 + zeroes, Next.SERVE, "web1/vdb")
    assert Handshake(Offered(), flags).answer(Option.EXPORT_NAME, b"none") == (b"", Next.CLOSE)
    if not flags & FIXED:
        assert Handshake(Offered(), flags).answer(Option.LIST, b"") == (b"", Next.CLOSE)


def test_without_tls_nothing_is_told_where_tls_is_required() -> None:
    begun = Handshake(Offered(), BOTH, tls=True)
    for option in (Option.LIST, Option.INFO, Option.GO, Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, 99):
        assert replies(begun.answer(option, info("web1/vda"))[0])[0][0] == Reply.ERR_TLS_REQD
    assert Handshake(Offered(), BOTH, tls=True).answer(Option.EXPORT_NAME, b"web1/vda") == (b"", Next.CLOSE)
    assert replies(begun.answer(Option.STARTTLS, b"x")[0])[0][0] == Reply.ERR_INVALID
    assert begun.answer(Option.STARTTLS, b"")[1] is Next.TLS
    begun.secured()
    assert replies(begun.answer(Option.STARTTLS, b"")[0])[0][0] == Reply.ERR_INVALID
    assert begun.answer(Option.GO, info("web1/vda"))[1] is Next.SERVE


@given(st.lists(st.tuples(st.integers(0, 12), st.binary(max_size=40)), max_size=8), st.booleans())
def test_no_option_raises(options: list[tuple[int, bytes]], tls: bool) -> None:
    begun = Handshake(Offered(), BOTH, tls=tls)
    for option, data in options:
        reply, then = begun.answer(option, data)
        if then is not Next.OPTION:
            break
        assert replies(reply)
