"""Random histories of a disk: it grows overlays, is merged, is sent, and transfers of it are cut; QEMU is the judge.

    python -m tests.replica.histories FIRST COUNT

Everything that a chain may be made of comes: clusters of all sizes, subclusters, compression, old headers, raw roots,
internal snapshots, bitmaps, sizes of odd sectors that grow and shrink, files in other directories.  After each send
every point of the replica is compared with what the disk showed at that moment, and every file is checked.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from snapchain.errors import Diverged, SnapchainError, Unavailable
from snapchain.host.channel import Channel
from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.request import MergeRequest
from snapchain.model.content import LEAF_BYTES, content_id, leaf_hash, sum_of
from snapchain.model.merging import Strategy
from snapchain.model.retention import Policy
from snapchain.ops.receive import receive_stream
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship.run import Files, ShipRequest, send_blindly
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.points_merge import ReplicaMerge
from tests.memory import scratch
from tests.ops.stacks import clean, flat, qemu_img, same, write
from tests.replica.conftest import DISK, BentEndpoint, Place, send
from tests.replica.merging import endpoint

KiB = 1 << 10
MiB = 1 << 20
LARGEST = 5 * MiB
SHM = scratch()


class History:
    """One disk and its replica. done: what happened, for who reads of a failure."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.draw = random.Random(seed)
        self.directory = directory
        self.images = [directory / "images", directory / "images, other"]
        for place in self.images:
            place.mkdir()
        self.place = Place(directory / "replica")
        self.chain: list[tuple[Path, str]] = []
        self.size = self.draw.randrange(1, LARGEST // 512) * 512
        self.points: dict[int, Path] = {}
        self.files = self.draw.choice([Files.COMPOSED, Files.COMPOSED, Files.EACH])
        self.done: list[str] = []
        self.happened: Counter[str] = Counter()
        self._number = 0

    @property
    def top(self) -> Path:
        return self.chain[-1][0]

    def run(self) -> None:
        """Some five steps, each judged."""
        self.begin()
        for _ in range(self.draw.randrange(2, 6)):
            for _ in range(self.draw.choice([1, 1, 2, 3])):
                self.overlay()
            if self.draw.random() < 0.35:
                self.merge()
            if self.draw.random() < 0.35:
                self.send_cut()
            self.send()
            self.judge()
            if self.draw.random() < 0.3:
                self.merge_there()
                self.judge()
            self.restore()
        self.send_again()
        self.save_and_receive()

    def begin(self) -> None:
        kind = self.draw.choice(["plain", "plain", "raw", "compressed"])
        if kind == "plain":
            self.overlay()
            return
        raw = self.images[0] / "root.raw"
        size = self.size - self.draw.choice([0, 1, 100])
        with raw.open("wb") as file:
            file.truncate(size)
            file.seek(size // 3)
            file.write(self.draw.randbytes(min(300 * KiB, size - size // 3)))
        self.chain = [(raw, "raw")]
        if kind == "compressed":
            path = raw.with_suffix(".qcow2")
            squeeze = self.draw.choice(["zlib", "zstd"])
            bits = self.draw.choice([9, 12, 16, 21])
            options = f"cluster_size={1 << bits},compression_type={squeeze}"
            qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
            self.chain = [(path, "qcow2")]
        self.note(f"{kind} root of {size}")

    def overlay(self) -> None:
        """A new top, as a snapshot makes it, and what a guest writes into it."""
        draw = self.draw
        self._number += 1
        path = draw.choice([self.images[0], self.images[0], self.images[1]]) / f"layer {self._number}.qcow2"
        cluster = 1 << draw.choice([9, 10, 12, 14, 16, 16, 16, 18, 21])
        options = {"cluster_size": str(cluster)}
        few = False
        if draw.random() < 0.2:
            options["compat"] = "0.10"
        else:
            bits = draw.choice([1, 2, 8, 16, 16, 32, 64])
            few = bits < 8
            options |= {"refcount_bits": str(bits), "lazy_refcounts": draw.choice(["on", "off"])}
            options["compression_type"] = draw.choice(["zlib", "zstd"])
            if cluster >= 16 * KiB and draw.random() < 0.4:
                options["extended_l2"] = "on"
        if self.chain and draw.random() < 0.3:
            self.size = max(512, self.size + draw.choice([-1, 1]) * draw.choice([512, 7 * 512, 64 * KiB, MiB]))
        link: list[str | Path] = []
        if self.chain:
            below, kind = self.chain[-1]
            named = str(below) if draw.random() < 0.4 else os.path.relpath(below, path.parent)
            link = ["-b", named, "-F", kind]
        given = ",".join(f"{name}={value}" for name, value in options.items())
        qemu_img("create", "-q", "-f", "qcow2", "-o", given, *link, path, str(self.size))
        self.chain.append((path, "qcow2"))
        self.note(f"{path.name}: {self.size} bytes, {given}, {link[1:2]}")
        if not few and draw.random() < 0.3:
            self.squeezed(path, cluster)
        self.guest(path, cluster)
        if not few and draw.random() < 0.15:
            qemu_img("snapshot", "-c", "inside", path)
            self.guest(path, cluster)
        if "compat" not in options and draw.random() < 0.15:
            qemu_img("bitmap", "-f", "qcow2", "--add", path, "dirty0")

    def squeezed(self, path: Path, cluster: int) -> None:
        """Whole compressed clusters, in a session of their own, for QEMU 7.2's sake."""
        room = self.size // cluster
        chosen = self.draw.sample(range(room), min(room, 5))
        self.io(path, [f"write -c -P {100 + number % 100} {number * cluster} {cluster}" for number in chosen])

    def guest(self, path: Path, cluster: int) -> None:
        """Writes of patterns and of noise, zeroes, discards, and the same bytes again."""
        noise = self.directory / "noise"
        noise.write_bytes(self.draw.randbytes(256 * KiB))
        commands = []
        for number in range(self.draw.randrange(7)):
            grain = self.draw.choice([512, 4096, cluster])
            start = self.draw.randrange(self.size) // grain * grain
            length = min(self.size - start, self.draw.choice([512, 5120, cluster, 3 * cluster + 1024, 256 * KiB, MiB]))
            verb = self.draw.choice(
                [f"write -P {number + 1}", "write -P 1", "noise", "write -z", "write -z -u", "discard"]
            )
            if verb == "noise":
                verb, length = f"write -s {noise}", min(length, 256 * KiB)
            commands.append(f"{verb} {start} {length}")
        self.io(path, commands)

    def io(self, path: Path, commands: list[str]) -> None:
        if commands:
            self.note(f"  {commands}")
            write(path, *commands)

    def merge(self) -> None:
        """Some neighbours become one file here, which the replica will know by what it shows."""
        if len(self.chain) < 2:
            return
        last = self.draw.randrange(1, len(self.chain))
        first = self.draw.randrange(last)
        way = self.draw.choice([Strategy.NEW, Strategy.NEW, Strategy.ABSORB])
        paths = [path for path, _ in self.chain]
        try:
            plan = merge_plan.plan_step(
                MergeRequest(
                    image=self.top,
                    from_layer=str(paths[first]),
                    to_layer=str(paths[last]),
                    strategy=way,
                    image_format="qcow2",
                    image_dirs=self.images,
                    drop_bitmaps=True,
                )
            )
        except SnapchainError as refused:
            self.note(f"merge {first} to {last} is refused: {refused}")
            return
        report = merge_run.run_step(plan)
        self.note(f"merged {first} to {last} by {report.strategy.value}")
        self.happened["merged"] += 1
        self.chain[first : last + 1] = [self.chain[last]]

    def merge_there(self) -> None:
        """The replica keeps some of its points, the newest among them, and its files become fewer."""
        keep = self.draw.choice([1, 1, 2, 3])
        report = ReplicaMerge(endpoint(self.place.root), DISK, Policy(last=keep), zone="UTC").run()
        self.note(f"kept {keep} points there: {report.layers_before} layers became {report.layers_after}")
        self.happened["merged there"] += report.layers_after < report.layers_before
        self.published(None)

    def restore(self) -> None:
        """A point comes back as it was."""
        known = {point["point"]: point for point in self.place.catalogue()["points"]}
        number = self.draw.choice(sorted(set(known) & set(self.points)) or [0])
        if number:
            out = self.directory / self.draw.choice(["restored.raw", "restored.qcow2"])
            Restoration(ReplicaDestination(endpoint(self.place.root)), DISK, out, point=str(number)).run()
            assert same(out, self.points[number], image_format=out.suffix[1:])
            out.unlink()
            self.happened["restored"] += 1

    def request(self) -> dict[str, object]:
        return {"files": self.files, "image_dirs": self.images, "format": self.chain[-1][1]}

    def send_cut(self) -> None:
        """A transfer that is cut at some byte, in one direction or the other."""
        at = int(self.draw.choice([2e3, 2e4, 3e5, 3e6]) * self.draw.random())

        def cut(place: int, data: bytes) -> bytes | None:
            return None if place + len(data) > at else data

        bent = BentEndpoint(self.place, there=cut) if self.draw.random() < 0.8 else BentEndpoint(self.place, back=cut)
        try:
            report = send(self.top, bent, DISK, **self.request())
        except Unavailable as lost:
            self.note(f"cut at {at}: {lost}")
            self.happened["cut"] += 1
            if (self.place.directory / "catalogue.json").exists():
                self.judge()
        except Diverged as apart:
            self.diverged(apart)
        else:
            self.note(f"cut at {at}, but it was through")
            self.published(report.point)

    def send(self) -> None:
        try:
            report = self.place.send(self.top, **self.request())
        except Diverged as apart:
            self.diverged(apart)
            return
        self.happened["resumed"] += report.resumed
        self.note(f"sent as {report.point}: {report.layers_sent} layers, {report.layers_present} known")
        self.published(report.point)

    def diverged(self, apart: Diverged) -> None:
        """A merge over the newest layer there leaves no view that both sides have had: the user decides."""
        self.note(f"diverged: {apart}")
        self.happened["diverged"] += 1
        report = self.place.send(self.top, divergence=self._cut, **self.request())
        self.published(report.point)

    @property
    def _cut(self) -> object:
        from snapchain.ops.ship.run import Divergence

        return Divergence.CUT_REPLICA

    def published(self, point: int | None) -> None:
        known = {each["point"] for each in self.place.catalogue()["points"]}
        self.points = {number: shown for number, shown in self.points.items() if number in known}
        if point is not None:
            self.points[point] = flat(self.top, self.directory / f"point {point}", self.chain[-1][1])

    def judge(self) -> None:
        """Each point reads as the disk did, each file is clean."""
        catalogue = self.place.catalogue()
        files = {layer["id"]: self.place.directory / layer["file"] for layer in catalogue["layers"]}
        for file in files.values():
            assert clean(file), file
        for point in catalogue["points"]:
            # The answer that tells of a point may have been cut off.
            if shown := self.points.get(point["point"]):
                assert same(files[point["layer"]], shown), point["point"]
                assert point["content_id"] == content_of(shown), point["point"]
                self.happened["points"] += 1

    def send_again(self) -> None:
        """Nothing is left to send."""
        report = self.place.send(self.top, **self.request())
        assert report.layers_sent == 0
        assert report.bytes_sent < 10_000

    def save_and_receive(self) -> None:
        """As a stream in a file, received by a second replica, twice."""
        saved = self.directory / "saved"
        fd = os.open(saved, os.O_WRONLY | os.O_CREAT)
        send_blindly(ShipRequest(image=self.top, disk=DISK, **self.request()), Channel(-1, fd, peer="a file"))  # type: ignore[arg-type]
        second = Place(self.directory / "second")
        for _ in range(2):
            with Channel(os.open(saved, os.O_RDONLY), -1, peer="a file") as channel:
                receive_stream(channel, second.root)
        shown = flat(self.top, self.directory / "shown", self.chain[-1][1])
        second.check(shown)

    def note(self, what: str) -> None:
        self.done.append(what)


def content_of(raw: Path) -> str:
    """The content id of what a raw file holds, counted leaf by leaf from nothing."""
    data = raw.read_bytes()
    leaves = [data[at : at + LEAF_BYTES].ljust(LEAF_BYTES, b"\0") for at in range(0, len(data), LEAF_BYTES)]
    places = [place for place, leaf in enumerate(leaves) if any(leaf)]
    hashes = b"".join(leaf_hash(leaves[place]) for place in places)
    total = sum_of(np.array(places, np.int64), np.frombuffer(hashes, np.uint8).reshape(-1, 32))
    return content_id(len(data), total)


def live(seed: int) -> Counter[str]:
    """One history from beginning to end. Raises what is wrong with it, with the whole story."""
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        history = History(seed, Path(name))
        try:
            history.run()
        except BaseException as error:
            story = "\n".join(history.done)
            raise AssertionError(f"history {seed}: {error!r}\n{story}") from error
        return history.happened


if __name__ == "__main__":
    first, count = int(sys.argv[1]), int(sys.argv[2])
    total: Counter[str] = Counter()
    failed = 0
    for seed in range(first, first + count):
        try:
            total += live(seed)
        except AssertionError as error:
            failed += 1
            print(error, flush=True)
    print(failed, "failed;", total)
