"""Where a point is restored to: a new file, a chain of files, or a block device; and what restore says of it.

The same for every kind of destination: which formats, which names, what may be replaced, when a name is given.

A file that is replaced or overwritten must have no other user: it is locked as QEMU locks an image that it writes, no
image, guest or link may depend on it, and a device must be empty unless --force is given.  A symbolic link stays one.
"""

from __future__ import annotations

import filecmp
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, InvalidInput, NotFound, Unavailable, Unsupported
from snapchain.host.files import UNCHANGED, Standing, free_bytes
from snapchain.host.links import Followed, follow, others_may_write
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import place_to_change, real_path
from snapchain.host.terminal import shell_line
from snapchain.image.block_device import claimed as claimed_device
from snapchain.image.dependent_search import find_dependents, image_directories
from snapchain.image.dependents import Dependents, search
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops.restore.damage import DamagedRange
from snapchain.ops.restore.output import Effort, OutputFile, exists, meant_for
from snapchain.source.lineage import held_by_another
from snapchain.source.notes import Notes
from snapchain.source.ownership import check_no_layer, describe_gift, remedy_against

Format = Literal["qcow2", "raw"]
_RAW_SUFFIXES = frozenset({".raw", ".img", ".bin", ".dd"})
_QCOW2_SUFFIXES = frozenset({".qcow2", ".qcow"})


class FilePlan(BaseModel):
    """A file to be written. data_bytes: guest bytes that it will hold; backing: name of the file below it."""

    model_config = ConfigDict(frozen=True)

    path: str
    format: Format
    virtual_size: int
    data_bytes: int
    backing: str | None


class RestorePlan(BaseModel):
    """What `restore` would do. files: root first, the last is OUT.

    requests, bytes_to_fetch: to read the data from a repository; seconds: about how long that takes, by reading its
    beginning; None where that is not known
    """

    model_config = ConfigDict(frozen=True)

    source: str
    disk: str
    point: int
    time: str
    virtual_size: int
    content_id: str
    output: str
    device: bool
    replaces: bool
    files: tuple[FilePlan, ...]
    bytes_to_write: int
    requests: int | None = None
    bytes_to_fetch: int | None = None
    seconds: float | None = None


class RestoreReport(BaseModel):
    """What `restore` did.

    bytes_written: guest bytes of DATA written; bytes_resumed: those of them that an earlier run had written
    incomplete: what the search for users of a file that was replaced could not look at, a sentence
    damaged: ranges whose bytes are lost, and that are zeroes in the output; content_id: of what the output shows
    """

    model_config = ConfigDict(frozen=True)

    disk: str
    point: int
    output: str
    files: tuple[str, ...]
    virtual_size: int
    bytes_written: int
    bytes_resumed: int = 0
    content_id: str
    incomplete: str | None = None
    damaged: tuple[DamagedRange, ...] = ()


