"""kill -9 of a real transfer at every system call that changes a file; run as a program, as tests/ops/kill_nine.py.

    python -m tests.replica.kill_nine DIRECTORY

Sender and receiver are threads of one process, so both die at once.  After each death what was there before is whole,
and the next run finishes.  The last line says how often it died.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.ops.kill_nine import deaths
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, clean, flat, same
from tests.replica.conftest import Place


def main(directory: Path) -> int:
    files = build(directory / "chain", [Layer(MiB, [f"write -P {n + 1} {n * 64}k 256k"]) for n in range(2)])
    shown = [flat(path, directory / f"{path.name}.flat") for path in files]
    before = Place(directory / "before")
    before.send(files[0])
    place = Place(directory / "replica")

    def reset() -> None:
        shutil.rmtree(place.root, ignore_errors=True)
        shutil.copytree(before.root, place.root)

    def check(number: int) -> None:
        found = place.files()
        assert [path.name for path in found] == [path.name for path in files[: number + 1]]
        assert same(found[-1], shown[number])
        assert all(clean(path) for path in found)

    reset()
    died = 0
    for died in deaths(lambda: place.send(files[1]), reset):  # noqa: B007 -- counted
        layers = len(place.catalogue()["layers"])
        check(layers - 1)
        place.send(files[1])
        check(1)
        assert not list(place.directory.glob(".incoming.qcow2"))
        reset()
    return died


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
