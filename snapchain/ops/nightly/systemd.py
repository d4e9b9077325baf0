"""A systemd service and its timer for a configuration, hardened as far as its paths and its hooks allow.

The service runs as root: images belong to the users that guests run as, and a merged file takes their owner over.
What root may do is cut down to that.  See systemd.exec(5), systemd.timer(5).

Passphrases come as credentials: systemd reads their files before the service starts, and keeps them in memory that is
not swapped. `SetCredential` is there for a file that is missing: without it the service would not start, and the
other destinations would have no night either.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.destination.address import local_directory
from snapchain.destinations import traits_of
from snapchain.errors import Unsupported
from snapchain.host.path_resolution import real_path
from snapchain.host.terminal import printable
from snapchain.ops.nightly.config import Hooks, Nightly

_STATE, _CACHE = "/var/lib", "/var/cache"
_DEFAULT_START = "02:00"

_S3_VARIABLES = (
    "# AWS_ACCESS_KEY_ID=..., AWS_SECRET_ACCESS_KEY=..., and where it is not Amazon's AWS_ENDPOINT_URL_S3=https://...;",
    "# or AWS_SHARED_CREDENTIALS_FILE=/root/.aws/credentials: a service has no HOME in which to look. Mode 0600",
)
_GUESTS = (
    "# Of guests: a new active layer is made beside each image. Name their directories in image_dirs of [[guests]].",
)
# Files of any owner are read, replaced and given their owner back; a directory that others may write to is used with
# their rights; processes of others show whether they have an image open.
_CAPABILITIES = "CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_SETGID CAP_SETUID CAP_SYS_PTRACE"
_LIBVIRT_IMAGES = (Path("/var/lib/libvirt/images"),)
"""Where libvirt keeps images unless told otherwise: the directories of a guest's images are known to libvirt alone."""
_MEMORY_GIB = 1
"""For each disk at work, and as much again. The page cache counts, too, and gives way."""
_TASKS = 128
"""As with the memory: threads of the transfers, and qemu-img's."""
# What a credential may be called without a thought about quoting; it is a file's name, too.
_CREDENTIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class Units(BaseModel):
    """Both files, and where they belong."""

    model_config = ConfigDict(frozen=True)

    service_path: Path
    service: str
    timer_path: Path
    timer: str


def units(config: Nightly, path: Path, *, program: Sequence[str]) -> Units:
    """For the configuration in the file `path`. program: the command that is snapchain here."""
    name = f"snapchain-{config.name}"
    directory = Path("/etc/systemd/system")
    return Units(
        service_path=directory / f"{name}.service",
        service="\n".join(_service(config, path.absolute(), program)) + "\n",
        timer_path=directory / f"{name}.timer",
        timer="\n".join(_timer(config, name)) + "\n",
    )


def _service(config: Nightly, path: Path, program: Sequence[str]) -> Iterator[str]:
    command = " ".join(word(each) for each in [*program, "nightly", str(path)])
    yield from (
        "[Unit]",
        f"Description=snapchain: nightly run of {_plain(str(path))}",
        "Documentation=man:systemd.exec(5)",
        "Wants=network-online.target",
        "After=network-online.target",
        "",
        "[Service]",
        "Type=oneshot",
        f"ExecStart={command}",
        "# A window ends a run, not a time-out. SIGTERM ends what was begun in good order, and the after hooks run.",
        "TimeoutStartSec=infinity",
        "TimeoutStopSec=15min",
        *(
            [
                "# Not mixed: the process that thaws a guest outlives a run that is killed. It ends by itself.",
                "KillMode=process",
                "OOMPolicy=continue",
            ]
            if config.guests
            else ["KillMode=mixed"]
        ),
        "Nice=10",
        "IOSchedulingClass=best-effort",
        "IOSchedulingPriority=7",
        f"Environment=XDG_STATE_HOME={_STATE} XDG_CACHE_HOME={_CACHE}",
        "StateDirectory=snapchain",
        "CacheDirectory=snapchain",
        "StateDirectoryMode=0700",
        "CacheDirectoryMode=0700",
        "UMask=0077",
        "LimitCORE=0",
        f"MemoryMax={_MEMORY_GIB * (1 + config.concurrency)}G",
        f"TasksMax={_TASKS * (1 + config.concurrency)}",
        *_credentials(config),
    )
    told = [
        *(
            ["# SNAPCHAIN_PASSWORD=... or the variables of password_env, for what has no credential; mode 0600"]
            if _asks_environment(config)
            else []
        ),
        *(_S3_VARIABLES if any(each.url.lower().startswith("s3://") for each in config.destinations) else []),
    ]
    if told:
        yield from told
        yield f"EnvironmentFile=-/etc/snapchain/{config.name}.env"
    yield from (
        "",
        "# What it writes to: images, local repositories, metrics. A new image directory has to be added here.",
        "ProtectSystem=strict",
        "# One that is not there (a disk that is not mounted) is told by the run, which a failed start would not do.",
        *(f"ReadWritePaths={word(f'-{place}')}" for place in _writable(config)),
        *(_GUESTS if config.guests else []),
        # A monitor's socket below /tmp would be hidden.
        f"PrivateTmp={'no' if any((each.qmp or '').startswith('/tmp/') for each in config.guests) else 'yes'}",  # noqa: S108
        "PrivateMounts=yes",
        "ProtectHome=read-only",
        *_devices(config),
        "# Only processes that it may trace, so for root all: each run looks for programs that have an image open. Not",
        "# ProcSubset=pid: the host's boot id and limits are files beside the processes.",
        "ProtectProc=invisible",
        "",
        f"CapabilityBoundingSet={_CAPABILITIES}",
        "NoNewPrivileges=yes",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectControlGroups=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallErrorNumber=EPERM",
    )
    if _hooks(config):
        yield "# The hooks live under these limits, too: what they need beyond them has to be allowed here."


