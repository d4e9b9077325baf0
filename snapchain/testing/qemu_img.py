"""qemu-img, one typed function a subcommand; only those that are used.

Formats are always said, never probed.  Names are made absolute, so that none is taken for an option (`-x`)
or a protocol (`nbd:x`).  Every run is bounded (`LIMITS`): an image is hostile until its header has been read
by our own parser, which must have happened before any of these sees it.  `-U` is never given: an image that
a guest writes to cannot be read from here.

What it prints is read as JSON, by the models below; an exit status has the meaning that
https://www.qemu.org/docs/master/tools/qemu-img.html gives it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from snapchain.errors import Busy, InvalidInput, ToolFailed, Unsupported
from snapchain.host.os_errors import shortage_in, translated
from snapchain.host.processes import Completed, Limits, run

Format = Literal["qcow2", "raw"]

# 32 MiB of L1 and the largest caches stay far below; a looping or forged table does not.
LIMITS = Limits(address_space=2 << 30, open_files=1024)
# Reading a header takes milliseconds whatever the image's size.
_HEADER_LIMITS = Limits(address_space=1 << 30, cpu_seconds=10, open_files=256)

_STOP_THEM = "shut the guest down, or stop the program that uses it, then run it again"
_CORRUPTIONS, _LEAKS, _NOT_CHECKABLE = 2, 3, 63


class _Said(BaseModel):
    """Something that qemu-img prints; newer versions may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=lambda name: name.replace("_", "-"))


class ImageInfo(_Said):
    """`qemu-img info`. Sizes in bytes; actual_size counts allocated blocks of the file."""

    format: str
    virtual_size: int
    actual_size: int
    cluster_size: int | None = None
    backing_filename: str | None = None
    backing_filename_format: str | None = None
    dirty_flag: bool = False


class MapEntry(_Said):
    """One run of `qemu-img map`. depth: 0 is the image itself; offset: in the file, None when not there."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None = None


class CheckResult(_Said):
    """`qemu-img check`. Counts of what it found; errors that kept it from checking are ToolFailed instead."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0

    @property
    def clean(self) -> bool:
        """Nothing to say, leaked clusters included."""
        return not (self.corruptions or self.leaks or self.check_errors)


class Preallocation(Enum):
    """How much of a new image is allocated when it is made."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Qcow2Options:
    """What a new qcow2 file is made with; None is qemu-img's own choice. cluster_size in bytes."""

    cluster_size: int | None = None
    compat: Literal["0.10", "1.1"] = "1.1"
    extended_l2: bool | None = None
    compression_type: Literal["zlib", "zstd"] | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    preallocation: Preallocation = Preallocation.OFF

    def argument(self) -> str:
        """As the value of `-o`."""
        flags = {True: "on", False: "off", None: None}
        named: dict[str, object] = {
            "cluster_size": self.cluster_size,
            "compat": self.compat,
            "extended_l2": flags[self.extended_l2],
            "compression_type": self.compression_type,
            "lazy_refcounts": flags[self.lazy_refcounts],
            "refcount_bits": self.refcount_bits,
            "preallocation": None if self.preallocation is Preallocation.OFF else self.preallocation.value,
        }
        return ",".join(f"{name}={value}" for name, value in named.items() if value is not None)


@dataclass(frozen=True, slots=True)
class BackingLink:
    """The backing file as an overlay's header records it. name: relative to the overlay's directory, or absolute."""

    name: str
    format: Format

    def argument(self) -> str:
        """The name in a form that QEMU takes for a path and not for a protocol or an option."""
        if "/" in self.name or not (":" in self.name or self.name.startswith("-")):
            return self.name
        return f"./{self.name}"


def info(path: Path, image_format: Format) -> ImageInfo:
    """What the header says; opens no backing file."""
    done = _qemu_img("info", "--output=json", "-f", image_format, _named(path), limits=_HEADER_LIMITS)
    return _parsed(TypeAdapter(ImageInfo), done)


def map_alone(path: Path, image_format: Format) -> list[MapEntry]:
    """What lies in this one file, its backing file left closed: absent runs are not `present`."""
    done = _qemu_img("map", "--output=json", *_alone(path, image_format))
    return _parsed(TypeAdapter(list[MapEntry]), done)


