"""Ship, merge and restore the snapshot chains of QEMU disks.

    import snapchain

    backup = snapchain.open_destination("/backup", passphrase="correct horse", writing=True)
    shipped = snapchain.ship("/images/web1.qcow2", backup, "web1/vda", labels=["nightly"])
    print(shipped.point, shipped.bytes_stored)

    snapchain.restore(backup, "web1/vda", "/tmp/web1.raw", point="nightly")
    snapchain.merge_points(backup, "web1/vda", snapchain.Policy(daily=7, weekly=4))

    destinations  open_destination, create_repository; log, verify; merge_points, gc; restore; copy
    images        open_image, inspect; snapshot, ship; merge_image
    types         Destination, Policy, Event; SnapchainError, and the tree in `errors`

A `Destination` is what `open_destination` returns. A `Policy` says which points to keep: its fields are the options
`--keep-*` of the command line, as in `Policy(daily=7, weekly=4)`, and a count of -1 means
all. An `Event` is what `on_event` gets. Each of them has its own page, such as `help(snapchain.Policy)`.

Where a function takes a destination, it takes an opened one, or its address: a directory or "s3://bucket/prefix" (a
repository), "dir:/path" or "ssh://[user@]host/path" (a replica). It opens an address with the passphrase in
SNAPCHAIN_PASSWORD. Paths (`AnyPath`) are `str` or `Path`, relative or absolute.

Sizes are in bytes, rates in bytes a second, times aware `datetime`s. A point is named as on the command line: "latest",
a number, a label, or a time. Reports are frozen records; their fields are those of the command's JSON. `on_event` gets
`Event`s while an operation runs: progress, and notices that stop nothing. It may be called from any thread.

All errors of operations derive from `SnapchainError`; `snapchain.errors` has the tree, grouped by what the caller
should do. A `Policy` with a wrong rule raises `InvalidInput`. An operation that raises, or is interrupted, leaves every
earlier point whole; calling it again finishes the work.

Stable: the names in `snapchain.__all__`, their parameters, the fields of the reports that the documentation names, and
the errors. Until version 1.0 they change only in a minor version, with a line in the changelog. Everything else is
internal. Functions load what they need when they are called, so importing snapchain costs little.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING

from snapchain import errors
from snapchain.errors import SnapchainError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import tzinfo
    from pathlib import Path
    from typing import Literal

    from snapchain.destination.protocol import Destination as Destination
    from snapchain.destination.records import GcReport, PointsMergeReport, VerifyReport
    from snapchain.image import ImageChain
    from snapchain.merge.run import MergeReport
    from snapchain.model.events import Event as Event
    from snapchain.model.retention import Policy as Policy
    from snapchain.ops.copy.request import CopyReport
    from snapchain.ops.init import InitReport
    from snapchain.ops.inspect import InspectReport
    from snapchain.ops.log import LogReport
    from snapchain.ops.restore.target import RestoreReport
    from snapchain.ops.ship.request import ShipReport
    from snapchain.source.sealing import SnapshotReport

    AnyPath = str | PathLike[str]
    Format = Literal["qcow2", "raw"]
    OnEvent = Callable[[Event], None]
    Passphrase = str | Callable[[], str | None]

    __version__: str

__all__ = [
    "Destination",
    "Event",
    "Policy",
    "SnapchainError",
    "copy",
    "create_repository",
    "errors",
    "gc",
    "inspect",
    "log",
    "merge_image",
    "merge_points",
    "open_destination",
    "open_image",
    "restore",
    "ship",
    "snapshot",
    "verify",
]

_LOADED_WHEN_ASKED_FOR = {
    "Destination": "snapchain.destination.protocol",
    "Event": "snapchain.model.events",
    "Policy": "snapchain.model.retention",
}


if not TYPE_CHECKING:  # else every name would be taken for one of them

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("snapchain")
        if name in _LOADED_WHEN_ASKED_FOR:
            from importlib import import_module

            return getattr(import_module(_LOADED_WHEN_ASKED_FOR[name]), name)
        raise AttributeError(f"module 'snapchain' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names that cost nothing. pydantic and typing would fill `help(snapchain)` with 600 lines of their methods."""
    return sorted({*__all__, "__version__"} - _LOADED_WHEN_ASKED_FOR.keys())


