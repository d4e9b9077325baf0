"""sync: the destination as stock QEMU sees it, the numbers, and what is never touched."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, Corrupt, Diverged, InvalidInput, Unavailable
from snapchain.host.retry import RetryPolicy
from snapchain.host.ssh import parse_remote_address
from snapchain.model.convergence import Verdict
from snapchain.ops.sync import rounds
from snapchain.ops.sync.run import (
    Destination,
    Divergence,
    Guest,
    Proof,
    SyncReport,
    SyncRequest,
    check,
    guest_of,
    sealed_request,
    sync_set,
)
from snapchain.ops.sync.virsh import migrate_commands
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.source.at_rest import ImageAtRest
from tests.ops.killing import killed_at_every_step
from tests.ops.stacks import Layer, MiB, build, clean, flat, qemu_img, same, write
from tests.replica.conftest import DISK, Place
from tests.replica.sending import send_to_replica

GUEST = Guest("web1", "vda", "qemu+ssh://kvm2/system")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "replica")


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """A root, two overlays, of which the upper is larger, and a top with unusual clusters that a guest has written."""
    return build(
        tmp_path / "images",
        [
            Layer(8 * MiB, ["write -P 1 0 3M"]),
            Layer(8 * MiB, ["write -P 2 1M 1M", "write -z 0 64k"]),
            Layer(9 * MiB, ["write -P 3 8M 512k"]),
            Layer(9 * MiB, ["write -P 4 2M 640k"], options="cluster_size=16k"),
        ],
    )


def request(image: Path, **options: Any) -> SyncRequest:
    send = {name: options.pop(name) for name in ("labels", "divergence", "limit_rate") if name in options}
    return SyncRequest(send=sealed_request(image, DISK, **send), **options)


def run(image: Path, place: Place, *, sealer: Any = None, **options: Any) -> SyncReport:
    return sync_set([request(image, **options)], DirectoryEndpoint(place.root), sealer=sealer).disks[0]


def look(image: Path, place: Place, **options: Any) -> Destination:
    return check(request(image, **options), DirectoryEndpoint(place.root))


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", path))
    return found


def judge_overlay(overlay: str | None, image: Path, sealed: Path, tmp_path: Path) -> None:
    """Empty, of the top's geometry, clean, and showing what the sealed file shows."""
    assert overlay is not None
    path = Path(overlay)
    mine, theirs = info(image), info(path)
    assert theirs["virtual-size"] == mine["virtual-size"]
    assert theirs["cluster-size"] == mine["cluster-size"]
    assert theirs["backing-filename-format"] == "qcow2"
    assert clean(path)
    assert all(entry["depth"] for entry in json.loads(qemu_img("map", "--output=json", path)) if entry["data"])
    qemu_img(
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        sealed.absolute(),
        "-F",
        "qcow2",
        tmp_path / "as",
        str(mine["virtual-size"]),
    )
    assert same(path, flat(tmp_path / "as", tmp_path / "as.raw"))


def test_a_destination_becomes_ready(chain: list[Path], place: Place, tmp_path: Path) -> None:
    report = run(chain[-1], place, guest=GUEST, labels=["before"])
    assert report.ready
    assert report.missing == ()
    assert (report.layers_sent, report.layers_present, report.point) == (3, 0, 1)
    assert report.bytes_left == 640 * 1024
    assert report.rate is not None
    assert report.predicted_cutover_seconds == pytest.approx(report.bytes_left / report.rate)
    assert report.wire_bytes_left == pytest.approx(report.bytes_left, rel=0.01), "nothing is compressed for a directory"
    assert [each.number for each in report.rounds] == [0]
    judge_overlay(report.overlay, chain[-1], chain[-2], tmp_path)
    for file, layer, there in zip(chain, report.layers, place.files(), strict=False):
        assert Path(layer.path) == there
        assert layer.source == str(file)
        assert there.name == file.name
        assert clean(there)
        assert same(there, flat(file, tmp_path / "shown"))
    assert report.overlay == str(place.directory / "active" / "disk.qcow2")


def test_again_it_sends_nothing_and_keeps_the_overlay(chain: list[Path], place: Place) -> None:
    first = run(chain[-1], place)
    assert first.overlay is not None
    before = Path(first.overlay).stat()
    again = run(chain[-1], place)
    assert again.ready
    assert (again.layers_sent, again.layers_present, again.bytes_sent, again.point) == (0, 3, 0, None)
    assert (again.rate, again.predicted_cutover_seconds, again.wire_bytes_left) == (None, None, None)
    assert Path(first.overlay).stat().st_ino == before.st_ino
    assert len(place.catalogue()["points"]) == 1


