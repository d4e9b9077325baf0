"""What survives a power loss at a replica: nothing is acknowledged or named before what it rests on was flushed."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from snapchain.host.temporary_names import temporary_of
from snapchain.model.content import empty_sum
from snapchain.replica.arrival import Durability
from snapchain.replica.handover import make_active
from snapchain.replica.store import Work, open_replica
from snapchain.replica.stream.messages import Active
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build
from tests.replica.conftest import DISK, Place


class Steps(list[str]):
    """`fsync NAME`, `rename A B`, `link A B`, `unlink NAME` in one directory (`.` for itself), and further notes."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        patch.setattr(os, "fsync", self._noting("fsync", os.fsync))
        patch.setattr(os, "rename", self._noting("rename", os.rename))
        patch.setattr(os, "link", self._noting("link", os.link))
        patch.setattr(os, "unlink", self._noting("unlink", os.unlink))

    def _noting(self, verb: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            done = real(*arguments, **named)
            where = next((fd for name, fd in named.items() if name.endswith("dir_fd")), None)
            within = Path() if where is None else Path(f"/proc/self/fd/{where}").readlink()
            paths = [
                Path(f"/proc/self/fd/{each}").readlink() if isinstance(each, int) else within / each
                for each in arguments
            ]
            if paths[0] == self._directory or paths[0].parent == self._directory:
                self.append(" ".join([verb, *map(self._name, paths)]))
            return done

        return call

    def _name(self, path: Path) -> str:
        if path == self._directory:
            return "."
        begun = temporary_of(path)
        return f"{begun.target.name}-tmp" if begun else path.name


def record(name: str) -> list[str]:
    """A record replaced."""
    return [f"fsync {name}-tmp", f"rename {name}-tmp {name}", "fsync ."]


def test_a_mark_is_acknowledged_when_its_data_and_its_record_are_on_the_disk(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = open_replica(place.root, make=True).disk(DISK)
    with disk.locked(make=True, work=Work.TRANSFER):
        (place.directory / ".incoming.qcow2").write_bytes(b"data")
        steps = Steps(place.directory, monkeypatch)
        durability = Durability(
            disk,
            "0" * 32,
            lambda count: steps.append(f"acknowledged {count}"),
            look_back=lambda offset: steps.append(f"read back to {offset}"),
        )
        durability.mark(65536, empty_sum(), 1)
        durability.close()
    assert steps == [
        "fsync .incoming.qcow2",
        *record(".incoming.json"),
        "acknowledged 1",
        "read back to 65536",
    ]


def test_a_layer_gets_its_name_when_its_bytes_and_its_record_are_on_the_disk(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])], names=["a.qcow2"])
    steps = Steps(place.directory, monkeypatch)
    place.send(image)
    found = [step for step, _ in groupby(steps)]
    assert found[found.index("fsync .incoming.qcow2") :] == [
        "fsync .incoming.qcow2",
        *record(".incoming.json"),
        "rename .incoming.qcow2 a.qcow2",
        "fsync .",
        *record("catalogue.json"),  # the layer
        "unlink .incoming.json",
        "fsync .",
        *record("catalogue.json"),  # the point
    ]


def test_an_overlay_gets_its_name_when_it_is_on_the_disk(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])], names=["a.qcow2"])
    place.send(image)
    disk = open_replica(place.root).disk(DISK)
    catalogue = disk.read()
    assert catalogue is not None
    asked = Active(
        name="vda.qcow2",
        size=MiB,
        cluster_size=65536,
        extended_l2=False,
        on=catalogue.layers[-1].id,
        make=True,
        prove=False,
    )
    steps = Steps(place.directory / "active", monkeypatch)
    with disk.locked(make=False, work=Work.TRANSFER):
        make_active(disk, catalogue, asked)
    assert steps == ["fsync vda.qcow2-tmp", "link vda.qcow2-tmp vda.qcow2", "unlink vda.qcow2-tmp", "fsync ."]
