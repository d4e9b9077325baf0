"""A host that comes back: it is refused, marked, and told what it holds; its libvirt hook starts no second guest."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from snapchain.cli import main
from snapchain.errors import Busy, Conflict, NotFound, Unavailable
from snapchain.host.locks import ImageLock, LockMode
from snapchain.image import scan
from snapchain.model.guest_state import GuestChange, GuestState, Transition
from snapchain.model.lease import Lease
from snapchain.ops.fence import hook
from snapchain.ops.fence.hook import HookRequest
from snapchain.ops.fence.returned import FenceReport, FenceRequest, plan, run
from snapchain.ops.restore.run import Restoration
from snapchain.source import ownership
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.notes import Given, Overlay
from snapchain.testing.history import identical
from tests.ops.guest_points import DOMAIN, Guest, Open, opened
from tests.ops.stacks import qemu_img, write
from tests.ops.test_failover import failover


@pytest.fixture(params=["directory", "replica"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened(request.param, request, tmp_path)


@pytest.fixture
def replica(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened("replica", request, tmp_path)


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path / "kvm1")


def fenced(place: Open, guest: Guest, **asked: Any) -> FenceReport:
    disks = [(guest.images[name], guest.disk(name)) for name in guest.names]
    return run(FenceRequest(disks=disks, host="kvm1", **asked), place())


def xml(guest: Guest) -> str:
    """Of a domain on the images of the old host."""
    text = DOMAIN.replace("/old/a.3.qcow2", str(guest.images["vda"]))
    old = "<disk type='block' device='disk'>\n      <driver name='qemu' type='raw'/>\n      <source dev='/dev/vg0/b'/>"
    assert old in text
    driver = "<driver name='qemu' type='qcow2'/>"
    return text.replace(old, f"<disk type='file' device='disk'>{driver}<source file='{guest.images['vdb']}'/>")


def test_a_refused_shipment_marks_the_images(place: Open, guest: Guest, tmp_path: Path) -> None:
    """Afterwards nothing here writes, ships or starts them, without asking anybody."""
    guest.point(place(), 1)
    failover(place, tmp_path / "out").run()
    guest.grow(2)
    with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"):
        guest.ship(place(), 2, names=["vda"], with_record=False)
    assert stat.S_IMODE(guest.images["vda"].stat().st_mode) & 0o222 == 0
    with pytest.raises(Conflict, match=r"kvm2 has taken the guest web1 over by a failover, .* nothing here may write"):
        ImageAtRest(guest.images["vda"]).seal()
    with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"):
        hook.check("web1", xml(guest), [])


def test_what_the_old_host_holds_is_named_and_kept(place: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(place(), 1)
    failover(place, tmp_path / "out").run()
    write(guest.images["vda"], "write -P 7 1536k 64k")
    dry = plan(FenceRequest(disks=[(guest.images["vda"], "web1/vda")]), place())
    assert dry.taken_over
    assert os.access(guest.images["vda"], os.W_OK)
    assert place().guest_state("web1").state is GuestState.ACTIVE, "a plan changes nothing"
    report = fenced(place, guest)
    assert (report.taken_over, report.changed_bytes) == (True, 64 << 10)
    assert [(each.offset, each.length) for each in report.disks[0].ranges] == [(1536 << 10, 64 << 10)]
    assert [(each.point, each.changed_bytes) for each in report.disks] == [(1, 64 << 10), (1, 0)]
    assert report.standing.state is GuestState.DIVERGED
    assert report.standing.master == "kvm2"
    kept = fenced(place, guest, keeps_tail=True)
    assert [each.kept for each in kept.disks] == ["web1.tail-1/vda", None]
    assert kept.standing.state is GuestState.ACTIVE
    (tail,) = place().disks("web1.tail-1/vda")[0].points
    Restoration(place(), "web1.tail-1/vda", tmp_path / "tail.qcow2", point=str(tail.point)).run()
    qemu_img("convert", "-O", "raw", guest.images["vda"], tmp_path / "held.raw")
    assert identical(tmp_path / "tail.qcow2", tmp_path / "held.raw")
    assert guest.images["vda"].exists(), "nothing is deleted"


def test_a_host_that_holds_nothing_more_is_settled(place: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(place(), 1)
    failover(place, tmp_path / "out").run()
    report = fenced(place, guest)
    assert (report.changed_bytes, report.standing.state) == (0, GuestState.ACTIVE)
    again = fenced(place, guest)
    assert [each.marked for each in again.disks] == [each.marked for each in report.disks]


def test_a_guest_that_was_not_taken_over_is_left_alone(place: Open, guest: Guest) -> None:
    guest.point(place(), 1)
    report = fenced(place, guest)
    assert (report.taken_over, report.disks) == (False, ())
    assert os.access(guest.images["vda"], os.W_OK)
    assert hook.check("web1", xml(guest), [place]) == []


def test_a_second_guest_that_runs_is_told(replica: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(replica(), 1)
    failover(replica, tmp_path / "out").run()
    with ImageLock(guest.images["vda"], LockMode.WRITE), pytest.raises(Busy) as busy:
        fenced(replica, guest)
    assert "shut it down at once" in str(busy.value.hint)
    with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"):
        hook.check("web1", xml(guest), [])


# --- the hook


def test_a_domain_on_its_way_is_not_started_here(guest: Guest) -> None:
    """Its images stay writable, since it may go on here; it may be running there by now."""
    image = guest.images["vda"]
    overlay = Overlay(name="vda-2.qcow2", layer="0" * 32, virtual_size=0, cluster_size=0, extended_l2=False)
    mark = Given(
        destination="ssh://kvm2/srv/replica", disk="web1/vda", epoch=2, token="0" * 32, time=datetime.now(UTC),
        overlay=overlay, together=("web1/vda",),
    )  # fmt: skip
    assert hook.check("web1", xml(guest), []) == []
    with scan(image) as chain:
        ownership.fence(chain, mark, top_only=True, stays_writable=True)
    assert image.stat().st_mode & 0o222
    with pytest.raises(Conflict, match="this disk is being given to ssh://kvm2/srv/replica::web1/vda"):
        hook.check("web1", xml(guest), [])
    with scan(image) as chain:
        ownership.fence(chain, mark)
    assert not image.stat().st_mode & 0o222
    with scan(image) as chain:
        ownership.unfence(chain, mark.token)
    assert image.stat().st_mode & 0o222
    assert hook.check("web1", xml(guest), []) == []


def test_the_hook_refuses_older_images_by_the_destination_alone(place: Open, guest: Guest, tmp_path: Path) -> None:
    """Without a mark: after an older copy of the image came back, or a restored backup of the state directory."""
    guest.point(place(), 1)
    copies = tmp_path / "copies"
    shutil.copytree(guest.place, copies)
    failover(place, tmp_path / "out").run()
    fenced(place, guest)
    shutil.rmtree(guest.place)
    shutil.copytree(copies, guest.place)
    assert hook.check("web1", xml(guest), []) == []
    with pytest.raises(Conflict, match=r"kvm2 has taken the guest web1 over .* the images here are of epoch 1"):
        hook.check("web1", xml(guest), [place])
    with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"):
        guest.point(place(), 2, names=["vda"])


def test_the_hook_sees_the_mark_below_an_overlay_with_any_name(place: Open, guest: Guest, tmp_path: Path) -> None:
    """As libvirt names the overlay of a snapshot: only the definition says that it is qcow2."""
    guest.point(place(), 1)
    failover(place, tmp_path / "out").run()
    fenced(place, guest)
    overlay = guest.place / "vda.before-update"
    qemu_img("create", "-q", "-f", "qcow2", "-b", guest.images["vda"], "-F", "qcow2", overlay)
    text = xml(guest).replace(str(guest.images["vda"]), str(overlay)).replace(str(guest.images["vdb"]), "/none")
    with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"):
        hook.check("web1", text, [])


def test_the_hook_lets_the_new_master_start(place: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(place(), 1)
    report = failover(place, tmp_path / "out").run()
    for name, disk in zip(guest.names, report.disks, strict=True):
        guest.images[name] = Path(disk.path or "")
    assert hook.check("web1", xml(guest), [place]) == []


def test_an_answer_is_required_only_where_that_was_asked(guest: Guest) -> None:
    def silent() -> Any:
        raise Unavailable("no route to host", subject="ssh://kvm2/srv/replica")

    (note,) = hook.check("web1", xml(guest), [silent])
    assert "no route to host" in note
    with pytest.raises(Unavailable, match="it is not known whether another host runs it"):
        hook.check("web1", xml(guest), [silent], requires_answer=True)


def test_one_silent_destination_is_enough(place: Open, guest: Guest) -> None:
    """It may be the one at which another host has taken the guest over."""

    def silent() -> Any:
        raise Unavailable("no route to host", subject="ssh://kvm2/srv/replica")

    guest.point(place(), 1)
    assert hook.check("web1", xml(guest), [place], requires_answer=True) == []
    with pytest.raises(Unavailable, match="it is not known whether another host runs it"):
        hook.check("web1", xml(guest), [place, silent], requires_answer=True)


def test_the_hook_finds_volumes_of_pools(
    place: Open, guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt gives it the XML before it knows the paths of volumes, and must not be asked from its own hook."""
    guest.point(place(), 1)
    failover(place, tmp_path / "out").run()
    old = f"<source file='{guest.images['vda']}'/>"
    text = xml(guest)
    assert old in text
    text = text.replace(old, f"<source pool='images' volume='{guest.images['vda'].name}'/>")
    only = text.replace(f"<source file='{guest.images['vdb']}'/>", "<source protocol='rbd' name='x'/>")
    monkeypatch.setattr(hook, "_POOLS", (tmp_path / "none", tmp_path / "pools"))
    (note,) = hook.check("web1", only, [place])
    assert "of pool images was not looked at" in note
    (tmp_path / "pools").mkdir()
    target = f"<name>images</name><target><path>{guest.images['vda'].parent}</path></target>"
    for shape in ("<pool>{}</pool>", "<poolstate><pool>{}</pool></poolstate>"):
        (tmp_path / "pools" / "images.xml").write_text(f"<!-- libvirt's -->\n{shape.format(target)}\n")
        with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"):
            hook.check("web1", only, [place])


