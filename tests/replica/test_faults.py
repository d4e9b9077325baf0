"""A disk that fails, or is full, at any call of the receiver: what was there stays, and the next run gets through."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from snapchain.errors import Unavailable
from tests.exhaustive import EXHAUSTIVE
from tests.ops.faulty_calls import End, Fault, met
from tests.ops.stacks import Layer, build, clean, flat, same
from tests.replica.conftest import Place

MiB = 1 << 20


@pytest.mark.sampled
@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC])
def test_a_disk_that_fails_at_every_call(tmp_path: Path, fault: Fault) -> None:
    files = build(tmp_path / "chain", [Layer(MiB, [f"write -P {n + 1} {n * 64}k 256k"]) for n in range(2)])
    shown = [flat(path, tmp_path / f"{path.name}.flat") for path in files]
    before = Place(tmp_path / "before")
    before.send(files[0])
    place = Place(tmp_path / "replica")
    shutil.copytree(before.root, place.root)
    ends = []
    for where, end in met(lambda: place.send(files[1]), fault, each=8):
        ends.append((where, end))
        catalogue = place.catalogue()
        found = place.files()
        assert same(found[-1], shown[len(found) - 1]), where
        assert all(clean(file) for file in found), where
        assert catalogue["points"][0] == before.catalogue()["points"][0]
        place.send(files[1])
        place.check(shown[1])
        shutil.rmtree(place.root)
        shutil.copytree(before.root, place.root)
    refused = [where for where, end in ends if end is End.REFUSED]
    assert len(refused) >= (20 if EXHAUSTIVE else 3)
    if EXHAUSTIVE:
        assert {"rename", "fsync", "fchmod"} <= {where.split()[-1] for where in refused}, refused


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("file", ["catalogue.json", ".incoming.json", "disk.qcow2"])
def test_a_name_that_cannot_be_given(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, number: int
) -> None:
    """Of the catalogue, of the note about what arrives, of the layer: the next run does what is left."""
    files = build(tmp_path / "chain", [Layer(MiB, [f"write -P {n + 1} {n * 64}k 256k"]) for n in range(2)])
    place.send(files[0])
    before = place.catalogue()
    real = os.rename

    def fails(old: str, new: str, **places: int) -> None:
        if new == file:
            raise OSError(number, os.strerror(number))
        real(old, new, **places)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(Unavailable, match=rf"{re.escape(file)}: {os.strerror(number).lower()}"):
            place.send(files[1])
    assert place.catalogue() == before
    assert same(place.files()[-1], flat(files[0], tmp_path / "shown"))
    place.send(files[1])
    place.check(flat(files[1], tmp_path / "shown"))
