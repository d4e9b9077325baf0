"""What is to be done to a file, as numpy columns; nothing of it is done yet."""

from __future__ import annotations

from dataclasses import dataclass

from snapchain.image.assemble.copies import Copies
from snapchain.image.chain import ImageChain
from snapchain.image.file import ImageFile
from snapchain.image.physical import Int64s
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.tables import UInt64s


@dataclass(frozen=True, slots=True, eq=False)
class Amendment:
    """A file's change, planned. Bytes throughout.

    view:    the chain up to the uppermost input; target: number of the file in it that is changed
    backing: the link that it then records; end: of the file now, rounded up to clusters: where new clusters begin
    copies:  bytes to copy as they are; unpack_*: ranges of compressed clusters to store plain; zero_*: to overwrite
             with zeroes; all targets are offsets in the changed file
    cluster, entry, bitmap: the L2 entries that change: number of the guest cluster, ascending, and what its entry and
             its bitmap of subclusters (None where there are none) become
    new_clusters: data clusters that come at `end`; surviving: guest bytes of DATA that the inputs hold together
    """

    view: ImageChain
    target: int
    backing: Backing | None
    end: int
    copies: Copies
    unpack_file: Int64s
    unpack_guest: Int64s
    unpack_target: Int64s
    unpack_length: Int64s
    zero_target: Int64s
    zero_length: Int64s
    cluster: Int64s
    entry: UInt64s
    bitmap: UInt64s | None
    new_clusters: int
    surviving: int

    @property
    def file(self) -> ImageFile:
        """The one that is changed, as it was when this was planned."""
        return self.view.files[self.target]

    @property
    def cluster_size(self) -> int:
        """Of the changed file."""
        return self.file.cluster_size

    @property
    def bytes_moved(self) -> int:
        """Bytes that the file takes from others, shared or copied; unpacked ones as they are then."""
        return self.copies.bytes + self.bytes_unpacked

    @property
    def bytes_unpacked(self) -> int:
        """Of compressed clusters, which do not stay so."""
        return int(self.unpack_length.sum())

    @property
    def bytes_needed(self) -> int:
        """Room that the file may grow by: data, tables, and all reference counts anew."""
        size = self.cluster_size
        tables = self.new_tables_at_most * size
        l1 = -(-self.view.size // self._guest_bytes_per_l2) * 8 + size if self.view.size > self.file.size else 0
        clusters = (self.end + self.new_clusters * size + tables + l1) // size
        return self.new_clusters * size + tables + l1 + clusters * 8 + 8 * size

    @property
    def new_tables_at_most(self) -> int:
        """L2 tables of the clusters whose entries change."""
        numbers = self.cluster // (self._guest_bytes_per_l2 // self.cluster_size)
        return int((numbers[1:] != numbers[:-1]).sum()) + min(len(numbers), 1)

    @property
    def _guest_bytes_per_l2(self) -> int:
        assert self.file.header is not None
        return self.file.header.guest_bytes_per_l2