def test_the_hook_asks_for_a_guest_on_block_devices(place: Open, guest: Guest, tmp_path: Path) -> None:
    guest.point(place(), 1)
    text = xml(guest).replace("<source file=", "<source dev=")
    assert hook.check("web1", text, [place]) == []
    failover(place, tmp_path / "out").run()
    with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"):
        hook.check("web1", text, [place])


def test_the_hook_starts_no_guest_that_may_be_taken_over_by_a_lease(place: Open, guest: Guest) -> None:
    """Its guards are those of a QEMU that has ended: a new one gets its own when the watch has seen it."""
    guest.point(place(), 1)
    lease = Lease(token="1" * 32, seconds=30, host="kvm1", epoch=1)

    def step(transition: Transition, lease: Lease | None = None) -> None:
        seen = place().guest_state("web1").number
        change = GuestChange(
            guest="web1", transition=transition, seen=seen, token="1" * 32, by="kvm1", host="kvm1", lease=lease
        )
        place().change_guest(change)

    step(Transition.LEASE, lease)
    with pytest.raises(Conflict, match="a lease of it is recorded, by which another host may take it over: of kvm1"):
        hook.check("web1", xml(guest), [place])
    step(Transition.UNLEASE)
    step(Transition.LEASE, lease.model_copy(update={"is_witness": True}))
    assert hook.check("web1", xml(guest), [place]) == [], "nobody takes it over at a witness"


