"""A virtual machine whose disks are snapshotted, merged and read while it runs: one protocol, two kinds.

    with open_guest(GuestAddress(domain="web1")) as guest:
        for disk in guest.disks(): ...

qmp_guest.py talks to QEMU's own monitor, libvirt_guest.py to libvirt, and never to the monitor behind libvirt's back.
Nothing is remembered between two calls: the block graph is asked each time, since anybody may change it meanwhile.

Words are QEMU's: a *node* is one driver of the block graph, the *root* is the node that a device reads, a *filter* is a
node that stores nothing (throttle, copy-on-read).  A disk's *chain* is its format nodes, root of the chain first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from snapchain.guest.address import GuestAddress


class State(StrEnum):
    """Whether a guest runs."""

    RUNNING = "running"
    PAUSED = "paused"
    """Stopped by somebody, or by an I/O error; its QEMU has the images open."""
    INCOMING = "incoming"
    """It waits for a migration, or has been migrated away: its images are not its own."""
    OFF = "off"
    """No QEMU runs: its images are images at rest."""


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap of a node. granularity: bytes; usable: recording, persistent or not, and not inconsistent."""

    name: str
    granularity: int
    recording: bool
    persistent: bool
    inconsistent: bool
    busy: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """One image of a disk's chain, as QEMU has it open.

    node: name of the format node now; QEMU and libvirt give other names at each start and each snapshot
    path: None where it is no local file or block device (NBD, RBD, a json: description)
    identity: (device, inode) of what the path names now, None without a path
    image_format: the format driver: qcow2, raw, ...
    virtual_size: bytes
    """

    node: str
    path: Path | None
    identity: tuple[int, int] | None
    image_format: str
    virtual_size: int
    bitmaps: tuple[Bitmap, ...] = ()
    is_block_device: bool = False

    @property
    def known_format(self) -> str | None:
        """As `scan` takes it. QEMU knows it, whatever the name says: libvirt calls an overlay web1.before-update."""
        return self.image_format if self.image_format in ("qcow2", "raw") else None


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """A disk of a guest as it is now.

    name: libvirt's target (vda), or the id of the device or drive: what follows GUEST/ in the disk's name elsewhere
    root: the node that the device reads: the active layer's own, or the uppermost of the filters on it
    filters: nodes between the device and the active layer, uppermost first
    chain: the images, root first; the last one is the active layer. Empty: nothing is in the drive
    obstacle: why it can have no live snapshot, a sentence with what to do; None where it can
    left_out: why it is no disk to protect at all (CD-ROM, empty, read-only): a word; None where it is one
    """

    name: str
    root: str
    filters: tuple[str, ...]
    chain: tuple[Layer, ...]
    read_only: bool
    obstacle: str | None = None
    left_out: str | None = None

    @property
    def active(self) -> Layer:
        """The layer that the guest writes to."""
        return self.chain[-1]


@dataclass(frozen=True, slots=True)
class Activity:
    """Something that is at work in a guest: a block job, an export, a backup, a migration.

    id: of the job or export; kind: commit, stream, mirror, backup, export, migration, ...
    is_ours: snapchain began it; node: that it works on, None where it concerns the whole guest
    says: a sentence: what, and whose
    """

    id: str
    kind: str
    is_ours: bool
    node: str | None
    says: str


@dataclass(frozen=True, slots=True)
class NewOverlay:
    """An overlay file that was made beforehand, for one disk: empty, of the exact size, its backing name written.

    path: of the file; backing: path of the active layer that it will seal; image_format is always qcow2
    """

    disk: str
    path: Path
    backing: Path


class Outcome(Enum):
    """What became of a command whose answer may have been lost. Judged by the graph alone."""

    DONE = "done"
    NOT_DONE = "not done"


class Switch(Protocol):
    """Overlays that are open in the guest's QEMU, and not yet part of its chains."""

    def run(self) -> None:
        """Make them the active layers, all in one transaction: all or none. Milliseconds.

        Raises Unavailable when the answer was lost (then ask `outcome`), Busy when something stands in the way.
        """
        ...

    def outcome(self) -> Outcome:
        """What the graph shows now."""
        ...


class JobKind(StrEnum):
    """How a live merge moves data."""

    COMMIT = "commit"
    """The data of sealed layers go into the lowest of them; the active layer stays."""
    ACTIVE_COMMIT = "active-commit"
    """The active layer's go too; at READY the guest is switched to the lowest (pivot).

    It finalizes itself: at PENDING QEMU holds back the guest's I/O for as long as nobody finalizes.
    """
    STREAM = "stream"
    """The data of the lower ones go into the uppermost."""


class JobStatus(StrEnum):
    """QEMU's states, as far as a client must tell them apart."""

    RUNNING = "running"
    READY = "ready"
    PENDING = "pending"
    """All data are moved; the graph is still the old one. Only seen where we finalize ourselves."""
    CONCLUDED = "concluded"
    """The graph is the new one, or the job failed."""
    PAUSED = "paused"
    """By somebody, or by an error with on-error=stop."""
    GONE = "gone"
    """Nobody knows of it (any more): the graph and the headers decide."""


@dataclass(frozen=True, slots=True)
class JobProgress:
    """done, total: QEMU's own units, bytes for commit and stream; error: of a concluded job that failed."""

    status: JobStatus
    done: int
    total: int
    error: str | None = None


