"""The hook in a real libvirtd: a guest that another host has taken over does not start, any other does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from snapchain.errors import Conflict
from snapchain.model.guest_state import Vouched
from snapchain.ops.failover.request import FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.failover.trial import TrialRequest, trial
from snapchain.ops.fence.hook import HookRequest, install
from snapchain.ops.guest_points_merge import guest_at
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from tests.guest.libvirt import Domain, definition
from tests.libvirtd import LibvirtHost, libvirtd
from tests.ops.guest_points import GUEST, Guest

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LibvirtHost]:
    with libvirtd(tmp_path_factory.mktemp("libvirt") / "host") as found:
        yield found


def test_a_failover_by_libvirt_and_the_old_domain_stays_down(host: LibvirtHost, tmp_path: Path) -> None:
    replica = ReplicaDestination(DirectoryEndpoint(tmp_path / "replica"))
    guest = Guest(tmp_path / "g")
    xml = tmp_path / "domain.xml"
    xml.write_text(definition(GUEST, guest.images))
    host.virsh("define", xml)
    inactive = host.virsh("dumpxml", "--inactive", GUEST)
    guest.point(replica, 1, inactive=inactive, live=None, uuid=host.virsh("domuuid", GUEST).strip())
    host.virsh("undefine", GUEST)
    install(HookRequest(folder=host.folder / "etc" / "hooks" / "qemu.d", at=[replica.url]))
    host.kill()
    host.start()  # libvirtd looks for hooks when it starts
    xml.write_text(definition(GUEST, guest.images))
    host.virsh("define", xml)
    host.virsh("start", GUEST)
    host.virsh("destroy", GUEST)
    host.virsh("undefine", GUEST)

    tried = trial(replica, guest_at(replica, GUEST), TrialRequest(directory=tmp_path / "trial", connect=host.uri))
    assert (tried.ok, tried.by) == (True, "running")
    assert host.virsh("list", "--all", "--name").split() == []
    assert list((tmp_path / "trial").iterdir()) == []

    request = FailoverRequest(
        directory=tmp_path / "out",
        vouched=Vouched(how="person", who="root@kvm2"),
        defines=True,
        connect=host.uri,
        starts=True,
        host="kvm2",
    )
    report = Failover(replica, GUEST, request).run()
    try:
        assert (report.defined, report.started) == (GUEST, True), "the hook lets the new master start"
        domain = Domain(host, GUEST)
        assert domain.source("vda") == Path(report.disks[0].path or "")
        assert domain.reads("vda", 64 << 10, 96 << 10, 1)
        domain.write("vdb", 0, 4096, 9)
        assert Failover(replica, GUEST, request).run().started, "said again, it changes nothing"
        again = replace(request, connect=None, defines=False)
        assert Failover(replica, GUEST, again).run().started, "it asks the libvirt that has the guest"
        with pytest.raises(Conflict, match=f"has defined it in the libvirt {re.escape(host.uri)}"):
            Failover(replica, GUEST, replace(request, connect="qemu:///system"))
    finally:
        host.virsh("destroy", GUEST)
        host.virsh("undefine", GUEST)

    host.virsh("define", xml)
    with pytest.raises(AssertionError, match="kvm2 has taken the guest web1 over by a failover"):
        host.virsh("start", GUEST)
    host.virsh("undefine", GUEST)