class Target:
    """OUT, judged before anything is read, and claimed before anything is written.

    output: as it was named; file: what is behind its links; device: whether that is a block device
    whole_chain: a file for each layer; format: of OUT, None where each layer has its own
    standing: owner and mode that new files get
    """

    def __init__(
        self,
        output: Path,
        *,
        format: Format | None,
        whole_chain: bool,
        force: bool,
        standing: Standing = UNCHANGED,
    ) -> None:
        """Raises NotFound, InvalidInput, Unsupported and Conflict for a place that does not do."""
        self.output, self.whole_chain, self.force, self.standing = output, whole_chain, force, standing
        self._followed = follow(output)
        self.file = _file(output, self._followed)
        found = _status(self.file)
        self.device = found is not None and stat.S_ISBLK(found.st_mode)
        self._is_there = found is not None
        self._check_place(found)
        self.format = self._format(format)
        if self.device and (format == "qcow2" or whole_chain):
            raise InvalidInput("a block device takes a flat raw disk", subject=output)
        if self.device and standing != UNCHANGED:
            raise InvalidInput("a block device keeps its owner and its mode", subject=output)

    @property
    def replaces(self) -> bool:
        """Whether something is there."""
        return self._is_there

    def has_parts(self) -> bool:
        """Whether an earlier run has left a part of OUT, or of the files below it."""
        stem = f"{self.file.stem}."
        targets = [meant_for(path) for path in self.file.parent.iterdir() if path.name.startswith(f".{stem}")]
        return any(target is not None and (self.whole_chain or target == self.file) for target in targets)

    def lower(self, layer: str, kind: Format) -> Path:
        """The file of a layer below OUT, by its name beside OUT, which may be a link."""
        return self.file.with_name(f"{self.file.stem}.{layer[:12]}.{kind}")

    def backing_name(self, lower: Path, *, of_top: bool) -> str:
        """What a file of the chain records of the one below it; it holds by whatever path OUT is opened.

        QEMU looks for a relative name in the directory of the path that it was given, symbolic link or not.
        """
        elsewhere = self._followed.by_link and real_path(self.output.parent) != self.file.parent
        return str(lower) if of_top and elsewhere else lower.name

    def check_space(self, needed: int) -> None:
        """Raises Unavailable when there is less room than bytes needed."""
        free = free_bytes(self.file.parent)
        if needed > free:
            raise Unavailable(
                f"the restored files need up to {needed} bytes, but only {free} are free",
                subject=self.file.parent,
                hint="make room, or restore elsewhere",
            )

    def check_unused(self, on_event: OnEvent = ignore) -> str | None:
        """What the search for users of what OUT names now could not look at.

        Raises Conflict when other images, guests or links depend on it, or it is held.
        """
        return _check_unused([self.file], top=self.output, own=(), on_event=on_event) if self._is_there else None

    @contextmanager
    def claimed(self, on_event: OnEvent) -> Iterator[Claim]:
        """What OUT names, locked against everybody else for the length of a `with` block.

        Raises Busy when somebody has it open or mounted, and as `check_unused`; Conflict for a device that is not
        empty, without `force`.
        """
        with ExitStack() as stack:
            claim = Claim(self, stack, on_event)
            if self.device:
                claim.device = stack.enter_context(claimed_device(self.file, overwrite=self.force))
            elif self._is_there:
                claim.lock = claim.locked(self.file)
            claim.incomplete = self.check_unused(on_event)
            yield claim

    def _check_place(self, found: os.stat_result | None) -> None:
        if not self.file.parent.is_dir():
            raise NotFound("there is no such directory", subject=self.file.parent)
        if found is None:
            if self._followed.by_link and not self.force:
                raise exists(self.output)
            return
        _check_kind(self.output, found)
        if not self.force and not self.device:
            raise exists(self.output)
        if self.device and not self.force and not _is_own_name(self.output, self.file):
            by_whom = "a symbolic link that others may change" if self._followed.exposed else "a symbolic link"
            raise Conflict(
                f"{by_whom} leads to the device {self.file}",
                subject=self.output,
                hint="name the device itself, or say --force to overwrite it",
            )
        if not self.device:
            _check_replaceable(self.file, found)

    def _format(self, format: Format | None) -> Format | None:
        if self.whole_chain:
            if format is not None:
                raise InvalidInput("--chain restores each layer in its own format", hint="leave out --format")
            return None
        if self.device:
            return "raw"
        return _by_suffix(self.output) if format is None else format


class Claim:
    """The files of one restore while they are made.

    device: OUT's descriptor, or -1; lock: on the file that OUT was; incomplete: as `RestoreReport`
    """

    def __init__(self, target: Target, stack: ExitStack, on_event: OnEvent) -> None:
        self._target, self._stack, self._on_event = target, stack, on_event
        self.device = -1
        self.lock: ImageLock | None = None
        self.incomplete: str | None = None
        self._kept: list[ImageLock] = []
        self._outputs: list[OutputFile] = []
        self._effort = Effort()

    @property
    def allocated(self) -> int:
        """Bytes that the files have on disk by now."""
        return sum(os.fstat(output.fd).st_blocks * 512 for output in self._outputs if output.fd >= 0)

    def output(self, name: Path, *, origin: str | None = None) -> OutputFile:
        """Begin or continue a file of the restore, by its name. origin: as of OutputFile.

        Raises Busy, and as `Target` for a name that does not do.
        """
        followed = follow(name) if name != self._target.file else None
        path = _file(name, followed)
        if followed is not None and followed.by_link and _status(path) is None and not self._target.force:
            raise exists(name)
        standing = self._target.standing
        output = self._stack.enter_context(
            OutputFile(path, name=name, origin=origin, effort=self._effort, standing=standing)
        )
        self._outputs.append(output)
        if followed is None and self.lock is not None:
            output.check_can_stand_for(self.lock)
        output.check_can_be_given()
        return output

    def publish(self, outputs: Sequence[OutputFile]) -> None:
        """Give finished files their names, root first: whoever sees OUT can open it.

        A lower file is named after its sealed layer: one that is there already is what another restore has left, and
        stays, if it has the same bytes. Raises Conflict when another one has its name.
        """
        fresh = [output for output in outputs if not self._is_there(output)]
        locks = {output: self._lock_of(output) for output in fresh}
        if any(lock is not None and output.path != self._target.file for output, lock in locks.items()):
            # A file above one that is replaced reads otherwise as well, also where it stays.
            present = [output.path for output in outputs[:-1] if output.path.exists()]
            fds = [lock.fd for lock in (*locks.values(), *self._kept) if lock is not None]
            own = [_identity(fd) for fd in (*fds, *(output.fd for output in outputs))]
            top, said = self._target.output, self._on_event
            unseen = _check_unused(present, top=top, own=own, on_event=said)
            self.incomplete = self.incomplete or unseen
        for output in fresh:
            output.publish(replaced=locks[output])

    def locked(self, path: Path) -> ImageLock:
        """A lock on a file that is to be replaced, until the end of the claim."""
        lock = self._stack.enter_context(ImageLock(path, LockMode.WRITE))
        if not lock.enforced:
            self._on_event(Notice.no_locks(path.parent))
        _check_replaceable(path, os.fstat(lock.fd))
        return lock

    def _lock_of(self, output: OutputFile) -> ImageLock | None:
        if output.path == self._target.file:
            return self.lock
        if not os.path.lexists(output.path):
            return None
        if not self._target.force:
            raise exists(output.path)
        lock = self.locked(output.path)
        output.check_can_stand_for(lock)
        return lock

    def _is_there(self, output: OutputFile) -> bool:
        """Whether a lower file lies there already, byte for byte, and no other user could have put it there."""
        path = output.path
        if path == self._target.file or not path.is_file():
            return False
        lock = self._stack.enter_context(ImageLock(path, LockMode.READ))
        with os_errors(path):
            found = os.fstat(lock.fd)
            is_ours = found.st_uid in (0, os.geteuid()) or not others_may_write(path.parent.stat())
            if is_ours and filecmp.cmp(f"/proc/self/fd/{output.fd}", f"/proc/self/fd/{lock.fd}", shallow=False):
                self._kept.append(lock)
                return True
        lock.release()
        return False


