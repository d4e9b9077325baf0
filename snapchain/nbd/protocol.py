"""The numbers and the frames of the NBD protocol, as the server needs them: parsed and made from bytes, nothing else.

    client                                       server
                                                 greeting
    flags, then options, one at a time           replies to each
    EXPORT_NAME or GO ends the negotiation
    requests, 28 bytes each                      replies: in any order, each with the request's cookie

All numbers are big-endian. Lengths are checked here, before memory is allocated for them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snapchain.errors import SnapchainError

MAGIC = 0x4E42444D41474943
HAVE_OPTION = 0x49484156454F5054
OPTION_REPLY = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

MOST_READ = 32 << 20
"""Bytes of a read: what the block size information names as the largest."""
PREFERRED = 256 << 10
MOST_NAME = 4096
"""Bytes of an export's name."""
MOST_OPTION = 64 << 10
"""Bytes of an option's data."""
ALLOCATION = b"base:allocation"
CONTEXT_ID = 1
MOST_QUERIES = 64


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """To an option. Errors have the highest bit set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class HandshakeFlag(IntFlag):
    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class ExportFlag(IntFlag):
    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_CACHE = 1024


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16


class Fault(IntEnum):
    """Of a request: the numbers are Linux's."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


DONE = 1
"""The flag of the last chunk of a reply."""

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
REQUEST = struct.Struct(">IHHQQI")
"""Magic, flags, command, cookie, offset, length."""
_OPTION_REPLY = struct.Struct(">QIII")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_DATA = struct.Struct(">IHHQIQ")
_HOLE = struct.Struct(">IHHQIQI")
_ERROR = struct.Struct(">IHHQIIH")
_U16, _U32, _U64 = struct.Struct(">H"), struct.Struct(">I"), struct.Struct(">Q")
_EXPORT_INFO = struct.Struct(">HQH")
_BLOCK_SIZES = struct.Struct(">HIII")
_MOST_WORDS = 1024


class Malformed(SnapchainError):
    """A client breaks the protocol so that what follows cannot be told apart: it is disconnected."""

    exit_code = 1
    kind = "malformed"


# --- The negotiation