def test_a_guest_that_writes_is_no_obstacle(chain: list[Path], place: Place, tmp_path: Path) -> None:
    with guest_on(chain[-1]):
        report = run(chain[-1], place)
        with pytest.raises(Busy, match=r"qemu-io .* has it open"):
            run(chain[-1], place, rounds=1)
    assert report.ready
    judge_overlay(report.overlay, chain[-1], chain[-2], tmp_path)


@contextmanager
def guest_on(path: Path) -> Iterator[None]:
    """QEMU with the image open for writing."""
    argv = ["qemu-io", "-f", "qcow2", str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("write -P 7 0 64k\n")
        process.stdin.flush()
        while "wrote" not in process.stdout.readline():
            pass
        yield
        process.communicate("quit\n")


def test_extended_l2_and_a_larger_top(tmp_path: Path, place: Place) -> None:
    paths = build(
        tmp_path / "images",
        [Layer(4 * MiB, ["write -P 1 0 1M"]), Layer(6 * MiB, options="extended_l2=on,cluster_size=128k")],
    )
    report = run(paths[-1], place)
    assert report.ready
    assert report.bytes_left == 0
    assert report.predicted_cutover_seconds == 0
    assert report.overlay is not None
    made = info(Path(report.overlay))
    assert made["format-specific"]["data"]["extended-l2"] is True
    judge_overlay(report.overlay, paths[-1], paths[0], tmp_path)


def test_a_raw_root(tmp_path: Path, place: Place) -> None:
    paths = build(
        tmp_path / "images", [Layer(4 * MiB, ["write -P 1 0 1M"], image_format="raw"), Layer(4 * MiB, ["write 0 64k"])]
    )
    report = run(paths[-1], place)
    assert report.ready
    assert report.overlay is not None
    assert same(Path(report.overlay), flat(paths[0], tmp_path / "shown", "raw"))


# check


def test_check_says_what_is_missing_and_changes_nothing(chain: list[Path], place: Place, tmp_path: Path) -> None:
    stands = look(chain[-1], place, guest=GUEST)
    assert not stands.ready
    assert stands.missing == (
        "0.qcow2 is not there: 3145728 bytes",
        "1.qcow2 is not there: 1048576 bytes",
        "2.qcow2 is not there: 524288 bytes",
    )
    assert (stands.bytes_to_send, stands.bytes_left) == (4718592, 640 * 1024)
    assert stands.commands == ()
    assert not place.root.exists()
    run(chain[1], place)  # the root alone
    before = everything(place.root)
    assert look(chain[-1], place).missing[0].startswith("1.qcow2")
    assert everything(place.root) == before
    run(chain[-1], place)
    before = everything(place.root)
    ready = look(chain[-1], place, guest=GUEST)
    assert ready.ready
    assert ready.missing == ()
    assert ready.virsh_command is not None
    Path(ready.overlay or "").unlink()
    assert [said.split(" ")[-3:] for said in look(chain[-1], place).missing] == [["is", "not", "there"]]


def everything(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(entry.relative_to(root)): (entry.lstat().st_ino, entry.lstat().st_mtime_ns) for entry in root.rglob("*")
    }


def test_a_check_asks_the_host_that_it_answers_for(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is sealed here, which is known without it."""

    class Unreachable(DirectoryEndpoint):
        def connect(self) -> Any:
            raise Unavailable("no route to host", subject=self.url)

    (image,) = build(tmp_path / "images", [Layer(4 * MiB, ["write -P 1 0 1M"])])
    monkeypatch.setattr(rounds, "_LOOK", RetryPolicy(give_up_after=0.2, first=0.05))
    with pytest.raises(Unavailable, match="no route to host"):
        check(request(image), Unreachable(place.root))
    assert look(image, place).missing[1:] == ("the replica has nothing of this disk",)
    other = build(tmp_path / "other", [Layer(4 * MiB), Layer(4 * MiB)])
    run(other[-1], place)
    assert look(image, place).missing[1:] == ("the points of this disk at the replica (1) have no layer of this image",)


def test_an_image_of_one_file(tmp_path: Path, place: Place) -> None:
    (image,) = build(tmp_path / "images", [Layer(4 * MiB, ["write -P 1 0 1M"])])
    assert "one file" in look(image, place).missing[0]
    with pytest.raises(InvalidInput, match="nothing of the image is sealed") as caught:
        run(image, place)
    assert "--rounds 1" in (caught.value.hint or "")
    report = run(image, place, rounds=1)
    assert report.ready
    assert [each.number for each in report.rounds] == [1]
    assert report.layers_sent == 1
    judge_overlay(
        report.overlay,
        image,
        Path(report.rounds[0].sealed or ""),
        tmp_path,
    )


# rounds


class Guestlike:
    """Seals an image at rest, and writes to the new top at once, as a guest would have done meanwhile."""

    def __init__(self, image: Path, writes: list[str]) -> None:
        self._sealer, self._image, self._writes = ImageAtRest(image), image, writes
        self.count = 0

    def seal(self) -> list[Path]:
        sealed = self._sealer.seal()
        if self.count < len(self._writes):
            write(self._image, self._writes[self.count])
        self.count += 1
        return [sealed]


def test_rounds_until_nothing_is_left(chain: list[Path], place: Place, tmp_path: Path) -> None:
    sealer = Guestlike(chain[-1], ["write -P 5 0 256k", "write -P 6 0 64k"])
    report = run(chain[-1], place, rounds=10, sealer=sealer)
    assert report.outcome is Verdict.ENOUGH
    assert [each.bytes_left for each in report.rounds] == [640 * 1024, 256 * 1024, 64 * 1024, 0]
    assert [each.data_bytes for each in report.rounds[1:]] == [640 * 1024, 256 * 1024, 64 * 1024]
    assert (report.layers_sent, report.bytes_left, report.predicted_cutover_seconds) == (6, 0, 0)
    shown = flat(chain[-1], tmp_path / "shown")
    assert report.overlay is not None
    assert same(Path(report.overlay), shown)
    judge_overlay(report.overlay, chain[-1], Path(report.rounds[-1].sealed or ""), tmp_path)
    assert [path.name for path in place.files()][-2:] == ["disk.2.qcow2", "disk.3.qcow2"]


def test_rounds_are_used_up(chain: list[Path], place: Place) -> None:
    sealer = Guestlike(chain[-1], ["write -P 5 0 256k"] * 9)
    report = run(chain[-1], place, rounds=2, sealer=sealer)
    assert (report.outcome, sealer.count, report.ready) == (Verdict.ROUNDS_USED, 2, True)
    assert report.bytes_left == 256 * 1024


def test_a_guest_that_is_faster_than_the_link(chain: list[Path], place: Place) -> None:
    sealer = Guestlike(chain[-1], [f"write -P {number} 0 {number * 512}k" for number in range(1, 9)])
    report = run(chain[-1], place, target_downtime=1e-9, sealer=sealer)
    assert report.outcome is Verdict.GROWING
    assert report.on_target is False
    assert report.ready, "what could be done was done"
    assert sealer.count == 2


def test_a_target_that_is_met_seals_nothing(chain: list[Path], place: Place) -> None:
    report = run(chain[-1], place, target_downtime=3600)
    assert (report.outcome, report.on_target, len(report.rounds)) == (Verdict.ENOUGH, True, 1)


def test_an_unmeasured_target_takes_a_round_to_measure(chain: list[Path], place: Place) -> None:
    run(chain[-1], place)
    report = run(chain[-1], place, target_downtime=3600)
    assert (report.outcome, len(report.rounds), report.bytes_left) == (Verdict.ENOUGH, 2, 0)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"target_downtime": 0.0}, {"target_downtime": float("nan")}])
def test_requests_that_mean_nothing(chain: list[Path], place: Place, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"--rounds must be|--target-downtime is"):
        run(chain[-1], place, **wrong)


# what stands there already


def test_a_stale_overlay_gives_way(chain: list[Path], place: Place, tmp_path: Path) -> None:
    run(chain[1], place)
    stale = place.directory / "active" / "1.qcow2"
    stale.rename(stale.with_name("disk.qcow2"))
    assert "not on the newest layer" in look(chain[-1], place).missing[-1]
    report = run(chain[-1], place)
    assert report.ready
    judge_overlay(report.overlay, chain[-1], chain[-2], tmp_path)


def test_an_overlay_that_was_written_to_is_never_touched(chain: list[Path], place: Place) -> None:
    overlay = Path(run(chain[-1], place).overlay or "")
    write(overlay, "write -P 9 0 64k")
    before = overlay.read_bytes()
    assert "a guest may have written to it" in look(chain[-1], place).missing[0]
    with pytest.raises(Conflict, match="may have written"):
        run(chain[-1], place)
    assert overlay.read_bytes() == before


@pytest.mark.parametrize("what", ["text", "directory", "dangling"])
def test_other_things_in_its_place(chain: list[Path], place: Place, what: str) -> None:
    overlay = Path(run(chain[-1], place).overlay or "")
    overlay.unlink()
    if what == "text":
        overlay.write_text("mine")
    elif what == "directory":
        overlay.mkdir()
    else:
        overlay.symlink_to("nowhere")
    assert not look(chain[-1], place).ready
    with pytest.raises(Conflict, match=r"disk.qcow2: it is no empty overlay"):
        run(chain[-1], place)
    assert overlay.is_symlink() or overlay.exists()


def test_a_stale_overlay_in_use_stays(chain: list[Path], place: Place) -> None:
    run(chain[1], place)
    overlay = place.directory / "active" / "1.qcow2"
    overlay.rename(overlay.with_name("disk.qcow2"))
    argv = ["qemu-io", "-f", "qcow2", str(overlay.with_name("disk.qcow2"))]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("read 0 512\n")
        process.stdin.flush()
        while "read" not in process.stdout.readline():
            pass
        with pytest.raises(Busy, match=r"qemu-io .* has it open"):
            run(chain[-1], place)
        process.communicate("quit\n")
    assert run(chain[-1], place).ready


def test_a_layer_with_an_overlay_on_it_is_not_cut_off(chain: list[Path], place: Place) -> None:
    run(chain[-1], place)
    other = build(chain[0].parent.parent / "other", [Layer(8 * MiB, ["write -P 8 0 1M"]), Layer(8 * MiB)])
    assert "another disk" in look(other[-1], place).missing[0]
    with pytest.raises(Diverged, match="holds another disk under this name"):
        run(other[-1], place)
    with pytest.raises(Conflict, match="depends on it"):
        run(other[-1], place, divergence=Divergence.CUT_REPLICA)
    assert look(chain[-1], place).ready


@pytest.mark.sampled
def test_kill_nine_while_the_overlay_is_made(chain: list[Path], place: Place, tmp_path: Path) -> None:
    run(chain[1], place)  # leaves an overlay that the next one replaces
    stale = place.directory / "active" / "1.qcow2"
    stale.rename(stale.with_name("disk.qcow2"))
    send_to_replica(request(chain[-1]).send, DirectoryEndpoint(place.root))
    before = tmp_path / "before"
    shutil.copytree(place.root, before)
    deaths = 0
    for where in killed_at_every_step(lambda: run(chain[-1], place), each=2):
        deaths += 1
        assert place.files()[-1].name == "2.qcow2"
        for overlay in stale.parent.glob("[!.]*"):
            assert clean(overlay), where
        report = run(chain[-1], place)
        assert report.ready, where
        assert [entry.name for entry in stale.parent.iterdir()] == ["disk.qcow2"], where
        shutil.rmtree(place.root)
        shutil.copytree(before, place.root)
    assert deaths > 2


# proof


def test_prove_reads_both_sides(chain: list[Path], place: Place) -> None:
    run(chain[-1], place)
    proven = look(chain[-1], place, proof=Proof.READ)
    assert (proven.ready, proven.proof) == (True, Proof.READ)
    layer = place.files()[1]
    layer.chmod(0o600)
    data = bytearray(layer.read_bytes())
    at = data.index(b"\x02" * 4096)
    data[at] ^= 1
    layer.write_bytes(data)
    assert look(chain[-1], place).ready, "nobody looked"
    stands = look(chain[-1], place, proof=Proof.READ)
    assert not stands.ready
    assert [said.split()[0] for said in stands.missing] == ["1.qcow2"]
    (place.directory / "active" / "disk.qcow2").unlink()
    with pytest.raises(Corrupt, match="no longer shows what it did"):
        run(chain[-1], place, proof=Proof.READ)
    assert not (place.directory / "active" / "disk.qcow2").exists()


def test_prove_notices_a_change_here(chain: list[Path], place: Place) -> None:
    run(chain[-1], place)
    status = chain[0].stat()
    data = bytearray(chain[0].read_bytes())
    data[data.index(b"\x01" * 4096)] ^= 1
    with chain[0].open("r+b") as file:
        file.write(data)
    os.utime(chain[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(Corrupt, match="other content than 0"):
        look(chain[-1], place, proof=Proof.READ)


# the commands


def test_the_commands_name_the_disk_and_every_path(chain: list[Path], place: Place, tmp_path: Path) -> None:
    report = run(chain[-1], place, guest=GUEST)
    define, migrate = report.commands
    assert report.virsh_command == migrate
    words = shlex.split(migrate)
    assert words[:2] == ["virsh", "migrate"]
    assert "--copy-storage-inc" in words
    assert words[words.index("--migrate-disks") + 1] == "vda"
    assert words[-2:] == ["web1", "qemu+ssh://kvm2/system"]
    shim = tmp_path / "bin"
    shim.mkdir()
    xml = tmp_path / "live.xml"
    xml.write_text(LIVE.format(top=chain[-1], middle=chain[-2], root=chain[0]))
    (shim / "virsh").write_text(f"#!/bin/sh\nexec cat {shlex.quote(str(xml))}\n")
    (shim / "virsh").chmod(0o755)
    environment = {"PATH": f"{shim}:/usr/bin:/bin"}
    done = subprocess.run(["sh", "-ec", define], cwd=tmp_path, env=environment, check=False, capture_output=True)
    assert done.returncode == 0
    written = (tmp_path / "web1.snapchain.xml").read_text()
    assert written == THERE.format(top=report.overlay)
    assert str(report.overlay) in done.stdout.decode()
    xml.write_text(THERE.format(top="/images/of another name.qcow2"))
    done = subprocess.run(["sh", "-ec", define], cwd=tmp_path, env=environment, check=False, capture_output=True)
    assert done.returncode, "nothing was changed, and nobody was told"


LIVE = """
    <disk type='file' device='disk'>
      <source file='{top}' index='1'/>
      <backingStore type='file' index='2'>
        <format type='qcow2'/>
        <source file='{middle}'/>
        <backingStore type='file' index='3'>
          <format type='raw'/>
          <source file='{root}'/>
          <backingStore/>
        </backingStore>
      </backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <source file='/other.iso'/>
      <backingStore type='file' index='7'>
        <format type='raw'/>
      </backingStore>
      <target dev='sda' bus='sata'/>
    </disk>
"""
THERE = """
    <disk type='file' device='disk'>
      <source file='{top}' index='1'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <source file='/other.iso'/>
      <backingStore type='file' index='7'>
        <format type='raw'/>
      </backingStore>
      <target dev='sda' bus='sata'/>
    </disk>
"""


def test_paths_that_mean_something_to_sed_xml_or_a_shell(tmp_path: Path) -> None:
    old, new = "/a.b/[x]*^$ |\\&'\"<q>.qcow2", "/n|w/\\1 & '\"<z>$HOME.qcow2"
    escaped = [
        path.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("'", "&apos;")
        .replace('"', "&quot;")
        for path in (old, new)
    ]
    define, _ = migrate_commands([(GUEST, {old}, new)])
    words = shlex.split(define)
    sed = words[words.index("|") + 1 : words.index(">")]
    disk = "<source file='{}'/>\n{}<target dev='vda'/>\n</disk>\n<source file='/aXb/x'/>\n"
    below = "<backingStore type='file'>\n<format/>\n</backingStore>\n"
    done = subprocess.run(sed, input=disk.format(escaped[0], below), capture_output=True, text=True, check=True)
    assert done.stdout == disk.format(escaped[1], "")
    assert words[words.index("grep") + 2] == f"file='{escaped[1]}'"


def test_who_the_guest_is() -> None:
    host = parse_remote_address("ssh://root@kvm2:2222/srv/replica")
    none: dict[str, str | None] = {"domain": None, "target": None, "uri": None}
    assert guest_of("web1/vda", host, **none) == Guest("web1", "vda", "qemu+ssh://root@kvm2:2222/system")
    assert guest_of("web1/vda", None, **none) is None
    assert guest_of("web1", host, **none) is None
    assert guest_of("web1", host, domain="w", target="sda", uri=None) == Guest(
        "w", "sda", "qemu+ssh://root@kvm2:2222/system"
    )
    for wrong in ({"target": ""}, {"target": "vda,vdb"}, {"domain": "-x"}, {"uri": "--all"}):
        with pytest.raises(
            InvalidInput, match=r"not the target of a disk|not an URI of libvirt|not the name of a domain"
        ):
            Guest(**{"domain": "web1", "target": "vda", "uri": "qemu:///system", **wrong})


def test_a_copied_image_is_known_again(chain: list[Path], place: Place, tmp_path: Path) -> None:
    run(chain[-1], place)
    shutil.copytree(chain[0].parent, tmp_path / "copy")
    copied = tmp_path / "copy" / "disk.qcow2"
    report = run(copied, place)
    assert (report.ready, report.layers_sent) == (True, 0)