# --- destinations


def open_destination(
    url: AnyPath,
    *,
    passphrase: Passphrase | None = None,
    writing: bool = False,
    limit_rate: int | None = None,
    pack_size: int | None = None,
    compression: Literal["auto", "fast", "default", "max"] | None = None,
    connections: int = 1,
) -> Destination:
    """The repository or replica at an address. A replica is not contacted yet.

    passphrase: of an encrypted repository, or a function that returns it; by default SNAPCHAIN_PASSWORD
    writing: whether points will be shipped or merged
    limit_rate: bytes a second to and from the destination
    pack_size: bytes that a new object of a repository has at most
    compression: of what is written to a repository; auto is fast, and uses the time that the store needs
    connections: of ssh, to a replica on another host

    Raises InvalidInput for an address that is none, WrongPassphrase (an InvalidInput), NotFound where there is no
    repository, Corrupt where it is another or an older one than this machine knows at the address, Unavailable for a
    server that does not answer.
    """
    from snapchain.destinations import open_destination
    from snapchain.model.compression import parse_compression

    return open_destination(
        fspath(url),
        passphrase=_passphrase(passphrase),
        writing=writing,
        limit_rate=limit_rate,
        pack_size=pack_size,
        compression=None if compression is None else parse_compression(compression),
        connections=connections,
    )


def create_repository(
    url: AnyPath,
    *,
    passphrase: Passphrase | None = None,
    encryption: Literal["aes-256-gcm", "chacha20-poly1305", "none"] = "aes-256-gcm",
    block_size: int | None = None,
    pack_size: int | None = None,
    on_event: OnEvent | None = None,
) -> InitReport:
    """Make an empty repository in a directory or an S3 bucket.

    passphrase: by default SNAPCHAIN_PASSWORD; nothing can be read without it, so keep it elsewhere too
    block_size: guest bytes at whose multiples data is cut for deduplication, a power of two; cannot be changed later
    pack_size: bytes that an object has at most

    Raises Conflict where there is a repository, or something else, InvalidInput without a passphrase.
    """
    from snapchain.ops import init

    plan = init.plan(fspath(url), encryption=encryption, block_size=block_size, pack_size=pack_size)
    return init.run(plan, passphrase=_passphrase(passphrase), on_event=on_event or _ignore)


def log(destination: Destination | AnyPath, disk: str | None = None) -> LogReport:
    """The points of all disks of a destination, or of one disk. Raises NotFound for a disk that is not there."""
    from snapchain.ops.log import log

    return log(_opened(destination, writing=False), disk)


def verify(
    destination: Destination | AnyPath,
    disk: str | None = None,
    *,
    share: float = 0.0,
    on_event: OnEvent | None = None,
) -> VerifyReport:
    """Check the records of a destination, or of one disk, and a share of the data.

    disk: its name, or that of a guest, all disks of which are checked then
    share: of the data to read, from 0.0 (records only) to 1.0 (everything)

    Damage is not raised: the report has `ok` and `findings`. Raises NotFound for a disk that is not there.
    """
    from snapchain.ops.guest_verify import verify

    return verify(_opened(destination, writing=False), disk, share=share, on_event=on_event or _ignore)


def merge_points(
    destination: Destination | AnyPath,
    disk: str,
    policy: Policy,
    *,
    zone: tzinfo | None = None,
    on_event: OnEvent | None = None,
) -> PointsMergeReport:
    """Keep the points of a disk that the policy names, held points, and the newest point; merge the layers of others.

    zone: whose calendar says what a day is; by default UTC

    In a repository only records change. At a replica the files are merged where they are. The report has
    `points_kept` and `points_dropped`. Raises NotFound for a disk that is not there, Busy while somebody ships to it,
    InvalidInput for a disk with points of a guest, which are kept or dropped as a whole.
    """
    from datetime import UTC

    work = _opened(destination, writing=True).merging(disk, policy, zone=zone or UTC)
    return work.run(on_event=on_event or _ignore)