def greeting() -> bytes:
    """What a server says first."""
    return GREETING.pack(MAGIC, HAVE_OPTION, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


def parse_client_flags(data: bytes) -> HandshakeFlag:
    """Raises Malformed for flags that were not offered."""
    flags = CLIENT_FLAGS.unpack(data)[0]
    if flags & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
        raise Malformed(f"the client sets unknown flags {flags:#x}")
    return HandshakeFlag(flags)


def parse_option(data: bytes) -> tuple[int, int]:
    """(number, bytes of data that follow). Raises Malformed."""
    magic, number, length = OPTION.unpack(data)
    if magic != HAVE_OPTION:
        raise Malformed("what the client sends is no option")
    if length > MOST_OPTION:
        raise Malformed(f"an option of {length} bytes")
    return number, length


def option_reply(option: int, kind: Reply, data: bytes = b"") -> bytes:
    """One reply to an option."""
    return _OPTION_REPLY.pack(OPTION_REPLY, option, kind, len(data)) + data


def option_error(option: int, kind: Reply, words: str) -> bytes:
    """An error reply, with words for people."""
    return option_reply(option, kind, words.encode()[:_MOST_WORDS])


def server_reply(option: int, name: str) -> bytes:
    """One export of a list."""
    text = name.encode()
    return option_reply(option, Reply.SERVER, _U32.pack(len(text)) + text)


def export_info(size: int, flags: int) -> bytes:
    """Data of an INFO reply: the one that must come."""
    return _EXPORT_INFO.pack(Info.EXPORT, size, flags)


def text_info(kind: Info, text: str) -> bytes:
    """Data of an INFO reply with the name, or the description."""
    return _U16.pack(kind) + text.encode()


def block_sizes() -> bytes:
    """Data of an INFO reply: any offset and length, best in whole blocks."""
    return _BLOCK_SIZES.pack(Info.BLOCK_SIZE, 1, PREFERRED, MOST_READ)


def export_name_reply(size: int, flags: int, *, zeroes: bool) -> bytes:
    """The reply to EXPORT_NAME, which is no option reply. zeroes: 124 of them, of which nobody knows what for"""
    return _U64.pack(size) + _U16.pack(flags) + bytes(124 if zeroes else 0)


class InvalidOption(ValueError):
    """The data of an option do not have the form that the option needs."""


def parse_name(data: bytes) -> str:
    """The name in an option. Raises InvalidOption for what cannot be a name."""
    if len(data) > MOST_NAME:
        raise InvalidOption(f"a name of {len(data)} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidOption("the name is not UTF-8") from error


def parse_info(data: bytes) -> tuple[str, frozenset[int]]:
    """(name, kinds of information that are asked for) of INFO and GO. Raises InvalidOption."""
    name, rest = _taken(data)
    if len(rest) < _U16.size or len(rest) != _U16.size * (1 + _U16.unpack_from(rest)[0]):
        raise InvalidOption("another number of information requests than it says")
    return parse_name(name), frozenset(number for (number,) in _U16.iter_unpack(rest[_U16.size :]))


def parse_contexts(data: bytes) -> tuple[str, list[bytes]]:
    """(name of the export, queries) of LIST_META_CONTEXT and SET_META_CONTEXT. Raises InvalidOption."""
    name, rest = _taken(data)
    if len(rest) < _U32.size:
        raise InvalidOption("no number of queries")
    count, rest = _U32.unpack_from(rest)[0], rest[_U32.size :]
    if count > MOST_QUERIES:
        raise InvalidOption(f"{count} queries")
    queries = []
    for _ in range(count):
        query, rest = _taken(rest)
        queries.append(query)
    if rest:
        raise InvalidOption("bytes after the last query")
    return parse_name(name), queries


def _taken(data: bytes) -> tuple[bytes, bytes]:
    """What stands behind a length, and the rest."""
    if len(data) < _U32.size or len(data) - _U32.size < _U32.unpack_from(data)[0]:
        raise InvalidOption("it ends too early")
    stop = _U32.size + _U32.unpack_from(data)[0]
    return data[_U32.size : stop], data[stop:]


def context_reply(option: int, number: int) -> bytes:
    """One metadata context. number: by which replies name it"""
    return option_reply(option, Reply.META_CONTEXT, _U32.pack(number) + ALLOCATION)


# --- Requests and their replies


class Request(NamedTuple):
    """A request. cookie: the client's own number of it"""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int

    @property
    def wants_one_chunk(self) -> bool:
        """The flag DF: all data in one chunk."""
        return bool(self.flags & _DF)

    @property
    def wants_one_run(self) -> bool:
        """The flag REQ_ONE: the first run of the block status."""
        return bool(self.flags & _REQ_ONE)


def parse_request(data: bytes | bytearray | memoryview, place: int = 0) -> Request:
    """The request at `place`. Raises Malformed where it has another magic."""
    magic, flags, command, cookie, offset, length = REQUEST.unpack_from(data, place)
    if magic != REQUEST_MAGIC:
        raise Malformed(f"what the client sends is no request: it begins with {magic:#x}")
    return Request(flags, command, cookie, offset, length)


# Plain numbers: arithmetic with members of an enum takes longer than all the rest of a request.
_READ, _DF, _REQ_ONE = int(Command.READ), int(CommandFlag.DF), int(CommandFlag.REQ_ONE)
_KNOWN_FLAGS = {
    _READ: int(CommandFlag.FUA | CommandFlag.DF),
    int(Command.FLUSH): int(CommandFlag.FUA),
    int(Command.CACHE): int(CommandFlag.FUA),
    int(Command.BLOCK_STATUS): int(CommandFlag.FUA | CommandFlag.REQ_ONE),
}
_CHANGES = {int(each) for each in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES, Command.RESIZE)}


def fault_of(request: Request, size: int, *, structured: bool, contexts: bool) -> Fault | None:
    """What is wrong with a request that has a reply, of an export of `size` bytes; None where it is to be served."""
    flags, command, _, offset, length = request
    known = _KNOWN_FLAGS.get(command)
    if known is None:
        return Fault.EPERM if command in _CHANGES else Fault.EINVAL
    if flags & ~known:
        return Fault.EINVAL
    if command == Command.FLUSH:
        return None
    if not 0 < length <= size - offset:
        return Fault.EINVAL
    if command == _READ:
        return Fault.EINVAL if length > MOST_READ or (flags & _DF and not structured) else None
    return Fault.EINVAL if command == Command.BLOCK_STATUS and not contexts else None


def simple_reply(cookie: int, fault: int = 0) -> bytes:
    """Without its data."""
    return _SIMPLE.pack(SIMPLE_MAGIC, fault, cookie)


def done_chunk(cookie: int) -> bytes:
    """The end of a structured reply."""
    return _CHUNK.pack(CHUNK_MAGIC, DONE, Chunk.NONE, cookie, 0)


def data_head(cookie: int, offset: int, length: int, flags: int) -> bytes:
    """A chunk of data, without them."""
    return _DATA.pack(CHUNK_MAGIC, flags, Chunk.OFFSET_DATA, cookie, _U64.size + length, offset)


def hole_chunk(cookie: int, offset: int, length: int, flags: int) -> bytes:
    """A chunk that says that a range reads as zeroes."""
    return _HOLE.pack(CHUNK_MAGIC, flags, Chunk.OFFSET_HOLE, cookie, _U64.size + _U32.size, offset, length)


def error_chunk(cookie: int, fault: Fault, words: str = "", *, offset: int | None = None) -> bytes:
    """The last chunk of a reply that failed. offset: where"""
    text = words.encode()[:_MOST_WORDS]
    kind = Chunk.ERROR if offset is None else Chunk.ERROR_OFFSET
    rest = text if offset is None else text + _U64.pack(offset)
    return _ERROR.pack(CHUNK_MAGIC, DONE, kind, cookie, 6 + len(rest), fault, len(text)) + rest


def status_chunk(cookie: int, descriptors: npt.NDArray[np.uint32]) -> bytes:
    """The reply to BLOCK_STATUS. descriptors: uint32[n, 2], length and flags of each run"""
    body = _U32.pack(CONTEXT_ID) + descriptors.astype(">u4").tobytes()
    return _CHUNK.pack(CHUNK_MAGIC, DONE, Chunk.BLOCK_STATUS, cookie, len(body)) + body


# --- Pieces of an answer

Buffer = bytes | memoryview
Piece = tuple[int, int, Buffer | None]
"""(offset, length, its bytes) of a part of what is read; None for a range that reads as zeroes."""


def read_reply(cookie: int, pieces: Sequence[Piece], *, ends: bool = True) -> list[Buffer]:
    """Chunks for pieces that follow each other, as buffers that are sent one after the other.

    ends: whether they are the last of the reply
    """
    buffers: list[Buffer] = []
    last = len(pieces) - 1
    for number, (offset, length, data) in enumerate(pieces):
        flags = DONE if ends and number == last else 0
        if data is None:
            buffers.append(hole_chunk(cookie, offset, length, flags))
        else:
            buffers += (data_head(cookie, offset, length, flags), data)
    return buffers


def flat(pieces: Iterable[Piece]) -> list[Buffer]:
    """The bytes of pieces that follow each other, with those of holes."""
    return [bytes(length) if data is None else data for _, length, data in pieces]
