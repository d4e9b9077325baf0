"""Where a point is restored to: a new file, a chain of files, or a block device; and what restore says of it.

The same for every kind of destination: which formats, which names, what may be replaced, when a name is given.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.errors import InvalidInput, NotFound, Unavailable
from snapchain.host.files import free_bytes
from snapchain.host.os_errors import os_errors
from snapchain.ops.output import OutputFile, exists

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
    """What `restore` would do. files: root first, the last is OUT."""

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


class RestoreReport(BaseModel):
    """What `restore` did. bytes_written: guest bytes of DATA written."""

    model_config = ConfigDict(frozen=True)

    disk: str
    point: int
    output: str
    files: tuple[str, ...]
    virtual_size: int
    bytes_written: int
    content_id: str


class Target:
    """OUT, judged before anything is read. device: whether it is a block device; whole_chain: a file for each layer.

    format: of OUT; None where each layer has its own
    """

    def __init__(self, output: Path, *, format: Format | None, whole_chain: bool, force: bool) -> None:
        """Raises NotFound, InvalidInput and Conflict for a place that does not do."""
        self.output, self.whole_chain, self.force = output, whole_chain, force
        self.device = output.is_block_device()
        self._check_place()
        self.format = self._format(format)
        if self.device and (format == "qcow2" or whole_chain):
            raise InvalidInput("a block device takes a flat raw disk", subject=output)

    @property
    def replaces(self) -> bool:
        """Whether something of that name is there."""
        return self.output.exists()

    def lower(self, layer: str, kind: Format) -> Path:
        """The file of a layer below OUT."""
        return self.output.with_name(f"{self.output.stem}.{layer[:12]}.{kind}")

    def check_space(self, needed: int) -> None:
        """Raises Unavailable when there is less room than bytes needed."""
        free = free_bytes(self.output.parent)
        if needed > free:
            raise Unavailable(
                f"the restored files need up to {needed} bytes, but only {free} are free",
                subject=self.output.parent,
                hint="make room, or restore elsewhere",
            )

    def publish(self, outputs: Sequence[OutputFile]) -> None:
        """Give finished files their names, root first: whoever sees OUT can open it.

        A lower file is named after its sealed layer: one that is there already is what another restore has left, and
        stays, if it has the same bytes. Raises Conflict when another one has its name.
        """
        fresh = [output for output in outputs if not self._is_there(output)]
        for output in fresh:
            output.publish(replace=self.force)

    def _is_there(self, output: OutputFile) -> bool:
        path = output.path
        if self.force or path == self.output or not os.path.lexists(path):
            return False
        with os_errors(path):
            if not path.is_file() or not filecmp.cmp(f"/proc/self/fd/{output.fd}", path, shallow=False):
                raise exists(path)
        return True

    def _check_place(self) -> None:
        parent = self.output.parent
        if not parent.is_dir():
            raise NotFound("there is no such directory", subject=parent)
        if self.output.is_dir():
            raise InvalidInput("this is a directory", subject=self.output, hint="name the file to be made")
        if os.path.lexists(self.output) and not self.device and not self.force:
            raise exists(self.output)

    def _format(self, format: Format | None) -> Format | None:
        if self.whole_chain:
            if format is not None:
                raise InvalidInput("--chain restores each layer in its own format", hint="leave out --format")
            return None
        if self.device:
            return "raw"
        return _by_suffix(self.output) if format is None else format


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
