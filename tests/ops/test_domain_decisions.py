"""The pure decisions of a domain's move: who has it, how far it is, and its definition at the destination."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from snapchain.errors import Conflict, Corrupt
from snapchain.guest.libvirt_guest import state_of
from snapchain.guest.libvirt_migration import DomainLook, Presence, look_of
from snapchain.guest.protocol import State
from snapchain.ops.migrate.live_domain import judge_domain
from snapchain.ops.migrate.live_settle import Verdict
from snapchain.ops.restore.changed_definition import NewDisk
from snapchain.ops.restore.domain_xml import change_for_migration
from snapchain.replica.stream.guest_messages import DomainPresence, Moving

THERE = Moving(alive=False, given=False, ran=False, clock=0.0)


def answers() -> list[Moving | None]:
    return [
        None,
        THERE,
        *(
            THERE.model_copy(update={"domain": domain, "given": given})
            for domain, given in itertools.product(DomainPresence, (False, True))
        ),
    ]


@pytest.mark.parametrize("here", Presence)
@pytest.mark.parametrize("there", answers())
@pytest.mark.parametrize("stage", ["moving", "switching", "switched"])
@pytest.mark.parametrize("is_lasting", [False, True])
def test_who_has_the_domain(stage: str, here: Presence, there: Moving | None, is_lasting: bool) -> None:
    """It stays only where it cannot have run there, and goes only where it has."""
    has_run = there is not None and (there.given or there.domain in (DomainPresence.HERE, DomainPresence.DEFINED))
    is_absent = there is not None and there.domain is DomainPresence.ABSENT and not there.given
    if here is Presence.RUNNING and stage != "moving" and (has_run or stage == "switched"):
        with pytest.raises(Conflict, match=r"^web1: .* the destination has it"):
            judge_domain(stage, here, there, is_lasting=is_lasting, subject="web1")
        return
    verdict = judge_domain(stage, here, there, is_lasting=is_lasting, subject="web1")
    if stage == "moving":
        assert verdict is Verdict.STAY  # libvirt was never asked
    elif stage == "switched":
        assert verdict is Verdict.MOVED
    elif here is Presence.RUNNING:
        assert verdict is Verdict.STAY  # no Finish was sent
    elif has_run:
        assert verdict is Verdict.MOVED
    elif is_absent:
        somebody_removed_it = here is Presence.ABSENT and is_lasting
        assert verdict is (Verdict.UNKNOWN if somebody_removed_it else Verdict.STAY)
    else:
        assert verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("running (migrated)", State.RUNNING),
        ("running (migration canceled)", State.RUNNING),
        ("running (post-copy)", State.INCOMING),
        ("paused (migrating)", State.INCOMING),
        ("paused (user)", State.PAUSED),
        ("shut off (migrated)", State.OFF),
    ],
)
def test_states_of_a_domain_that_moves(said: str, state: State) -> None:
    """`migrated` is how libvirt calls a domain that has come, until it is paused or ends."""
    assert state_of(said) is state


def test_how_a_domain_travels() -> None:
    said = "Job type: 2\ndisk_total: 4096\ndisk_remaining: 1024\nmemory_total: 100\nmemory_remaining: 7\n"
    said += (
        "memory_processed: 93\nmemory_bps: 1000\nmemory_iteration: 3\nmemory_dirty_rate: 2\nmemory_page_size: 4096\n"
    )
    assert look_of(said) == DomainLook(True, 4096, 1024, 7, 93, 1000.0, 3, 8192.0)
    assert look_of("Job type: 0\n\n") == DomainLook(is_active=False)


XML = """<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>web1</name>
  <os><nvram>/var/lib/libvirt/qemu/nvram/web1_VARS.fd</nvram></os>
  <devices>
    <disk type='volume' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source pool='p' volume='v'/>
      <backingStore type='file'><format type='raw'/><source file='/a/root.raw'/><backingStore/></backingStore>
      <target dev='vda' bus='virtio'/><serial>1</serial></disk>
    <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda' bus='sata'/><readonly/></disk>
    <tpm><backend type='emulator'/></tpm>
  </devices>
  <qemu:commandline><qemu:arg value='-foo'/></qemu:commandline></domain>"""


def test_the_definition_there() -> None:
    """Only the disks that move have other files; their chains are read from these."""
    text = change_for_migration(XML, {"vda": NewDisk(Path("/b/<&>'\".qcow2"), "qcow2")}, subject="web1")
    root = ET.fromstring(text)
    vda, cdrom = root.findall("devices/disk")
    assert vda.get("type") == "file"
    assert [(each.tag, each.attrib) for each in vda] == [
        ("driver", {"name": "qemu", "type": "qcow2", "cache": "none"}),
        ("source", {"file": "/b/<&>'\".qcow2"}),
        ("target", {"dev": "vda", "bus": "virtio"}),
        ("serial", {}),
    ]
    assert cdrom.find("source") is not None
    assert root.findtext("os/nvram") == "/var/lib/libvirt/qemu/nvram/web1_VARS.fd"
    assert root.find("devices/tpm") is not None
    assert "-foo" in text


def test_no_definition_with_entities() -> None:
    with pytest.raises(Corrupt, match=r"^web1: .*a document type"):
        change_for_migration(f"<!DOCTYPE x [<!ENTITY a 'b'>]>{XML}", {}, subject="web1")
