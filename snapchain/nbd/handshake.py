"""The negotiation with one client, without a socket: an option goes in, the reply and what to do next come out.

with TLS required:   STARTTLS  ->  TLS  ->  as below
without:             INFO, LIST, contexts, structured replies, in any order  ->  GO or EXPORT_NAME
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

from snapchain.errors import NotFound, SnapchainError
from snapchain.nbd.protocol import (
    ALLOCATION,
    CONTEXT_ID,
    ExportFlag,
    HandshakeFlag,
    Info,
    InvalidOption,
    Option,
    Reply,
    block_sizes,
    context_reply,
    export_info,
    export_name_reply,
    option_error,
    option_reply,
    parse_contexts,
    parse_info,
    parse_name,
    server_reply,
    text_info,
)

OpenedT = TypeVar("OpenedT")
OpenedT_co = TypeVar("OpenedT_co", covariant=True)
_FLAGS = (
    ExportFlag.HAS_FLAGS
    | ExportFlag.READ_ONLY
    | ExportFlag.SEND_FLUSH
    | ExportFlag.SEND_FUA
    | ExportFlag.CAN_MULTI_CONN
    | ExportFlag.SEND_CACHE
)


@dataclass(frozen=True, slots=True)
class Described:
    """An export as a list shows it. name: its full name; size: bytes; description: for people

    block_status: clients may ask which ranges hold data
    """

    name: str
    size: int
    description: str
    block_status: bool = True


class Offer(Protocol[OpenedT_co]):
    """What a server has."""

    def names(self) -> Sequence[str]: ...

    def describe(self, name: str) -> Described:
        """The export of that name; the only one has the empty name, too. Raises NotFound."""
        ...

    def open(self, name: str) -> OpenedT_co:
        """Begin to read an export, for one client. Raises what keeps it from being read."""
        ...


class Next(Enum):
    """What follows a reply."""

    OPTION = "option"
    TLS = "tls"
    SERVE = "serve"
    CLOSE = "close"


class Handshake(Generic[OpenedT]):
    """With one client.

    structured: whether replies to requests are structured
    contexts: whether the client may ask for the block status
    opened: the export, once `answer` has said SERVE
    """

    def __init__(self, offer: Offer[OpenedT], flags: HandshakeFlag, *, tls: bool = False) -> None:
        """tls: nothing but STARTTLS is answered, until `secured` is called."""
        self.structured = self.contexts = False
        self.opened: OpenedT | None = None
        self._offer, self._flags, self._needs_tls, self._has_tls = offer, flags, tls, False
        self._context_of: str | None = None

    def secured(self) -> None:
        """From here on everything goes through TLS. What was agreed before does not count: anybody may have sent it."""
        self._needs_tls, self._has_tls = False, True
        self.structured = self.contexts = False
        self._context_of = None

    def answer(self, option: int, data: bytes) -> tuple[bytes, Next]:
        """The reply to an option, and what follows it."""
        if option == Option.ABORT:
            return option_reply(option, Reply.ACK), Next.CLOSE
        is_old = not self._flags & HandshakeFlag.FIXED_NEWSTYLE
        if option == Option.EXPORT_NAME or is_old:
            # The protocol has no error reply for such a client.
            return self._export_name(data) if option == Option.EXPORT_NAME else (b"", Next.CLOSE)
        if option == Option.STARTTLS:
            return self._start_tls(data)
        if self._needs_tls:
            return option_error(option, Reply.ERR_TLS_REQD, "this server serves over TLS only"), Next.OPTION
        try:
            if option in (Option.GO, Option.INFO):
                return self._info(option, data)
            return self._listed(option, data), Next.OPTION
        except InvalidOption as error:
            return option_error(option, Reply.ERR_INVALID, str(error)), Next.OPTION

    def _export_name(self, data: bytes) -> tuple[bytes, Next]:
        if self._needs_tls:
            return b"", Next.CLOSE
        try:
            name = parse_name(data)
            described = self._offer.describe(name)
            self.opened = self._offer.open(name)
        except (InvalidOption, SnapchainError):
            return b"", Next.CLOSE
        self.contexts = self._context_of == described.name
        has_zeroes = not self._flags & HandshakeFlag.NO_ZEROES
        return export_name_reply(described.size, self._export_flags(), zeroes=has_zeroes), Next.SERVE

    def _start_tls(self, data: bytes) -> tuple[bytes, Next]:
        if data or self._has_tls:
            return option_error(
                Option.STARTTLS, Reply.ERR_INVALID, "TLS is active already, or the option has data"
            ), Next.OPTION
        if not self._needs_tls:
            return option_error(Option.STARTTLS, Reply.ERR_POLICY, "this server has no certificate"), Next.OPTION
        return option_reply(Option.STARTTLS, Reply.ACK), Next.TLS

    def _info(self, option: int, data: bytes) -> tuple[bytes, Next]:
        name, wanted = parse_info(data)
        try:
            described = self._offer.describe(name)
            if option == Option.GO:
                self.opened = self._offer.open(name)
        except NotFound as error:
            return option_error(option, Reply.ERR_UNKNOWN, str(error)), Next.OPTION
        except SnapchainError as error:
            return option_error(option, Reply.ERR_PLATFORM, str(error)), Next.OPTION
        told = [export_info(described.size, self._export_flags()), block_sizes()]
        if Info.NAME in wanted:
            told.append(text_info(Info.NAME, described.name))
        if Info.DESCRIPTION in wanted:
            told.append(text_info(Info.DESCRIPTION, described.description))
        replies = b"".join(option_reply(option, Reply.INFO, each) for each in told)
        if option == Option.GO:
            self.contexts = self._context_of == described.name
        return replies + option_reply(option, Reply.ACK), Next.SERVE if option == Option.GO else Next.OPTION

    def _listed(self, option: int, data: bytes) -> bytes:
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            return self._contexts(option, data)
        if option not in (Option.LIST, Option.STRUCTURED_REPLY):
            return option_error(option, Reply.ERR_UNSUP, f"option {option} is not supported")
        if data:
            raise InvalidOption("this option takes no data")
        if option == Option.STRUCTURED_REPLY:
            self.structured = True
            return option_reply(option, Reply.ACK)
        listed = b"".join(server_reply(option, name) for name in self._offer.names())
        return listed + option_reply(option, Reply.ACK)

    def _contexts(self, option: int, data: bytes) -> bytes:
        is_set = option == Option.SET_META_CONTEXT
        if is_set:
            self._context_of = None
        name, queries = parse_contexts(data)
        if is_set and not self.structured:
            raise InvalidOption("structured replies were not agreed before")
        try:
            described = self._offer.describe(name)
        except NotFound as error:
            return option_error(option, Reply.ERR_UNKNOWN, str(error))
        names = described.block_status and ALLOCATION in queries
        lists = described.block_status and not is_set and (not queries or b"base:" in queries)
        if is_set and names:
            self._context_of = described.name
        found = context_reply(option, CONTEXT_ID if is_set else 0) if names or lists else b""
        return found + option_reply(option, Reply.ACK)

    def _export_flags(self) -> int:
        return int(_FLAGS | (ExportFlag.SEND_DF if self.structured else 0))
