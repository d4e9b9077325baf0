"""Who else stands on a file: trees, links, every way to write a name, libvirt, and what could not be seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapchain.host import libvirt, virsh
from snapchain.image.dependent_search import Kind, find_dependents
from tests.ops import fake_virsh
from tests.ops.forest import write_image
from tests.ops.stacks import MiB, qemu_img


def image(path: Path, backing: Path | str | None = None, *, options: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    link = ["-u", "-b", str(backing), "-F", "qcow2"] if backing else []
    extra = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *link, *extra, path, str(MiB))
    return path


def users(base: Path, top: Path, *image_dirs: Path) -> list[str]:
    """Paths and domains that stand on base, for a disk that is itself left out."""
    status = top.stat()
    found = find_dependents([base], top=top, own=[(status.st_dev, status.st_ino)], image_dirs=image_dirs)
    assert found.incomplete is None
    return [str(each.path or each.domain) for each in found.on(base)]


NAMES = [
    "../_base/img",
    "./../_base/./img",
    "{base}",
    "file:{base}",
    "file:_base/img",
    "alias",
    "../_base/hard",
    'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{base}"}}}}',
    'json:{{"file.filename":"{base}"}}',
    'json:{{"file.filename":"file:{base}"}}',
    'json:{{"file.filename":"img"}}',
    'json:{{"driver":"qcow2","file":{{"driver":"quorum","children":[{{"filename":"{base}"}}]}}}}',
    "nfs://server/_base/img",
    "json:not json, img",
]
"""How an image in i2 may name `_base/img`."""


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_found_however_it_names_the_file(name: str, tmp_path: Path) -> None:
    base, top = image(tmp_path / "_base" / "img"), image(tmp_path / "i1" / "disk.qcow2")
    (tmp_path / "i2").mkdir()
    (tmp_path / "i2" / "alias").symlink_to(base)
    os.link(base, tmp_path / "_base" / "hard")
    other = image(tmp_path / "i2" / "disk.qcow2", name.format(base=base))
    assert str(other) in users(base, top)


@pytest.mark.parametrize(
    "name",
    [
        "/elsewhere/img",
        "img",
        'json:{"file.filename":"/elsewhere/img"}',
        "nfs://server/other",
        "file:/x/img",
        "file:x/img2",
    ],
)
def test_an_image_that_names_another_file_is_no_user(name: str, tmp_path: Path) -> None:
    base, top = image(tmp_path / "_base" / "img"), image(tmp_path / "i1" / "disk.qcow2")
    image(tmp_path / "i2" / "disk.qcow2", name)
    assert users(base, top) == []


def test_users_of_other_kinds_are_found(tmp_path: Path) -> None:
    base, top = image(tmp_path / "_base" / "img"), image(tmp_path / "i1" / "disk.qcow2")
    with_data = tmp_path / "i2" / "data.qcow2"
    image(with_data, options=f"data_file={tmp_path / 'i2' / 'raw'}")
    qemu_img("amend", "-f", "qcow2", "-o", f"data_file={base}", with_data)
    from_qemus_directory = image(tmp_path / "i2" / "moved.qcow2", options=f"data_file={tmp_path / 'i2' / 'raw2'}")
    qemu_img("amend", "-f", "qcow2", "-o", "data_file=somewhere/img", from_qemus_directory)
    link = tmp_path / "i3" / "disk.qcow2"
    link.parent.mkdir()
    link.symlink_to("../_base/img")
    (tmp_path / "i4").mkdir()
    qed = tmp_path / "i4" / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", "-u", "-b", base, "-F", "raw", qed, str(MiB))
    vmdk = tmp_path / "i4" / "disk.vmdk"
    vmdk.write_text(f'# Disk DescriptorFile\nversion=1\nRW 2048 FLAT "{base}" 0\n')
    hidden = image(tmp_path / "elsewhere" / "deep" / "mid.qcow2", base)
    assert set(users(base, top)) == {str(path) for path in (with_data, from_qemus_directory, link, qed, vmdk, hidden)}


def test_an_image_elsewhere_is_found_by_an_overlay_here_and_a_chain_through_it_followed(tmp_path: Path) -> None:
    base, top = image(tmp_path / "here" / "_base" / "img"), image(tmp_path / "here" / "i1" / "disk.qcow2")
    middle = image(tmp_path / "elsewhere" / "a" / "mid.qcow2", base)
    image(tmp_path / "here" / "i2" / "disk.qcow2", middle)
    assert users(base, top) == [str(middle)]


def test_directories_that_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the real file and beside its link, where the user points, behind links; and no loop in these."""
    real = image(tmp_path / "store" / "s1" / "img")
    top = tmp_path / "vms" / "1" / "disk.0"
    top.parent.mkdir(parents=True)
    top.symlink_to(real)
    base = image(tmp_path / "store" / "base" / "img")
    found = [
        image(tmp_path / "store" / "s2" / "img", base),
        image(tmp_path / "vms" / "2" / "disk.0", base),
        image(tmp_path / "named" / "below" / "x", base),
        image(tmp_path / "variable" / "x", base),
    ]
    elsewhere = image(tmp_path / "linked" / "x", base)
    (tmp_path / "vms" / "3").symlink_to(tmp_path / "linked")
    (tmp_path / "vms" / "loop").symlink_to(tmp_path / "vms")
    monkeypatch.setenv("SNAPCHAIN_IMAGE_DIRS", f"{tmp_path / 'variable'}:{tmp_path / 'nowhere'}")
    assert users(base, top, tmp_path / "named") == sorted(map(str, [*found, elsewhere]))


