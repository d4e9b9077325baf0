"""The disk as the child sees it: bytes that it asks its parent for, and volumes as ranges of them."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

from snapchain.files import messages
from snapchain.files.lvm import Piece
from snapchain.files.messages import Hangup, Kind

_BLOCK = 1 << 16
_MOST_BLOCKS = 512


class Disk:
    """size: bytes. Recently read blocks are kept: file systems read their metadata in small pieces, again and again."""

    def __init__(self, fd: int, size: int) -> None:
        self.size, self._fd = size, fd
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        """Fewer bytes at the end of the disk. Raises OSError where the parent cannot read them."""
        stop = min(offset + max(length, 0), self.size)
        if offset < 0 or offset >= stop:
            return b""
        pieces = []
        while offset < stop:
            number, skip = divmod(offset, _BLOCK)
            if skip == 0 and stop - offset > _BLOCK and number not in self._blocks:
                data = self._ask(offset, min(stop - offset, messages.MOST))
            else:
                try:
                    data = self._block(number)[skip : skip + stop - offset]
                except OSError:  # another part of the block may be what is lost
                    data = self._ask(offset, min(stop - offset, _BLOCK - skip))
            pieces.append(data)
            offset += len(data)
        return b"".join(pieces)

    def _block(self, number: int) -> bytes:
        found = self._blocks.get(number)
        if found is None:
            start = number * _BLOCK
            found = self._blocks[number] = self._ask(start, min(_BLOCK, self.size - start))
            if len(self._blocks) > _MOST_BLOCKS:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(number)
        return found

    def _ask(self, offset: int, length: int) -> bytes:
        messages.send(self._fd, Kind.READ, messages.READ.pack(offset, length))
        kind, data = messages.receive(self._fd)
        if kind is Kind.LOST:
            raise OSError(5, "these bytes of the disk cannot be read")
        if kind is not Kind.BYTES or len(data) != length:
            raise Hangup("no answer to a read")
        return data


class Volume:
    """A range of the disk, or several in a row; a file object for libraries that want one."""

    def __init__(self, disk: Disk, pieces: Sequence[Piece]) -> None:
        self._disk, self._pieces = disk, pieces
        self._starts = [piece.at for piece in pieces]
        self._at = 0
        self.size = sum(piece.size for piece in pieces)

    def pread(self, offset: int, length: int) -> bytes:
        """As `Disk.read`."""
        stop = min(offset + max(length, 0), self.size)
        found = []
        while 0 <= offset < stop:
            piece = self._pieces[bisect_right(self._starts, offset) - 1]
            skip = offset - piece.at
            data = self._disk.read(piece.disk + skip, min(stop - offset, piece.size - skip))
            if not data:
                break
            found.append(data)
            offset += len(data)
        return b"".join(found)

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        data = self.pread(self._at, self.size - self._at if size < 0 else size)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """As a file's."""
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        """As a file's."""
        return self._at

    def get_offset(self) -> int:
        """The name by which libyal asks for `tell`."""
        return self._at

    def get_size(self) -> int:
        """Bytes."""
        return self.size