def _credentials(config: Nightly) -> Iterator[str]:
    """For each destination whose passphrase is in a file, or not told to be anywhere."""
    for each in config.destinations:
        named_elsewhere = each.password_command is not None or each.password_env is not None
        if traits_of(each.url).encrypts and not named_elsewhere and _CREDENTIAL.fullmatch(each.name):
            path = each.password_file or Path("/etc/snapchain") / f"{config.name}-{each.name}.secret"
            yield f"LoadCredential={each.name}:{_path(path)}"
            yield f"SetCredential={each.name}:\\n"


def _devices(config: Nightly) -> Iterator[str]:
    """/dev without disks, unless one of the images is a block device."""
    if any(place.is_relative_to("/dev") for place in _writable(config)):
        yield "# Images are block devices. They are read, and never written to."
        yield "DevicePolicy=closed"
        yield "DeviceAllow=block-* r"
    else:
        yield "# Where an image or a backing file is a block device: DevicePolicy=closed, DeviceAllow=block-* r."
        yield "PrivateDevices=yes"


def _asks_environment(config: Nightly) -> bool:
    return any(
        traits_of(each.url).encrypts and each.password_file is None and each.password_command is None
        for each in config.destinations
    )


def _timer(config: Nightly, name: str) -> Iterator[str]:
    start = f"{config.window.start:%H:%M}" if config.window is not None else _DEFAULT_START
    yield from (
        "[Unit]",
        f"Description=snapchain: every night, {name}.service",
        "",
        "[Timer]",
        f"OnCalendar=*-*-* {start}:00 {config.time_zone}",
        "# A night that the machine slept through is made up for; outside of its window the run only says so.",
        "Persistent=yes",
        "AccuracySec=1min",
        "",
        "[Install]",
        "WantedBy=timers.target",
    )


def _writable(config: Nightly) -> list[Path]:
    """Directories that a run writes to, without those that lie below another one."""
    wanted: set[Path] = set()
    for disks in config.disks:
        images = [disks.path] if disks.path is not None else [Path(_fixed(disks.glob or ""))]
        # Sealed files lie beside the file behind a link.
        wanted.update(place for image in images for place in {image.parent, real_path(image).parent})
        wanted.update(disks.image_dirs)
    for guests in config.guests:
        wanted.update(guests.image_dirs or _LIBVIRT_IMAGES)
    if config.test is not None:
        wanted.add(config.test.directory)
    wanted.update(place for each in config.destinations if (place := local_directory(each.url)) is not None)
    wanted.update(
        place.parent if place == config.metrics else place for place in (config.metrics, config.state) if place
    )
    return sorted(each for each in wanted if not any(other in each.parents for other in wanted))


def _fixed(pattern: str) -> str:
    """The part of a pattern before its first wild card, down to a directory, with a name put after it."""
    parts = Path(pattern).parts
    count = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return str(Path(*parts[:count], "x"))


def _hooks(config: Nightly) -> bool:
    every: list[Hooks] = [config.hooks, *(each.hooks for each in config.disks), *(each.hooks for each in config.guests)]
    return any(hooks.before or hooks.after or hooks.on_failure for hooks in every)


def word(text: str) -> str:
    """One word of a directive: systemd.syntax(7) and its specifiers."""
    plain = _checked(text).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{plain}"' if plain != text or not text.isascii() or set(text) & set(" \t'#;") else text


def _path(path: Path) -> str:
    """The rest of a directive: taken as it stands, but for specifiers."""
    return _plain(str(path))


def _plain(text: str) -> str:
    return _checked(text).replace("%", "%%")


def _checked(text: str) -> str:
    """Raises Unsupported for what would end the line of a directive, or not show what it says."""
    if printable(text) != text:
        raise Unsupported("a path with control characters cannot stand in a unit file", subject=text)
    return text
