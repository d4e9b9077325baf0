"""Live merges of domains of a real libvirtd: commit, active commit, and what is chosen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapchain.errors import Busy, Unsupported
from snapchain.guest.address import open_guest
from snapchain.guest.libvirt_guest import LibvirtGuest
from snapchain.guest.libvirt_jobs import LibvirtJob
from snapchain.guest.protocol import JobKind
from snapchain.merge.live import LiveMergePlan, plan
from snapchain.merge.live_run import run
from snapchain.merge.request import MergeRequest
from snapchain.merge.run import MergeReport
from snapchain.model.events import Event
from snapchain.model.merging import Strategy
from snapchain.ops import doctor
from tests.guest.libvirt import Domain
from tests.guest.live_chain import MIB, Chain, K, layer, links, names, sound
from tests.libvirtd import LibvirtHost

pytestmark = pytest.mark.root

_NAMES = itertools.count(1)
Start = Callable[[Path], Domain]


@pytest.fixture
def start(libvirt_host: LibvirtHost, tmp_path: Path) -> Iterator[Start]:
    begun: list[Domain] = []

    def one(active: Path) -> Domain:
        domain = Domain.started(libvirt_host, tmp_path / "domain", {"vda": active}, name=f"live{next(_NAMES)}")
        begun.append(domain)
        return domain

    yield one
    for domain in begun:
        domain.remove()


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "images")


def journals(chain: Chain) -> list[str]:
    return [path.name for path in chain.folder.iterdir() if path.name.startswith(".snapchain-merge-")]


def merged(
    domain: Domain, request: MergeRequest, on_event: Callable[[Event], None] = lambda _event: None
) -> tuple[LiveMergePlan, MergeReport]:
    guest = LibvirtGuest(domain.address)
    planned = plan(guest, "vda", request)
    return planned, run(guest, planned, on_event=on_event)


def test_a_commit_of_sealed_layers(start: Start, chain: Chain) -> None:
    domain = start(chain.active)
    request = MergeRequest(image=chain.active, from_layer="1.qcow2", to_layer="3.qcow2")
    planned, report = merged(domain, request)
    # Nothing is streamed through libvirt.
    assert planned.jobs == (JobKind.COMMIT,)
    assert set(report.removed) == {chain.files[2], chain.files[3]}
    assert names(chain.active) == ["0.qcow2", "1.qcow2", "4.qcow2"]
    assert links(chain.active) == [None, "0.qcow2", "1.qcow2"]
    chain.check_view(chain.files[1], "3.qcow2")
    assert not journals(chain)
    domain.kill()
    chain.check_view(chain.active, "4.qcow2")
    sound(chain.active)
    domain.virsh("start")
    assert domain.state() == "running"


def test_an_active_commit_is_known_to_the_next_start(start: Start, chain: Chain) -> None:
    domain = start(chain.active)
    planned, report = merged(domain, MergeRequest(image=chain.active, strategy=Strategy.COMMIT))
    assert planned.jobs == (JobKind.ACTIVE_COMMIT,)
    assert set(report.removed) == set(chain.files[2:])
    assert domain.source("vda", "--inactive") == chain.files[1]
    domain.write("vda", 3 * MIB, 64 * K, 55)
    assert names(chain.files[1]) == ["0.qcow2", "1.qcow2"]
    domain.kill()
    sound(chain.files[1])
    domain.virsh("start")
    assert domain.source("vda") == chain.files[1]


def test_a_domain_that_ended_after_a_pivot_that_nobody_saw(
    start: Start, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its definition tells that it was switched: the layers above are stale, and go."""
    domain = start(chain.active)

    class DiedError(BaseException):
        pass

    def die(job: LibvirtJob) -> None:
        raise DiedError("here")

    monkeypatch.setattr(LibvirtJob, "dismiss", die)
    with pytest.raises(DiedError, match="here"):
        merged(domain, MergeRequest(image=chain.active, strategy=Strategy.COMMIT))
    monkeypatch.undo()
    domain.write("vda", MIB, 64 * K, 55)
    domain.io("vda", "flush")
    domain.kill()
    assert journals(chain)
    report = doctor.run(doctor.plan([chain.folder]))
    assert report.well, report
    assert not journals(chain)
    assert sorted(path.name for path in chain.folder.glob("*.qcow2")) == ["0.qcow2", "1.qcow2"]
    domain.virsh("start")
    assert domain.reads("vda", MIB, 64 * K, 55)


def test_a_base_of_another_image_is_not_committed_into(start: Start, chain: Chain) -> None:
    """And what libvirt cannot do is not recommended."""
    layer(chain.folder / "clone.qcow2", chain.files[0], chain.size)
    domain = start(chain.active)
    with open_guest(domain.address) as guest, pytest.raises(Unsupported, match=r"clone\.qcow2") as refused:
        plan(guest, "vda", MergeRequest(image=chain.active, flatten=True))
    assert refused.value.hint == "merge it while the guest is off"


@pytest.mark.parametrize("to", ["3.qcow2", None])
def test_a_stream_is_refused(start: Start, chain: Chain, to: str | None) -> None:
    """Of sealed layers and into the active one: through libvirt nobody can flush its result."""
    domain = start(chain.active)
    request = MergeRequest(image=chain.active, from_layer="1.qcow2", to_layer=to, strategy=Strategy.ABSORB)
    with pytest.raises(Unsupported, match="does not stream through libvirt") as refused:
        merged(domain, request)
    assert "--strategy commit" in str(refused.value.hint)
    assert len(names(chain.active)) == 5
    assert not journals(chain)


def test_a_foreign_job_is_respected(start: Start, chain: Chain, tmp_path: Path) -> None:
    domain = start(chain.active)
    target = tmp_path / "copy.qcow2"
    words = ("--transient-job", "--format", "qcow2", "--bandwidth", "1")
    domain.virsh("blockcopy", "--path", "vda", "--dest", target, *words)
    with pytest.raises(Busy, match="vda"):
        merged(domain, MergeRequest(image=chain.active, to_layer="3.qcow2"))
    assert len(names(chain.active)) == 5
    assert not journals(chain)
