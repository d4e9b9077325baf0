"""A systemd service for a watch: started again when it ends, and its guest is thawed whatever ends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.destination.address import local_directory, located
from snapchain.guest.address import GuestAddress
from snapchain.ops.nightly.systemd import word


class Unit(BaseModel):
    """The file, and where it belongs."""

    model_config = ConfigDict(frozen=True)

    path: Path
    text: str


def unit(
    guest: GuestAddress, words: Sequence[str], *, program: Sequence[str], metrics: Path | None, dests: Sequence[str]
) -> Unit:
    """words: of the command line, the verb first; program: the command that is snapchain here.

    Paths on the command line have to be absolute. Raises Unsupported for text that a unit file cannot hold.
    """
    name = guest.domain or (guest.qmp.stem if guest.qmp is not None else "guest")
    plain = "".join(each if each.isascii() and (each.isalnum() or each in "._-") else "-" for each in name)
    return Unit(
        path=Path("/etc/systemd/system") / f"snapchain-watch-{plain}.service",
        text="\n".join(_lines(guest, name, words, program, metrics, dests)) + "\n",
    )


def _lines(
    guest: GuestAddress,
    name: str,
    words: Sequence[str],
    program: Sequence[str],
    metrics: Path | None,
    dests: Sequence[str],
) -> Iterator[str]:
    command = " ".join(word(each) for each in [*program, *words])
    after = "network-online.target" + (" libvirtd.service" if guest.domain is not None else "")
    yield from (
        "[Unit]",
        f"Description=snapchain: watch of guest {word(name)}",
        "Wants=network-online.target",
        f"After={after}",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={command}",
        "Restart=always",
        # Under a lease the guest stops when the watch is away for long.
        f"RestartSec={'1s' if '--lease' in ' '.join(words) else '30s'}",
        "# The process that thaws the guest outlives a watch that is killed. It ends by itself.",
        "KillMode=process",
        "OOMPolicy=continue",
        "TimeoutStopSec=5min",
        "Nice=10",
        "IOSchedulingClass=best-effort",
        "IOSchedulingPriority=7",
        "Environment=XDG_STATE_HOME=/var/lib XDG_CACHE_HOME=/var/cache",
        "StateDirectory=snapchain",
        "CacheDirectory=snapchain",
        "StateDirectoryMode=0700",
        "CacheDirectoryMode=0700",
        "UMask=0077",
        "LimitCORE=0",
        "# SNAPCHAIN_PASSWORD=... or the variables of an S3 client; mode 0600",
        "EnvironmentFile=-/etc/snapchain/watch.env",
        "",
        "# What it writes to. The directories of the guest's images have to be added here.",
        "ProtectSystem=full",
    )
    places = [place for each in dests if (place := local_directory(located(each))) is not None]
    places += [metrics.absolute().parent] if metrics is not None else []
    yield from (f"ReadWritePaths={word(f'-{place}')}" for place in dict.fromkeys(places))
    yield from ("NoNewPrivileges=yes", "ProtectKernelModules=yes", "ProtectClock=yes", "")
    yield from ("[Install]", "WantedBy=multi-user.target")