def _is_own_name(path: Path, device: Path) -> bool:
    """Whether a device is named by one of the names that the system gives to devices."""
    whole = path.absolute()
    return whole == device or (whole.is_relative_to("/dev") and ".." not in whole.parts)


def _file(name: Path, followed: Followed | None) -> Path:
    """The file that is to be made, by its own name. Raises Unsupported for one that a link of somebody else has chosen.

    Not the place that `follow` has found: the links may have changed since.
    """
    place = place_to_change(name)
    return place if followed is not None and followed.by_link else name


def _identity(fd: int) -> tuple[int, int]:
    """(device, inode)"""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _status(path: Path) -> os.stat_result | None:
    with os_errors(path):
        try:
            return path.stat()
        except FileNotFoundError:
            return None


def _check_kind(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise InvalidInput("this is a directory", subject=path, hint="name the file to be made")
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        raise InvalidInput("neither a regular file nor a block device", subject=path, hint="name the file to be made")


def _check_replaceable(path: Path, found: os.stat_result) -> None:
    """Raises Unsupported or InvalidInput for a file that cannot be replaced."""
    _check_kind(path, found)
    if found.st_nlink > 1:
        raise Unsupported(
            "it has further hard links, which would keep the old content",
            subject=path,
            hint="remove this name first if the others are to stay as they are (`find -samefile` shows them)",
        )
    check_no_layer(real_path(path))


def _on_device(paths: Sequence[Path], top: Path) -> Dependents:
    """Images on a device do not lie beside it: only the directories that the user or libvirt names are searched."""
    return search(paths, [path for path in image_directories() if path.is_dir()], disk=top)


def _check_unused(paths: Sequence[Path], *, top: Path, own: Sequence[tuple[int, int]], on_event: OnEvent) -> str | None:
    """What could not be looked at. Raises Conflict for a file that has users, that is held, or was given away."""
    notes = Notes()
    for path in map(place_to_change, paths):
        for fault in notes.faults([path]):
            raise fault
        note = notes.of(path)
        if note.holds:
            if note.holds[0].word_of is not None:
                raise held_by_another(note.holds[0], path)
            tags = ", ".join(hold.tag for hold in note.holds)
            raise Conflict(
                f"it is held and must stay as it is: {tags}",
                subject=path,
                hint=shell_line(["snapchain", "release", path, "--tag", note.holds[0].tag]),
            )
        if note.given is not None:
            is_word = note.given.word_of is not None
            back = "`snapchain migrate --take-back` makes the disk this host's again"
            raise Conflict(
                f"{describe_gift(note.given)}: nothing here may write to it",
                subject=path,
                hint=f"restore to another name; {remedy_against(note.given) if is_word else back}",
            )
    found = find_dependents(paths, top=top, own=own) if top.is_file() else _on_device(paths, top)
    if found.incomplete is not None:
        on_event(Notice(found.incomplete))
    for path in paths:
        reason = found.reason(path)
        if reason is not None:
            raise Conflict(
                f"replacing it would change the content of other images: {reason}",
                subject=path,
                hint="restore to another name, or remove the images that depend on it first",
            )
    return found.incomplete


def sectors(size: int) -> int:
    """A raw file's bytes: QEMU counts raw disks in sectors of 512."""
    return -(-size // 512) * 512


def _by_suffix(output: Path) -> Format:
    suffix = output.suffix.lower()
    if suffix in _QCOW2_SUFFIXES:
        return "qcow2"
    if suffix in _RAW_SUFFIXES:
        return "raw"
    raise InvalidInput(
        f"the suffix {suffix!r} does not tell the format", subject=output, hint="say --format qcow2 or --format raw"
    )
