"""What may stand in the configuration of a nightly run. Relative paths begin at the configuration's directory.

    time_zone = "Europe/Berlin"        [[disks]]                        [[destinations]]
    window = "22:00-06:00"             glob = "/images/*.qcow2"         name = "vault"
                                       name = "{stem}/vda"              url = "s3://bucket/prefix"
    [keep]                             merge_above = 8                  password_file = "/etc/snapchain/vault"
    daily = 14                         [[guests]]
                                       pattern = "web*"
                                       quiesce = "auto"

Every field is here, with its default; values.py has the ways in which values are written.
"""

from __future__ import annotations

from datetime import UTC, tzinfo
from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from snapchain.guest.snapshot import Quiesce
from snapchain.model.compression import Compression
from snapchain.model.points import check_label
from snapchain.model.retention import Policy
from snapchain.model.traffic import Prices
from snapchain.ops.nightly.values import Bytes, Seconds, Share, Window, check_guest_template, check_template
from snapchain.repository.format import MAX_PACK_BYTES, MIN_PACK_BYTES

Text = Annotated[str, Field(min_length=1)]
Argv = Annotated[tuple[Text, ...], Field(min_length=1)]
Label = Annotated[str, AfterValidator(check_label)]


def _window(value: object) -> object:
    return Window.parse(value) if isinstance(value, str) else value


def _zone(name: str) -> str:
    zone_of(name)
    return name