def gc(destination: Destination | AnyPath, *, on_event: OnEvent | None = None) -> GcReport:
    """Delete the data of a repository that no point needs, beside those who ship, merge and restore.

    The report has `bytes_freed`, `bytes_left`, which a later collection deletes, since somebody at work may need
    it, and `findings` where data is lost. Raises Busy while another collection is at work, InvalidInput for a replica,
    which needs no collecting.
    """
    return _opened(destination, writing=True).collecting().run(on_event=on_event or _ignore)


def copy(
    source: Destination | AnyPath,
    destination: Destination | AnyPath,
    names: Sequence[str] = (),
    *,
    newest: bool = False,
    since: str | None = None,
    newer: bool = False,
    on_event: OnEvent | None = None,
) -> CopyReport:
    """Copy the points that another repository lacks, with their numbers, times, labels and holds.

    source: a repository or a replica; destination: another repository
    names: disks, guests, and patterns such as "web*"; by default all disks
    newest: only the newest point of each disk; since: only that point of each disk and those after it
    newer: only points after the newest one that the destination has of the disk

    The report has `points`, `bytes_stored`, `ok`, and `disks` with `points`, `refused` and `failed`: damage of one
    point stops no other. Raises NotFound for a name that is nothing in the source, InvalidInput for a copy of a
    repository into itself.
    """
    from snapchain.ops.copy.request import CopyRequest
    from snapchain.ops.copy.run import run

    request = CopyRequest(names=tuple(names), newest=newest, since=since, newer=newer)
    opened = _opened(source, writing=False), _opened(destination, writing=True)
    return run(request, *opened, on_event=on_event or _ignore)


def restore(
    destination: Destination | AnyPath,
    disk: str,
    output: AnyPath,
    *,
    point: str | int | None = None,
    format: Format | None = None,
    whole_chain: bool = False,
    force: bool = False,
    allow_damaged: bool = False,
    on_event: OnEvent | None = None,
) -> RestoreReport:
    """Write a point to a new file or a block device, read it back, and compare its content id.

    point: by default the newest
    format: of the output; by default by its suffix
    whole_chain: restore every layer as a file of its own: `output` is the top, the others lie beside it
    force: replace `output` if it exists, or overwrite a device that is not empty
    allow_damaged: write zeroes for ranges whose bytes are lost in a repository; the report lists them in `damaged`

    A file gets its name only when it is complete. Raises NotFound for a point that is not there, Conflict where
    `output` exists, Corrupt where stored bytes are damaged, Busy where a program has `output` open.
    """
    from pathlib import Path

    from snapchain.ops.restore.run import Restoration

    work = Restoration(
        _opened(destination, writing=False),
        disk,
        Path(output),
        point=None if point is None else str(point),
        format=format,
        whole_chain=whole_chain,
        force=force,
        allow_damaged=allow_damaged,
    )
    return work.run(on_event=on_event or _ignore)


# --- images


def open_image(path: AnyPath, *, format: Format | None = None, image_dirs: Sequence[AnyPath] = ()) -> ImageChain:
    """An image and everything below it, opened for reading: a context manager.

    format: of the image itself; by default by its suffix, never guessed from its content
    image_dirs: where backing files may lie besides the directory of `path` and below it

    `chain.files` are the files, root first; `chain.size` is the virtual size; `chain.read_into(offset, buffer)` fills a
    buffer with what the guest sees. Raises NotFound, InvalidInput for a wrong format, Corrupt for a broken or hostile
    image, Unsupported for a valid one with features that snapchain refuses, Busy while a program writes its tables.
    """
    from snapchain.image import scan

    return scan(path, format=format, image_dirs=_paths(image_dirs))


def inspect(path: AnyPath, *, format: Format | None = None, image_dirs: Sequence[AnyPath] = ()) -> InspectReport:
    """What each layer of an image holds, and how much of it the layers above hide. Reads tables, never data.

    Parameters and errors as `open_image`.
    """
    from pathlib import Path

    from snapchain.ops.inspect import inspect_image

    return inspect_image(Path(path), format=format, image_dirs=_paths(image_dirs))


