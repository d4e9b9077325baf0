"""A transfer that was cut off, by whatever, goes on at the last durable byte, and what is there before stays whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from snapchain.errors import Corrupt, SnapchainError, Unavailable
from snapchain.host.channel import Channel
from snapchain.ops.ship.run import ShipRequest, send_blindly
from snapchain.replica import sender
from snapchain.replica.receiver import Received, receive
from snapchain.replica.stream.frames import CHECK_BYTES, HEAD, MAGIC
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, flat, write
from tests.replica.conftest import DISK, BentEndpoint, Place, send
from tests.waiting import taken, wait_until

SIZE = 24 * MiB


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """Two files that do not compress, and what each shows."""
    directory = tmp_path_factory.mktemp("noisy")
    paths = build(directory / "c", [Layer(SIZE), Layer(SIZE)])
    draw = random.Random(7)
    for number, path in enumerate(paths):
        noise = directory / "noise"
        noise.write_bytes(draw.randbytes(16 * MiB))
        write(path, f"write -s {noise} {number * 4}M 16M")
    return paths, [flat(path, path.with_suffix(".flat")) for path in paths]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark for every MiB."""
    monkeypatch.setattr(sender, "MARK_BYTES", MiB)


@pytest.mark.parametrize("cut_at", [100, 5 * MiB, 15 * MiB, 20 * MiB, 31 * MiB])
@pytest.mark.usefixtures("often")
def test_a_cut_line(place: Place, noisy: tuple[list[Path], list[Path]], cut_at: int) -> None:
    paths, shown = noisy
    cut = BentEndpoint(place, there=lambda at, data: data if at < cut_at else None)
    with pytest.raises(Unavailable, match=r"the stream ends in the middle of frame|closed by the other side"):
        send(paths[-1], cut, DISK)
    assert isinstance(cut.error, Unavailable)
    again = place.send(paths[-1])
    whole = 32 * MiB
    durable = cut_at // MiB * MiB
    assert again.bytes_sent < whole - durable + 4 * MiB
    assert again.resumed == (cut_at > 4 * MiB and cut_at % (16 * MiB) > MiB)
    place.check(shown[-1])


@pytest.mark.usefixtures("often")
def test_many_cuts_in_one_transfer(place: Place, noisy: tuple[list[Path], list[Path]]) -> None:
    paths, shown = noisy
    for _ in range(40):
        cut = BentEndpoint(place, there=lambda at, data: data if at < 9 * MiB else None)
        try:
            send(paths[-1], cut, DISK)
        except Unavailable:
            continue
        break
    else:
        pytest.fail("it never came to an end")
    place.check(shown[-1])


@pytest.mark.parametrize("at", [3, 40, 300, 100_000, 7 * MiB, 30 * MiB])
@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_flipped_bit(place: Place, noisy: tuple[list[Path], list[Path]], at: int, direction: str) -> None:
    paths, shown = noisy

    def flip(place: int, data: bytes) -> bytes:
        if not place <= at < place + len(data):
            return data
        bent = bytearray(data)
        bent[at - place] ^= 0x10
        return bytes(bent)

    bent = BentEndpoint(place, **{direction: flip})
    try:
        send(paths[-1], bent, DISK)
    except SnapchainError as error:
        assert isinstance(error, Corrupt | Unavailable)  # noqa: PT017
    else:
        assert direction == "back"
        assert at >= 100_000  # the receiver never says so much
    if place.directory.exists() and (place.directory / "catalogue.json").exists() and place.catalogue()["layers"]:
        assert len(place.files()) <= 2
    place.send(paths[-1])
    place.check(shown[-1])


def test_a_saved_stream_is_received_once(tmp_path: Path, place: Place, noisy: tuple[list[Path], list[Path]]) -> None:
    paths, shown = noisy
    saved = tmp_path / "saved"
    save(paths[-1], saved)
    first, second = take(place, saved), take(place, saved)
    assert (first.layers, first.known, len(first.points)) == (["0.qcow2", "disk.qcow2"], 0, 1)
    assert (second.layers, second.known, len(second.points)) == ([], 2, 0)
    place.check(shown[-1])
    assert place.send(paths[-1]).layers_sent == 0


@pytest.mark.usefixtures("often")
def test_a_saved_stream_that_was_cut_off(tmp_path: Path, place: Place, noisy: tuple[list[Path], list[Path]]) -> None:
    paths, shown = noisy
    saved, short = tmp_path / "saved", tmp_path / "short"
    save(paths[-1], saved)
    for length in (10, 1000, 8 * MiB, saved.stat().st_size - 1):
        short.write_bytes(saved.read_bytes()[:length])
        with pytest.raises(Unavailable, match=r"closed|ends in the middle"):
            take(place, short)
    assert take(place, saved).known >= 1
    place.check(shown[-1])


