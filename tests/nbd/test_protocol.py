"""The frames of the protocol, by the words of doc/proto.md: made by hand here, and by the server's own functions."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from snapchain.nbd.protocol import (
    MOST_OPTION,
    MOST_READ,
    Chunk,
    Command,
    CommandFlag,
    Fault,
    InvalidOption,
    Malformed,
    Option,
    Reply,
    Request,
    done_chunk,
    error_chunk,
    export_name_reply,
    fault_of,
    flat,
    greeting,
    option_reply,
    parse_client_flags,
    parse_contexts,
    parse_info,
    parse_option,
    parse_request,
    read_reply,
    simple_reply,
    status_chunk,
)

SIZE = 1 << 20


def _named(*texts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(text)) + text for text in texts)


def test_the_greeting_is_that_of_fixed_newstyle() -> None:
    assert greeting() == b"NBDMAGICIHAVEOPT\x00\x03"


def test_flags_that_were_not_offered_are_refused() -> None:
    assert parse_client_flags(struct.pack(">I", 3)) == 3
    with pytest.raises(Malformed, match="unknown flags"):
        parse_client_flags(struct.pack(">I", 4))


def test_an_option_is_bounded_before_memory_is_taken() -> None:
    head = struct.Struct(">8sII")
    assert parse_option(head.pack(b"IHAVEOPT", Option.GO, 17)) == (7, 17)
    with pytest.raises(Malformed, match="no option"):
        parse_option(head.pack(b"IHAVEOPX", 7, 17))
    with pytest.raises(Malformed, match="an option of"):
        parse_option(head.pack(b"IHAVEOPT", 7, MOST_OPTION + 1))


def test_an_option_reply_has_its_magic_and_the_option_again() -> None:
    assert option_reply(7, Reply.ACK) == bytes.fromhex("0003e889045565a9 00000007 00000001 00000000")
    assert option_reply(3, Reply.ERR_UNSUP, b"x") == bytes.fromhex("0003e889045565a9 00000003 80000001 00000001 78")


def test_what_is_asked_for_an_export_is_parsed_to_the_last_byte() -> None:
    body = _named(b"web1/vda") + struct.pack(">HHH", 2, 1, 3)
    assert parse_info(body) == ("web1/vda", frozenset({1, 3}))
    for bad in (body[:-1], body + b"\0", body[:3], _named(b"a"), _named(b"\xff") + bytes(2)):
        with pytest.raises(InvalidOption, match=r"another number|ends too early|UTF-8"):
            parse_info(bad)
    contexts = _named(b"web1/vda") + struct.pack(">I", 2) + _named(b"base:allocation", b"qemu:")
    assert parse_contexts(contexts) == ("web1/vda", [b"base:allocation", b"qemu:"])
    for bad in (
        contexts[:-1],
        contexts + b"\0",
        _named(b"a") + struct.pack(">I", 1 << 31),
        _named(b"a" * 5000) + bytes(4),
    ):
        with pytest.raises(InvalidOption, match=r"too early|last query|queries|a name of"):
            parse_contexts(bad)


@given(st.binary(max_size=64))
@example(_named(b"a") + b"\xff\xff\xff\xff")
def test_no_data_of_an_option_raises_anything_else(data: bytes) -> None:
    for parse in (parse_info, parse_contexts):
        try:
            parse(data)
        except InvalidOption:
            continue


def test_a_request_is_28_bytes() -> None:
    raw = bytes.fromhex("25609513 0004 0000 0123456789abcdef 0000000000001000 00000200")
    assert parse_request(b"xx" + raw, 2) == Request(4, 0, 0x0123456789ABCDEF, 4096, 512)
    with pytest.raises(Malformed, match="no request"):
        parse_request(b"\0" + raw[1:])


_ENDS = [0, 1, 511, SIZE - 1, SIZE, SIZE + 1, MOST_READ, MOST_READ + 1, 2**32 - 1]


@given(
    st.integers(0, 0xFFFF),
    st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)),
    st.one_of(st.sampled_from([*_ENDS, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1)),
    st.sampled_from(_ENDS),
    st.booleans(),
    st.booleans(),
)
@example(0, Command.READ, 2**64 - 1, 1, True, True)
def test_only_requests_inside_of_the_export_are_served(
    flags: int, command: int, offset: int, length: int, structured: bool, contexts: bool
) -> None:
    fault = fault_of(Request(flags, command, 1, offset, length), SIZE, structured=structured, contexts=contexts)
    if command in {Command.WRITE, Command.TRIM, Command.WRITE_ZEROES, Command.RESIZE}:
        assert fault == Fault.EPERM
    elif fault is None and command != Command.FLUSH:
        assert command in {Command.READ, Command.CACHE, Command.BLOCK_STATUS}
        assert length > 0
        assert offset + length <= SIZE
        assert command != Command.BLOCK_STATUS or contexts
        assert not flags & CommandFlag.DF or (structured and command == Command.READ)
    elif fault is not None:
        assert fault == Fault.EINVAL


def test_no_read_is_longer_than_the_block_sizes_say() -> None:
    large = 1 << 40
    assert fault_of(Request(0, 0, 1, 0, MOST_READ), large, structured=True, contexts=False) is None
    assert fault_of(Request(0, 0, 1, 0, MOST_READ + 1), large, structured=True, contexts=False) == Fault.EINVAL
    # A block status costs what its runs cost, not what they span.
    assert fault_of(Request(0, 7, 1, 0, 2**32 - 1), large, structured=True, contexts=True) is None


def test_replies_are_as_the_document_draws_them() -> None:
    assert simple_reply(5, 22) == bytes.fromhex("67446698 00000016 0000000000000005")
    assert done_chunk(5) == bytes.fromhex("668e33ef 0001 0000 0000000000000005 00000000")
    pieces = [(4096, 3, b"abc"), (4099, 5, None)]
    assert b"".join(read_reply(5, pieces)) == bytes.fromhex(
        "668e33ef 0000 0001 0000000000000005 0000000b 0000000000001000 616263"
        "668e33ef 0001 0002 0000000000000005 0000000c 0000000000001003 00000005"
    )
    assert b"".join(flat(pieces)) == b"abc" + bytes(5)
    assert b"".join(read_reply(5, pieces, ends=False)).count(struct.pack(">IHH", 0x668E33EF, 1, 2)) == 0
    assert error_chunk(5, Fault.EIO, "no") == bytes.fromhex(
        "668e33ef 0001 8001 0000000000000005 00000008 00000005 0002 6e6f"
    )
    assert error_chunk(5, Fault.EIO, offset=9)[20:] == bytes.fromhex("00000005 0000 0000000000000009")
    assert error_chunk(5, Fault.EIO, offset=9)[6:8] == struct.pack(">H", Chunk.ERROR_OFFSET)
    runs = np.array([[512, 0], [1024, 3]], np.uint32)
    assert status_chunk(5, runs) == bytes.fromhex(
        "668e33ef 0001 0005 0000000000000005 00000014 00000001 00000200 00000000 00000400 00000003"
    )
    assert len(export_name_reply(SIZE, 3, zeroes=True)) == 134
    assert export_name_reply(SIZE, 3, zeroes=False) == bytes.fromhex("0000000000100000 0003")
