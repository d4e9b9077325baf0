"""What a domain's XML says: kinds of disks, devices that cannot move, files that belong to the guest."""

from __future__ import annotations

import signal
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from snapchain.errors import Busy, InvalidInput, NotFound, SnapchainError, ToolFailed, Unavailable, Unsupported
from snapchain.guest import domain_xml
from snapchain.guest.libvirt_definition import definition_of, tpm_directory
from snapchain.guest.libvirt_guest import state_of
from snapchain.guest.protocol import State
from snapchain.host.virsh import check_local, explained


def disk(inner: str, *, attributes: str = "type='file' device='disk'") -> domain_xml.XmlDisk:
    xml = f"<domain><devices><disk {attributes}>{inner}<target dev='vda'/></disk></devices></domain>"
    (found,) = domain_xml.disks_of(ET.fromstring(xml))
    return found


QCOW2 = "<driver type='qcow2'/>"


@pytest.mark.parametrize(
    ("inner", "attributes", "left_out", "obstacle"),
    [
        (f"{QCOW2}<source file='/a'/>", "type='file'", None, None),
        ("<driver type='raw'/><source file='/a'/>", "type='file'", None, None),
        (f"{QCOW2}<source file='/a'/><iotune><total_iops_sec>1</total_iops_sec></iotune>", "type='file'", None, None),
        ("<source file='/a'/>", "type='file' device='cdrom'", "CD-ROM", None),
        ("", "type='file' device='cdrom'", "CD-ROM", None),
        ("<source file='/a'/>", "type='file' device='floppy'", "floppy", None),
        ("", "type='file'", "empty", None),
        (f"{QCOW2}<source file='/a'/><readonly/>", "type='file'", "read-only", None),
        (f"{QCOW2}<source file='/a'/><transient/>", "type='file'", "transient", None),
        ("<driver type='raw'/><source dev='/dev/a'/>", "type='block' device='lun'", None, "SCSI device passed"),
        ("<driver type='raw'/><source dev='/dev/a'/>", "type='block'", None, "on a block device"),
        (f"{QCOW2}<source file='/a'/><shareable/>", "type='file'", None, "shared with other guests"),
        (f"{QCOW2}<source file='/a'><encryption format='luks'/></source>", "type='file'", None, "encrypts its image"),
        ("<driver type='raw'/><source protocol='rbd' name='p/i'/>", "type='network'", None, "on the network"),
        ("<driver type='raw'/><source type='pci'/>", "type='nvme'", None, "type 'nvme'"),
        ("<driver type='vmdk'/><source file='/a'/>", "type='file'", None, "format is vmdk"),
        ("<source file='/a'/>", "type='file'", None, "format is not recorded"),
    ],
)
def test_each_kind_of_disk_has_a_word(inner: str, attributes: str, left_out: str | None, obstacle: str | None) -> None:
    found = disk(inner, attributes=attributes)
    assert domain_xml.left_out(found) == left_out
    if left_out is None:
        why = domain_xml.obstacle(found)
        assert (why is None) is (obstacle is None)
        assert (obstacle or "") in (why or "")


def test_a_chain_with_its_numbers_filters_and_mirror() -> None:
    found = disk(
        f"{QCOW2}<source file='/c' index='5'/><backingStore type='block' index='2'><format type='raw'/>"
        "<source dev='/dev/b'/><backingStore/></backingStore>"
        "<throttlefilters><throttlefilter group='slow'/></throttlefilters>"
        "<mirror type='file' job='active-commit' ready='yes'><source file='/dev/b' index='2'/></mirror>"
    )
    assert [(layer.kind, layer.path, layer.index, layer.image_format) for layer in found.layers] == [
        ("file", Path("/c"), "5", "qcow2"),
        ("block", Path("/dev/b"), "2", "raw"),
    ]
    assert (found.is_whole, found.filters, found.mirror) == (True, ("slow",), ("active-commit", True))
    assert not disk(f"{QCOW2}<source file='/c'/>").is_whole