class Job(Protocol):
    """A block job of ours. What does not apply to a kind of guest does nothing there (libvirt finalizes itself)."""

    @property
    def id(self) -> str: ...

    @property
    def kind(self) -> JobKind: ...

    def progress(self) -> JobProgress:
        """How it stands. Never asks for the nodes while a stream is concluded (QEMU 7.2 dies of it)."""
        ...

    def wait(self, seconds: float) -> None:
        """Until its state may have changed, at most so long."""
        ...

    def set_speed(self, bytes_per_second: int) -> None:
        """0: no limit."""
        ...

    def complete(self) -> None:
        """At READY: pivot."""
        ...

    def flush(self) -> None:
        """Before finalize and after it: have QEMU write what the change of the header relies on, to the disk.

        Nothing where QEMU does that itself, as in an active commit.
        """
        ...

    def finalize(self) -> None:
        """At PENDING: change the graph."""
        ...

    def dismiss(self) -> None:
        """At CONCLUDED: let it go."""
        ...

    def cancel(self) -> None:
        """Before finalize: give it up; the chain stays as it was."""
        ...


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """Counters of one disk since the guest's start: operations, and nanoseconds spent in them."""

    reads: int
    writes: int
    flushes: int
    read_ns: int
    write_ns: int
    flush_ns: int


class Agent(Protocol):
    """The guest agent. Each call has a deadline in seconds.

    Raises Unavailable when there is no answer in time. After a freeze without an answer the guest may freeze *later*:
    only a thaw that was answered, and a status of thawed, is the end of it.
    """

    def ping(self, *, timeout: float) -> None: ...

    def freeze(self, *, timeout: float) -> int:
        """How many filesystems were frozen."""
        ...

    def thaw(self, *, timeout: float) -> int: ...

    def is_frozen(self, *, timeout: float) -> bool: ...

    def address(self) -> dict[str, str]:
        """How another process can reach it (`agent.open_agent`): what the watchdog and the journal get."""
        ...


@dataclass(frozen=True, slots=True)
class DefinitionFile:
    """A small file that belongs to a guest: firmware variables (role nvram), the state of its TPM (role tpm).

    secret: only an encrypted destination may have it; name: of the file, relative for a directory tree
    """

    role: Literal["nvram", "tpm"]
    name: str
    data: bytes
    secret: bool


@dataclass(frozen=True, slots=True)
class Definition:
    """What is needed to define the guest again.

    live, inactive: domain XML, of libvirt; argv: of QEMU, where no libvirt manages it
    unreadable: what belongs to it and could not be read, sentences; immovable: devices of this host
    media: paths in removable drives
    """

    kind: Literal["libvirt", "qmp"]
    name: str
    uuid: str | None
    machine: str | None
    macs: tuple[str, ...]
    live: str | None = None
    inactive: str | None = None
    argv: tuple[str, ...] | None = None
    files: tuple[DefinitionFile, ...] = ()
    media: tuple[str, ...] = ()
    immovable: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


class Guest(Protocol):
    """A guest. All calls may raise Unavailable when the monitor or libvirt does not answer.

    option: how a user names it on the command line, for hints: `--domain web1`
    streams: whether layers can be streamed into an upper one; libvirt offers it only for the active one, with no flush
    """

    @property
    def kind(self) -> Literal["libvirt", "qmp"]: ...

    @property
    def name(self) -> str: ...

    @property
    def option(self) -> str: ...

    @property
    def streams(self) -> bool: ...

    @property
    def address(self) -> GuestAddress:
        """As it was opened: another process can open it again (journal.py)."""
        ...

    def state(self) -> State: ...

    def process(self) -> tuple[int, int] | None:
        """(pid, start time as in /proc/PID/stat) of its QEMU, where it runs here: tells a restart."""
        ...

    def disks(self) -> Sequence[GuestDisk]:
        """All, in the guest's order, also what is left out."""
        ...

    def activities(self) -> Sequence[Activity]:
        """Everything at work in it, ours and others'."""
        ...

    def statistics(self, disk: str) -> DiskStatistics: ...

    def definition(self, *, with_secrets: bool) -> Definition: ...

    def agent(self) -> Agent | None:
        """None where no channel of an agent is configured."""
        ...

    def prepared(self, overlays: Sequence[NewOverlay]) -> AbstractContextManager[Switch]:
        """Open the overlays in QEMU; what is not switched to at the end of the block is closed again.

        Raises Busy for a disk that something is at work on, Conflict when a chain is not as the overlays were made for.
        """
        ...

    def release(self, unused: Sequence[Path]) -> None:
        """Close files that QEMU keeps open, and that are part of no disk: overlays of a killed run, merged layers.

        Idempotent.
        """
        ...

    def start(
        self, kind: JobKind, disk: str, *, lowest: Path, uppermost: Path, backing: str | None, job_id: str, speed: int
    ) -> Job:
        """Begin a live merge of neighbouring layers of a disk. speed: bytes a second, 0 without limit.

        backing: the name to record where a header changes: of the layer above for COMMIT, of the uppermost for STREAM
        (None: it becomes the root)
        Raises Busy when QEMU or libvirt refuses it because of something else at work, Unsupported for a kind that this
        guest does not offer.
        """
        ...

    def job(self, job_id: str, kind: JobKind, disk: str) -> Job:
        """One that was begun before, by whatever process. Its status is GONE when nobody knows it."""
        ...

    def close(self) -> None: ...