def test_around_the_other_places_of_a_bind_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = image(tmp_path / "mounted" / "far" / "img")
    (tmp_path / "vms").mkdir()
    (tmp_path / "vms" / "_base").symlink_to(base.parent)
    overlay = image(tmp_path / "vms" / "i1" / "disk.qcow2", "../_base/img")
    assert users(base, base) == []
    monkeypatch.setattr("snapchain.image.dependent_search.other_names", lambda _: [tmp_path / "vms" / "_base" / "img"])
    assert [str(each.path) for each in find_dependents([base], top=base).on(base)] == [str(overlay)]


def test_domains_and_pools_of_libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, top = image(tmp_path / "a" / "b" / "_base" / "img"), image(tmp_path / "a" / "b" / "i1" / "disk.qcow2", "x")
    far = image(tmp_path / "far" / "web2.qcow2", base)
    pooled, volume = image(tmp_path / "pool" / "v.qcow2", base), image(tmp_path / "lv", base)
    pool = "<pool type='{}'><name>p</name><target><path>{}</path></target></pool>"
    fake_virsh.install(
        tmp_path / "fake",
        monkeypatch,
        domains={
            "own": fake_virsh.domain("own", top),
            "direct": fake_virsh.domain("direct", base),
            "by header": fake_virsh.domain("by header", far),
            "recorded": fake_virsh.domain("recorded", tmp_path / "gone.qcow2", tmp_path / "gone too", base),
            "now": fake_virsh.domain("now", tmp_path / "now.qcow2"),
            "by volume": fake_virsh.domain("by volume", base).replace(f'file="{base}"', "pool='l' volume='img'"),
        },
        running={"now": fake_virsh.domain("now", tmp_path / "now.qcow2", base)},
        pools={
            "p": (pool.format("dir", tmp_path / "pool"), []),
            "l": (pool.format("logical", "/dev/vg"), [volume, base]),
        },
    )
    found = find_dependents([base], top=top)
    assert found.incomplete is None
    assert [each.description for each in found.on(base)] == [
        f"{far} depends on it",
        f"{volume} depends on it",
        f"{pooled} depends on it",
        "domain by volume (vda) uses it",
        "domain direct (vda) uses it",
        "domain now (vda) names it in its backing chain",
        "domain recorded (vda) names it in its backing chain",
    ]
    assert find_dependents([top], top=top).on(top) == ()