def zone_of(name: str) -> tzinfo:
    """The time zone of this name. Raises ValueError."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f'"{name}" is not a time zone of this machine, such as "Europe/Berlin" or "UTC"') from error


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Hooks(_Part):
    """Programs, each an argument list; no shell.

    before: first of all; after: last of all, whenever `before` was begun; on_failure: before `after`, when something
    failed; timeout: seconds for each; failing: whether a hook that fails is a failure or a note
    """

    before: Argv | None = None
    after: Argv | None = None
    on_failure: Argv | None = None
    timeout: Annotated[Seconds, Field(gt=0)] = 300.0
    failing: Literal["failure", "note"] = "failure"


class DiskHooks(Hooks):
    """Hooks around one disk. after_snapshot: as soon as the image may be written to again, snapshot made or not."""

    after_snapshot: Argv | None = None


class Disks(_Part):
    """One image (`path`), or all that a pattern finds (`glob`, less `exclude`; layers below others are left out).

    name: of the disk at the destinations, with {stem}, {name}, {parent} of the image's path and {host};
    snapshot: false ships the image as it is, which stays locked meanwhile; merge_above: local chains of more files
    have sealed layers merged, but for what `snapchain hold` holds; when_busy: whether an image that
    somebody has open is a failure, as any night without a new point is, or left out; destinations: names, or all
    """

    path: Path | None = None
    glob: Text | None = None
    exclude: tuple[Text, ...] = ()
    name: Annotated[str, AfterValidator(check_template)] = "{stem}"
    format: Literal["qcow2", "raw"] | None = None
    image_dirs: tuple[Path, ...] = ()
    labels: tuple[Label, ...] = ()
    snapshot: bool = True
    merge_above: Annotated[int, Field(ge=4, le=150)] | None = None
    when_busy: Literal["failure", "skip"] = "failure"
    destinations: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    hooks: DiskHooks = DiskHooks()

    @model_validator(mode="after")
    def _names_images(self) -> Self:
        if (self.path is None) == (self.glob is None):
            raise ValueError("name either one image (path) or a pattern (glob)")
        if self.exclude and self.glob is None:
            raise ValueError("exclude belongs to a glob")
        return self


class GuestHooks(Hooks):
    """Hooks around one guest. pre_freeze, post_thaw: right before its filesystems are frozen, and right after it."""

    pre_freeze: Argv | None = None
    post_thaw: Argv | None = None


class Guests(_Part):
    """One domain of libvirt (`domain`), all whose names a `pattern` matches (less `exclude`), or those whose monitors a
    path or a pattern finds (`qmp`). A guest that is off is taken as images at rest.

    connect: URI of libvirt; agent: socket of the guest agent, for one `qmp` whose monitor does not show it
    name: at the destinations, with {guest} and {host}; disks: only these, by name, exclude_disks: all but these
    quiesce: whether the guest agent freezes the filesystems; merge_above: local chains of more files have sealed layers
    merged, under the running guest, but for what `snapchain hold` holds; idle: slowly enough that it is not felt
    when_busy: whether a guest that somebody else is at work on is a failure, or left out; destinations: names, or all
    """

    domain: Text | None = None
    pattern: Text | None = None
    exclude: tuple[Text, ...] = ()
    qmp: Text | None = None
    connect: Text | None = None
    agent: Path | None = None
    name: Annotated[str, AfterValidator(check_guest_template)] = "{guest}"
    disks: tuple[Text, ...] = ()
    exclude_disks: tuple[Text, ...] = ()
    image_dirs: tuple[Path, ...] = ()
    labels: tuple[Label, ...] = ()
    quiesce: Quiesce = Quiesce.AUTO
    merge_above: Annotated[int, Field(ge=4, le=150)] | None = None
    idle: bool = False
    when_busy: Literal["failure", "skip"] = "failure"
    destinations: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    hooks: GuestHooks = GuestHooks()

    @model_validator(mode="after")
    def _names_guests(self) -> Self:
        if sum(each is not None for each in (self.domain, self.pattern, self.qmp)) != 1:
            raise ValueError("name either one domain, a pattern of domains, or a monitor's socket (qmp)")
        if self.exclude and self.domain is not None:
            raise ValueError("exclude belongs to a pattern")
        if self.connect is not None and self.qmp is not None:
            raise ValueError("connect belongs to domains of libvirt, and this guest has a monitor of its own (qmp)")
        if self.agent is not None and self.qmp is None:
            raise ValueError("agent belongs to qmp: libvirt has the agent of its domains")
        if self.disks and self.exclude_disks:
            raise ValueError("name either the disks, or those to exclude")
        return self


class Verify(_Part):
    """A sample each night. disks: how many, by turns; share: of their data; records are checked in any case."""

    disks: Annotated[int, Field(ge=1)] = 1
    share: Annotated[Share, Field(ge=0, le=1)] = 0.05


class BootTests(_Part):
    """Clones that boot last of all, each night those of other guests. directory: in which their disks are restored

    guests: how many, by turns, besides those whose last clone did not boot; destinations: names, or all that have them
    check: a program that has to succeed, instead of waiting for the guest agent; console_says: text that the clone has
    to write to its first serial port, instead of both; timeout: seconds for a boot
    full_restore: restore the disks of clones, although they could be served
    time: until no further one is begun, and what is being restored is given up; space: most bytes that a clone's disks
    may take, by default half of what is free there; connect: URI of the libvirt that starts clones of domains
    """

    directory: Path
    guests: Annotated[int, Field(ge=1)] = 1
    destinations: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    check: Argv | None = None
    console_says: Text | None = None
    full_restore: bool = False
    timeout: Annotated[Seconds, Field(gt=0)] = 300.0
    time: Annotated[Seconds, Field(gt=0)] = 3600.0
    space: Annotated[Bytes, Field(gt=0)] | None = None
    connect: Text | None = None


class Destination(_Part):
    """A repository or a replica. A repository's passphrase comes from a file, a program or a variable, by default
    SNAPCHAIN_PASSWORD.

    copy_of: name of another destination: nothing is shipped here, but what is there is copied after all shipments
    pack_size: largest object in bytes, instead of the repository's own limit; compression: of what is written to a
    repository; concurrency: disks that ship to it at
    once; keep: instead of the common one; gc: only where the destination needs collecting
    prices: of an S3 server, for the cost of a run
    """

    name: Text
    url: Text
    copy_of: Text | None = None
    password_file: Path | None = None
    password_command: Argv | None = None
    password_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    limit_rate: Annotated[Bytes, Field(gt=0)] | None = None
    pack_size: Annotated[Bytes, Field(ge=MIN_PACK_BYTES, le=MAX_PACK_BYTES)] | None = None
    compression: Compression | None = None
    prices: Prices | None = None
    concurrency: Annotated[int, Field(ge=1, le=16)] = 1
    keep: Policy | None = None
    gc: bool = True
    verify: Verify | None = Verify()

    @model_validator(mode="after")
    def _one_passphrase(self) -> Self:
        if sum(each is not None for each in (self.password_file, self.password_command, self.password_env)) > 1:
            raise ValueError("name one source of the passphrase: password_file, password_command or password_env")
        return self


class Budget(_Part):
    """What one run may use.

    ship: guest bytes read to be shipped; merge: bytes that local merges move; time: until nothing new is begun
    """

    ship: Annotated[Bytes, Field(gt=0)] | None = None
    merge: Annotated[Bytes, Field(gt=0)] | None = None
    time: Annotated[Seconds, Field(gt=0)] | None = None


class Nightly(_Part):
    """The whole.

    name: of metrics and messages, by default the file's; concurrency: disks and guests at work at once
    retired: patterns of the names of disks and guests that may be gone: any other that was shipped once and is not
    there any more is a failure
    """

    time_zone: Annotated[str, AfterValidator(_zone)]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "nightly"
    window: Annotated[Window, BeforeValidator(_window), PlainSerializer(str)] | None = None
    concurrency: Annotated[int, Field(ge=1, le=64)] = 1
    state: Path | None = None
    metrics: Path | None = None
    retired: tuple[Text, ...] = ()
    budget: Budget = Budget()
    keep: Policy = Policy()
    hooks: Hooks = Hooks()
    test: BootTests | None = None
    disks: tuple[Disks, ...] = ()
    guests: tuple[Guests, ...] = ()
    destinations: Annotated[tuple[Destination, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_work(self) -> Self:
        if not self.disks and not self.guests:
            raise ValueError("there is nothing to do: name [[disks]] or [[guests]]")
        return self

    @property
    def zone(self) -> tzinfo:
        """Whose wall clock the window and the calendar rules go by."""
        return zone_of(self.time_zone)

    def destinations_of(self, settings: Disks | Guests) -> tuple[Destination, ...]:
        """Where these disks or guests are shipped to."""
        wanted = settings.destinations
        return tuple(
            each for each in self.destinations if each.copy_of is None and (wanted is None or each.name in wanted)
        )

    def copies_of(self, settings: Disks | Guests) -> tuple[Destination, ...]:
        """Where they are copied to afterwards."""
        names = {each.name for each in self.destinations_of(settings)}
        return tuple(each for each in self.destinations if each.copy_of in names)

    def keep_of(self, destination: Destination) -> Policy:
        """The rules of a destination: its own or the common ones."""
        return self.keep if destination.keep is None else destination.keep