def test_no_hook_of_others_is_replaced(tmp_path: Path) -> None:
    request = HookRequest(folder=tmp_path / "hooks" / "qemu.d", at=["dir:/srv/a b"])
    with pytest.raises(NotFound, match="there is no such hook"):
        hook.uninstall(request)
    assert not hook.plan(request).installed
    assert not request.folder.exists()
    report = hook.install(request)
    path = Path(report.path)
    assert (path.name, stat.S_IMODE(path.stat().st_mode)) == ("snapchain", 0o755)
    assert "--at 'dir:/srv/a b'" in path.read_text()
    assert hook.install(request).installed, "ours is replaced"
    hook.uninstall(request)
    assert not path.exists()
    path.write_text("#!/bin/sh\nexit 0\n")
    for change in (hook.plan, hook.install, hook.uninstall):
        with pytest.raises(Conflict, match="replaces no hook of others"):
            change(request)
    assert path.read_text() == "#!/bin/sh\nexit 0\n"


def test_the_script_does_as_libvirt_wants(replica: Open, guest: Guest, tmp_path: Path) -> None:
    """Exit code 0 starts, any other refuses. Whatever else is wrong with the hook keeps no guest from starting."""
    guest.point(replica(), 1)
    request = HookRequest(folder=tmp_path / "qemu.d", at=[f"dir:{tmp_path}/replica"])
    script = hook.install(request).path

    def status(*words: str, text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, *words], input=text, capture_output=True, text=True, check=False)

    assert status("web1", "prepare", "begin", "-", text=xml(guest)).returncode == 0
    failover(replica, tmp_path / "out").run()
    refused = status("web1", "prepare", "begin", "-", text=xml(guest))
    assert refused.returncode == 1
    assert "kvm2 has taken the guest web1 over" in refused.stderr
    for step in (("started", "begin"), ("release", "end")):
        assert status("web1", *step, "-", text=xml(guest)).returncode == 0
    assert status("web1", "prepare", "begin", "-", text=xml(guest).replace("/", "/nowhere/")).returncode == 1
    Path(script).write_text(Path(script).read_text().replace("-m snapchain", "-m no.such.module"))
    assert status("web1", "prepare", "begin", "-", text=xml(guest)).returncode == 0


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(words)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_on_the_command_line(replica: Open, guest: Guest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest.point(replica(), 1)
    dest = f"dir:{tmp_path}/replica"
    asked = ["failover", f"{dest}::web1", "--source-is-gone", "--reason", "fire", "--into", str(tmp_path / "out")]
    status, out, _ = command(capsys, *asked, "--dry-run")
    assert status == 0
    assert "would take web1 over at guest point 1" in out
    assert "what was written in" in out
    status, _, err = command(capsys, *asked)
    assert status == 2
    assert "--yes" in err
    status, out, err = command(capsys, *asked, "--yes", "--json")
    assert status == 0, err
    done = json.loads(out)
    assert (done["state"], done["epoch"], done["vouched"]["words"]) == ("active", 2, "fire")
    status, out, _ = command(capsys, "fence", str(guest.images["vda"]), f"{dest}::web1/vda")
    assert status == 0
    assert "nothing here may write or start it" in out
    assert "holds nothing beyond point 1" in out
    assert command(capsys, "fence")[0] == 2
