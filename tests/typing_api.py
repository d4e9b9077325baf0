"""The types that a user of the public API sees. Nothing here runs: mypy reads it (`make check`)."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import snapchain
from snapchain import Destination, Event, Policy, SnapchainError


def hear(event: Event) -> None:
    print(event)


def nightly(image: str | Path, url: str | Path) -> int:
    backup = snapchain.open_destination(url, passphrase="secret", writing=True)
    assert_type(backup, Destination)
    try:
        shipped = snapchain.ship(image, backup, "web1/vda", labels=["nightly"], on_event=hear)
    except snapchain.errors.Busy as error:
        assert_type(error.hint, str | None)
        raise
    assert_type(shipped.point, int | None)
    assert_type(shipped.bytes_stored, int)
    assert_type(shipped.content_id, str)
    merged = snapchain.merge_points(backup, "web1/vda", Policy(daily=7, labels=frozenset({"golden"})))
    assert_type(merged.points_kept, tuple[int, ...])
    for disk in snapchain.log(backup).disks:
        assert_type(disk.name, str)
        assert_type(disk.points[0].virtual_size, int)
    assert_type(snapchain.verify(backup, share=0.05).ok, bool)
    return shipped.point or 0


def images(path: Path) -> None:
    snapchain.snapshot(path, labels=("before-upgrade",), overlay="overlay.qcow2")
    with snapchain.open_image(path, format="raw", image_dirs=["/images"]) as chain:
        assert_type(chain.size, int)
    assert_type(snapchain.inspect(str(path)).layers[0].shadowed_bytes, int)
    assert_type(snapchain.merge_image(path, policy=Policy(last=7), budget_bytes=20 << 30).layers_after, int)
    assert_type(snapchain.restore(path, "web1", "web1.raw", point=7, format="raw").content_id, str)
    made = snapchain.create_repository(path, passphrase=lambda: "secret", encryption="chacha20-poly1305")
    assert_type(made.repository, str)
    assert_type(snapchain.__version__, str)


def mistakes(path: Path) -> None:
    _ = snapchain.Polcy  # type: ignore[attr-defined]
    snapchain.ship(path, path, "web1", label=["x"])  # type: ignore[call-arg]
    snapchain.open_image(path, format="vmdk")  # type: ignore[arg-type]
    snapchain.restore(path, "web1", 7)  # type: ignore[arg-type]
    snapchain.create_repository(path, encryption="rot13")  # type: ignore[arg-type]
    assert issubclass(SnapchainError, Exception)