DOMAIN = """<domain><name>web1</name><os><type machine='pc-q35-7.2'>hvm</type>{nvram}</os><devices>
  <disk type='file' device='cdrom'><source file='/iso/a.iso'/><target dev='sda'/></disk>
  <interface type='network'><mac address='52:54:00:00:00:01'/></interface>
  <interface type='hostdev'><mac address='52:54:00:00:00:02'/>
    <source><address type='pci' domain='0x0000' bus='0x03' slot='0x10' function='0x1'/></source></interface>
  <hostdev mode='subsystem' type='pci'><source><address domain='0' bus='1' slot='0' function='0'/></source></hostdev>
  <hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/><product id='0xbeef'/></source></hostdev>
  <hostdev mode='subsystem' type='mdev'><source><address uuid='c2177883'/></source></hostdev>
  <filesystem><source dir='/srv'/></filesystem>
  {tpm}
</devices></domain>"""
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def test_what_belongs_to_a_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvram, state = tmp_path / "VARS.fd", tmp_path / "swtpm" / "uuid" / "tpm2"
    nvram.write_bytes(b"variables")
    state.mkdir(parents=True)
    (state / "tpm2-00.permall").write_bytes(b"keys")
    (state / ".lock").touch()
    monkeypatch.setattr("snapchain.guest.libvirt_definition._SYSTEM_TPM", tmp_path / "swtpm")
    xml = DOMAIN.format(nvram=f"<nvram>{nvram}</nvram>", tpm=TPM)

    def found(*, with_secrets: bool) -> dict[str, object]:
        definition = definition_of("web1", "uuid", live=None, inactive=xml, with_secrets=with_secrets, is_session=False)
        assert definition.machine == "pc-q35-7.2"
        assert definition.macs == ("52:54:00:00:00:01", "52:54:00:00:00:02")
        assert definition.media == ("/iso/a.iso",)
        assert definition.immovable == (
            "pci device 0000:01:00.0", "usb device 1234:beef", "mdev device c2177883",
            "network device 0000:03:10.1", "directory /srv",
        )  # fmt: skip
        files = {(each.role, each.name, each.secret): each.data for each in definition.files}
        return {"files": files, "unreadable": definition.unreadable}

    variables = {("nvram", "VARS.fd", False): b"variables"}
    assert found(with_secrets=True) == {
        "files": {**variables, ("tpm", "tpm2-00.permall", True): b"keys"},
        "unreadable": (),
    }
    without = found(with_secrets=False)
    assert without["files"] == variables
    assert "only an encrypted repository" in str(without["unreadable"])
    nvram.unlink()
    assert f"{nvram} (nvram)" in str(found(with_secrets=True)["unreadable"])


def test_where_a_tpm_keeps_its_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tpm_directory("u", "1.2", is_session=False) == Path("/var/lib/libvirt/swtpm/u/tpm1.2")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tpm_directory("u", "2.0", is_session=True) == tmp_path / "libvirt/qemu/swtpm/u/tpm2"


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("running (booted)", State.RUNNING),
        ("idle", State.RUNNING),
        ("in shutdown (user)", State.RUNNING),
        ("paused (user)", State.PAUSED),
        ("paused (I/O error)", State.PAUSED),
        ("pmsuspended (unknown)", State.PAUSED),
        ("crashed (panicked)", State.PAUSED),
        ("paused (migrating)", State.INCOMING),
        ("paused (post-copy failed)", State.INCOMING),
        ("shut off (migrated)", State.OFF),
        ("shut off (crashed)", State.OFF),
        ("shut off (saved)", State.OFF),
        ("crashed (unknown)", State.OFF),
        ("no state", State.OFF),
    ],
)
def test_states(said: str, state: State) -> None:
    assert state_of(f"{said}\n\n") is state


LOCKED = "error: Timed out during operation: cannot acquire state change lock (held by monitor=remoteDispatchDomain)"


@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [
        ("error: failed to get domain 'x'", 1, NotFound),
        ("error: Operation not supported: disk 'vda' already in active block job", 1, Busy),
        ("error: internal error: Node 'libvirt-1-format' is busy: block device is in use by block job", 1, Busy),
        (LOCKED, 1, Busy),
        ("error: failed to connect to the hypervisor\nerror: Failed to connect socket", 1, Unavailable),
        ("error: End of file while reading data: Input/output error", 1, Unavailable),
        ("error: authentication unavailable: no polkit agent available", 1, Unavailable),
        ("error: unsupported configuration: something else", 1, ToolFailed),
        ("", -signal.SIGPIPE, Unavailable),
        ("", 127, ToolFailed),
    ],
)  # fmt: skip
def test_words_of_libvirt_become_errors(said: str, status: int, expected: type[SnapchainError]) -> None:
    failed = ToolFailed("ended with exit status 1", argv=["virsh"], status=status, stderr=said)
    assert type(explained(failed, ["dumpxml"], uri="qemu:///system", name="web1")) is expected


@pytest.mark.parametrize(
    "uri", ["qemu:///system", "qemu:///session", "qemu+unix:///system?socket=/a", "test:///default"]
)
def test_daemons_of_this_host(uri: str) -> None:
    check_local(uri)


@pytest.mark.parametrize(
    "uri", ["qemu+ssh://root@kvm2/system", "qemu+tcp:///system", "qemu://kvm2/system", "xen:///system"]
)
def test_other_daemons_are_refused(uri: str) -> None:
    with pytest.raises(Unsupported) as refused:
        check_local(uri)
    assert refused.value.subject == uri
    with pytest.raises(InvalidInput, match="not a URI"):
        check_local("system")