def map_chain(path: Path, image_format: Format) -> list[MapEntry]:
    """What a guest reads and which file of the chain gives it. Opens the whole chain."""
    done = _qemu_img("map", "--output=json", "-f", image_format, _named(path))
    return _parsed(TypeAdapter(list[MapEntry]), done)


def check(path: Path) -> CheckResult:
    """Whether a qcow2 file's tables and reference counts agree, its backing file left closed."""
    argv = ("check", "--output=json", *_alone(path, "qcow2"))
    done = _qemu_img(*argv, ok=(0, _CORRUPTIONS, _LEAKS, _NOT_CHECKABLE))
    if done.status == _NOT_CHECKABLE:
        raise Unsupported("this format has nothing to check", subject=path)
    return _parsed(TypeAdapter(CheckResult), done)


def compare(one: Path, other: Path, *, formats: tuple[Format, Format]) -> str | None:
    """None when two chains read the same and are of one size, else what qemu-img says of the difference.

    Not `-s`, which compares how zeroes are stored, too; a difference in size alone is a warning, which counts here.
    """
    argv = ("compare", "-f", formats[0], "-F", formats[1], _named(one), _named(other))
    done = _qemu_img(*argv, ok=(0, 1))
    text = done.stdout.decode("utf-8", "replace") + done.stderr
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if done.status == 0 and not any("mismatch" in line for line in lines):
        return None
    return " ".join(lines) or "they differ"


def create(path: Path, size: int, *, options: Qcow2Options, backing: BackingLink | None = None) -> None:
    """Make an empty qcow2 image of `size` guest bytes. Opens no backing file, so it need not exist yet."""
    link = ("-u", "-b", backing.argument(), "-F", backing.format) if backing else ()
    _qemu_img("create", "-q", "-f", "qcow2", *link, "-o", options.argument(), _named(path), str(size), writes=path)


def create_raw(path: Path, size: int) -> None:
    """Make an empty, sparse raw image."""
    _qemu_img("create", "-q", "-f", "raw", _named(path), str(size), writes=path)


def convert(
    source: Path,
    target: Path,
    *,
    formats: tuple[Format, Format],
    options: Qcow2Options | None = None,
    compressed: bool = False,
) -> None:
    """Copy what a guest reads from a chain into one new file without a backing file, written through to the disk.

    Never with a backing file for the target (`-B`): that copies the top layer alone, and says nothing.
    """
    extra = [*(("-o", options.argument()) if options else ()), *(("-c",) if compressed else ())]
    argv = ("convert", "-t", "writeback", "-f", formats[0], "-O", formats[1], *extra)
    _qemu_img(*argv, _named(source), _named(target), writes=target)


T = TypeVar("T")


def _qemu_img(
    *arguments: str,
    ok: tuple[int, ...] = (0,),
    limits: Limits | None = None,
    writes: Path | None = None,
) -> Completed:
    """writes: the file that it makes or changes; where its filesystem is full or read-only, that is the error."""
    try:
        return run(["qemu-img", *arguments], ok=ok, limits=limits or LIMITS)
    except ToolFailed as error:
        if "Failed to get" in error.stderr and "lock" in error.stderr:
            raise Busy("somebody has one of its files open", subject=arguments[-1], hint=_STOP_THEM) from error
        shortage = shortage_in(error.stderr)
        if shortage is not None and writes is not None:
            raise translated(shortage, writes.absolute().parent) from error
        raise


def _named(path: Path) -> str:
    text = str(path.absolute())
    if "\n" in text:
        raise InvalidInput("a file name with a line break is not handed to qemu-img", subject=repr(text))
    return text


def _alone(path: Path, image_format: Format) -> tuple[str, ...]:
    """The image as a node without its backing file (which only qcow2 can have)."""
    if image_format == "raw":
        return ("-f", "raw", _named(path))
    file = {"driver": "file", "filename": _named(path)}
    if path.is_block_device():
        file["driver"] = "host_device"
    return ("json:" + json.dumps({"driver": image_format, "backing": None, "file": file}),)


def _parsed(shape: TypeAdapter[T], done: Completed) -> T:
    try:
        return shape.validate_json(done.stdout)
    except ValidationError as error:
        what = f"printed something that is not understood: {error.errors()[0]['msg']}"
        raise ToolFailed(what, argv=done.argv, status=done.status, stderr=done.stderr, subject="qemu-img") from error