@pytest.mark.parametrize("at", ["missing", "no daemon", "unreachable", "hanging"])
def test_a_libvirt_that_cannot_be_asked(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, top = image(tmp_path / "_base" / "img"), image(tmp_path / "i1" / "disk.qcow2")
    (tmp_path / "socket").touch()
    monkeypatch.setattr(libvirt, "SECONDS", 0.5)
    if at == "missing":
        monkeypatch.setattr(libvirt, "which", lambda _: None)
    elif at == "hanging":
        fake_virsh.script(tmp_path, "#!/bin/sh\nexec sleep 60\n", monkeypatch)
    else:
        asked = f"#!/bin/sh\ntouch {tmp_path}/asked\necho error: no connection >&2\nexit 1\n"
        fake_virsh.script(tmp_path, asked, monkeypatch)
        monkeypatch.setattr(virsh, "_SOCKETS", (str(tmp_path / ("socket" if at == "unreachable" else "none")),))
    said = find_dependents([base], top=top).incomplete
    expected = {
        "unreachable": "libvirt could not be asked about all of its domains and pools: "
        "libvirt refused `list`: no connection.",
        "hanging": "libvirt could not be asked about all of its domains and pools: it did not answer in time.",
    }
    assert said == expected.get(at)
    assert (tmp_path / "asked").exists() is (at == "unreachable"), "no virsh is started for nothing"


def test_the_disks_own_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it runs on now is its own disk; what its next start needs must stay."""
    base, top = image(tmp_path / "i1" / "0.qcow2"), image(tmp_path / "i1" / "disk.qcow2", "0.qcow2")
    plain, recorded = fake_virsh.domain("web1", top), fake_virsh.domain("web1", top, base)
    status = top.stat()

    def found() -> list[tuple[str, Kind]]:
        users = find_dependents([base, top], top=top, own=[(status.st_dev, status.st_ino)])
        return [(each.description, each.kind) for path in (base, top) for each in users.on(path)]

    fake_virsh.install(tmp_path / "runs", monkeypatch, domains={"web1": plain}, running={"web1": recorded})
    assert found() == []
    fake_virsh.install(tmp_path / "off", monkeypatch, domains={"web1": recorded})
    assert found() == [("domain web1 (vda) names it in its backing chain", Kind.DEFINITION)]


def test_names_that_others_choose(tmp_path: Path) -> None:
    base, top = image(tmp_path / "i1" / "0.qcow2"), image(tmp_path / "i1" / "disk.qcow2", "0.qcow2")
    odd = tmp_path / "i2" / os.fsdecode(b"a\nb\xff.qcow2")
    odd.parent.mkdir()
    (tmp_path / "i2" / "loop").symlink_to("loop")
    (tmp_path / "i2" / "nowhere").symlink_to("gone")
    write_image(odd, {}, str(base))
    write_image(tmp_path / "i2" / "z.qcow2", {}, "x" * 300)
    status = top.stat()
    found = find_dependents([base], top=top, own=[(status.st_dev, status.st_ino)])
    # As it is, but for what no text can hold: a terminal, or JSON, escapes the line feed.
    assert found.reason(base) == f"{odd.parent}/a\nb\\udcff.qcow2 depends on it"
    assert found.incomplete is None


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stat and one read for each file of a tree, whatever is searched for."""
    base, top = tmp_path / "i1" / "0.qcow2", tmp_path / "i1" / "disk.qcow2"
    top.parent.mkdir()
    write_image(base, {}, None)
    write_image(top, {}, "0.qcow2")
    for number in range(50):
        (tmp_path / f"{number}").write_bytes(b"QFI\xfb" + bytes(600))
    opened: list[object] = []
    real = os.open

    def counted(path: str, flags: int, *more: int, **named: int) -> int:
        if not flags & (os.O_PATH | os.O_DIRECTORY):
            opened.append(path)
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", counted)
    find_dependents([base] * 10, top=top)
    assert len(opened) == 52