def snapshot(
    image: AnyPath,
    *,
    labels: Sequence[str] = (),
    sealed_name: str | None = None,
    overlay: AnyPath | None = None,
    format: Format | None = None,
    image_dirs: Sequence[AnyPath] = (),
    on_event: OnEvent | None = None,
) -> SnapshotReport:
    """Seal the top of a chain that nobody has open, and put a fresh overlay under the same path.

    labels: noted beside the sealed file
    sealed_name: of the sealed file, in the image's directory; by default with a number before the suffix
    overlay: leave the image where it is, sealed, and make the overlay here (what a raw image needs)

    Raises Busy where a program has the image open, Conflict where other images depend on it or the disk was given to
    another host, Unsupported for a block device, and as `open_image`.
    """
    from pathlib import Path

    from snapchain.source import sealing

    plan = sealing.plan(
        Path(image),
        sealed_name=sealed_name,
        overlay=None if overlay is None else Path(overlay),
        labels=labels,
        image_format=format,
        image_dirs=_paths(image_dirs),
    )
    return sealing.run(plan, on_event=on_event or _ignore)


def ship(
    image: AnyPath,
    destination: Destination | AnyPath,
    disk: str,
    *,
    labels: Sequence[str] = (),
    each_layer: bool = False,
    format: Format | None = None,
    image_dirs: Sequence[AnyPath] = (),
    on_event: OnEvent | None = None,
) -> ShipReport:
    """Send what a destination lacks of an image, and publish a point of it.

    disk: its name at the destination, such as "web1/vda"
    labels: of the new point
    each_layer: make every file of the chain a layer and a point of its own

    Raises Busy where a program writes to the image, Diverged where the destination's disk went on without it, Conflict
    where the disk was given to another host, and as `open_image`.
    """
    from pathlib import Path

    from snapchain.ops.ship.run import Files, ShipRequest, run

    request = ShipRequest(
        image=Path(image),
        disk=disk,
        labels=labels,
        files=Files.EACH if each_layer else Files.COMPOSED,
        each_point=each_layer,
        format=format,
        image_dirs=_paths(image_dirs),
    )
    return run(request, _opened(destination, writing=True), on_event=on_event or _ignore)


def merge_image(
    image: AnyPath,
    *,
    policy: Policy | None = None,
    zone: tzinfo | None = None,
    flatten: bool = False,
    max_layers: int | None = None,
    budget_bytes: int | None = None,
    budget_seconds: float | None = None,
    keep_inputs: bool = False,
    format: Format | None = None,
    image_dirs: Sequence[AnyPath] = (),
    on_event: OnEvent | None = None,
) -> MergeReport:
    """Make one layer of several neighbours in a chain of files that nobody has open; without rules, all above the root.

    policy: which sealed layers stay, by the times and labels that `snapshot` noted; zone: as of `merge_points`
    flatten: merge the root, too
    max_layers: merge no more than a chain of so many files needs
    budget_bytes: to be moved at most; budget_seconds: to be worked at most, by the rate of earlier merges
    keep_inputs: remove no file that was merged

    The result is compared with the inputs before the switch; until then the inputs are valid. Raises Busy where a
    program has the image open, Conflict for a held layer, Unavailable where the room does not suffice, and as
    `open_image`.
    """
    from datetime import UTC
    from pathlib import Path

    from snapchain.model.retention import Policy
    from snapchain.ops import merge

    request = merge.MergeRequest(
        image=Path(image),
        policy=policy or Policy(),
        zone=zone or UTC,
        flatten=flatten,
        max_layers=max_layers,
        budget_bytes=budget_bytes,
        budget_seconds=budget_seconds,
        keep_inputs=keep_inputs,
        image_format=format,
        image_dirs=tuple(_paths(image_dirs)),
    )
    return merge.run(merge.plan(request), on_event=on_event or _ignore)


# --- what they share


def _opened(destination: Destination | AnyPath, *, writing: bool) -> Destination:
    if isinstance(destination, str | PathLike):
        return open_destination(destination, writing=writing)
    return destination


def _passphrase(given: Passphrase | None) -> Callable[[], str | None]:
    if callable(given):
        return given
    from os import environ

    return lambda: given or environ.get("SNAPCHAIN_PASSWORD") or None


def _paths(given: Sequence[AnyPath]) -> list[Path]:
    from pathlib import Path

    return [Path(each) for each in given]


def _ignore(event: Event) -> None:
    """For a caller without `on_event`."""