def test_a_flipped_bit_in_each_kind_of_frame(tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its head, its body, its check: it is found there, and what is there already stays."""
    monkeypatch.setattr(sender, "MARK_BYTES", 128 << 10)
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(9).randbytes(MiB))
    image = build(tmp_path / "c", [Layer(4 * MiB, [f"write -s {noise} 1M 1M", f"write -s {noise} 3M 1M"])])[0]
    saved = tmp_path / "saved"
    save(image, saved)
    raw = bytearray(saved.read_bytes())
    at = len(MAGIC)
    places: dict[int, list[int]] = {}
    while at < len(raw):
        kind, _, _, length = HEAD.unpack_from(raw, at)
        stop = at + HEAD.size + length + CHECK_BYTES
        places[kind] = [at, at + 1, at + 4, at + HEAD.size, at + HEAD.size + length // 2, stop - CHECK_BYTES, stop - 1]
        at = stop
    assert set(places) >= {1, 2, 3, 4, 5, 6, 7, 8, 9}
    place.send(image)
    before = place.catalogue()
    for kind, offsets in places.items():
        for number, at in enumerate(offsets):
            raw[at] ^= 1 << number
            (tmp_path / "bent").write_bytes(raw)
            raw[at] ^= 1 << number
            with pytest.raises(Corrupt, match=r"bent: frame \d+ "):
                take(place, tmp_path / "bent")
            fresh = Place(tmp_path / f"fresh {kind} {number}")
            with pytest.raises(Corrupt, match=r"bent: frame \d+ "):
                take(fresh, tmp_path / "bent")
            shutil.rmtree(fresh.root, ignore_errors=True)
    after = place.catalogue()
    assert after["layers"] == before["layers"]
    assert after["points"][:1] == before["points"]
    place.check(flat(image, tmp_path / "shown"))


def test_what_is_no_stream(tmp_path: Path, place: Place) -> None:
    saved = tmp_path / "saved"
    saved.write_bytes(b"Welcome to \x1b[31mkvm2!\nLast login: never")
    with pytest.raises(Corrupt, match="it begins with 'Welcome to"):
        take(place, saved)


def save(image: Path, saved: Path) -> None:
    target = os.open(saved, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    report = send_blindly(ShipRequest(image=image, disk=DISK), Channel(-1, target, peer="the file"))
    assert report.point is None


def take(place: Place, saved: Path) -> Received:
    with Channel(os.open(saved, os.O_RDONLY), -1, peer=saved.name) as channel:
        return receive(channel, place.root)


CHILD = """
import sys
from pathlib import Path
from snapchain.replica import sender
from tests.replica.conftest import Place
sender.MARK_BYTES = 1 << 20
Place(Path(sys.argv[2])).send(Path(sys.argv[1]))
"""


def arrived(place: Place) -> int:
    """Bytes that the files of a replica take up."""
    return sum(taken(place.root))


def kill_when(child: subprocess.Popen[bytes], place: Place, enough: int) -> None:
    """At the moment at which more than so many bytes are there, or when it has ended."""
    wait_until(lambda: child.poll() is not None or arrived(place) > enough)
    child.kill()


def test_killed_again_and_again(place: Place, noisy: tuple[list[Path], list[Path]]) -> None:
    """Sender and receiver are one process here: both die at once, at any moment."""
    paths, shown = noisy
    draw = random.Random(3)
    argv = [sys.executable, "-c", CHILD, str(paths[-1]), str(place.root)]
    died = 0
    for _ in range(6):
        with subprocess.Popen(argv) as child:
            kill_when(child, place, arrived(place) + draw.randrange(8 * MiB))
        died += child.returncode == -signal.SIGKILL
        record = place.directory / "catalogue.json"
        if record.exists():
            json.loads(record.read_text())
    assert died
    place.send(paths[-1])
    files = place.files()
    for name in place.directory.iterdir():
        assert not name.name.startswith(".incoming"), name
    assert [file.name for file in files] == ["0.qcow2", "disk.qcow2"]
    place.check(shown[-1])


@pytest.mark.sampled
def test_kill_nine_at_every_system_call(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.replica.kill_nine", str(tmp_path)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 10


@pytest.mark.root
def test_a_full_disk_over_there(tmp_path: Path, noisy: tuple[list[Path], list[Path]], often: None) -> None:
    paths, shown = noisy
    share = tmp_path / "share"
    share.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", share], check=True)
    try:
        place = Place(share / "replica")
        with pytest.raises(Unavailable, match="no space left") as caught:
            place.send(paths[-1])
        assert "free some space" in str(caught.value.hint)
        assert [file.name for file in place.files()] == ["0.qcow2"]
        subprocess.run(["mount", "-o", "remount,size=64m", share], check=True)
        report = place.send(paths[-1])
        assert (report.layers_sent, report.resumed) == (1, True)
        place.check(shown[-1])
    finally:
        subprocess.run(["umount", share], check=True)
