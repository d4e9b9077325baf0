"""From QEMU's answers to disks: generated graphs, and answers that no QEMU would give."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from snapchain.errors import SnapchainError
from snapchain.guest import graph
from snapchain.guest.address import GuestAddress
from snapchain.guest.graph import FILTERS, Inconsistent, Misread, source_of
from snapchain.guest.protocol import GuestDisk, JobKind
from snapchain.guest.qemu_files import Located
from snapchain.guest.qmp import Monitor, Refused
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.model.disk_name import is_disk_name
from tests.exhaustive import examples
from tests.guest.machine import Machine

MiB = 1 << 20
Row = dict[str, Any]


def locate(name: str) -> Located:
    """Each path is a file of its own, all of them there."""
    return Located(Path(name), (1, hash(name)))


# --- Generated graphs.


@dataclass(frozen=True)
class Node:
    name: str
    driver: str
    path: str


@dataclass(frozen=True)
class Device:
    name: str
    nodes: tuple[Node, ...]
    """From the root down: filters and images, the last one an image."""

    @property
    def images(self) -> list[Node]:
        return [node for node in self.nodes if node.driver not in FILTERS]


@st.composite
def devices(draw: st.DrawFn) -> list[Device]:
    """Some devices. They may share the files of lower layers, each with nodes of its own; active ones are their own."""
    found = []
    number = 0
    for device in range(draw(st.integers(1, 4))):
        nodes: list[Node] = []
        depth = draw(st.integers(1, 6))
        for level in range(depth):
            for _ in range(draw(st.integers(0, 2))):
                number += 1
                nodes.append(Node(f"f{number}", draw(st.sampled_from(sorted(FILTERS))), ""))
            number += 1
            is_root = level == depth - 1
            path = f"/images/{device}-{level}" if level == 0 else f"/images/shared-{depth - level}"
            driver = draw(st.sampled_from(["qcow2", "raw"])) if is_root else "qcow2"
            name = draw(st.sampled_from([f"#block{number}", f"sc-{number}", f"n{number}"]))
            nodes.append(Node(name, driver, path))
        found.append(Device(f"vd{device}", tuple(nodes)))
    return found


def answers(found: Sequence[Device]) -> tuple[list[Row], list[Row], list[Row]]:
    """As QEMU 7.2 gives them: images and statistics nested, nodes flat and in another order."""
    block, stats, nodes = [], [], []
    for device in found:
        image: Row | None = None
        stat: Row | None = None
        below: Node | None = None
        for node in reversed(device.nodes):
            is_filter = node.driver in FILTERS
            image = {
                "filename": f'json:{{"driver": "{node.driver}"}}' if is_filter else node.path,
                "format": node.driver,
                "virtual-size": 8 * MiB,
                **({"backing-image": image} if image is not None else {}),
            }
            if not is_filter:
                if below is not None:
                    image |= {"backing-filename": below.path, "full-backing-filename": below.path}
                below = node
            stat = {"node-name": node.name, **({"backing": stat} if stat is not None else {})}
            bitmap = {"name": f"b-{node.name}", "granularity": 65536, "recording": True, "persistent": True}
            bitmaps = [] if is_filter else [bitmap, {"granularity": 4096, "recording": True}]
            nodes.append({"node-name": node.name, "drv": node.driver, "file": node.path, "dirty-bitmaps": bitmaps})
        qdev = f"/machine/peripheral/{device.name}/virtio-backend"
        root = device.nodes[0].name
        block.append(
            {
                "device": "",
                "qdev": qdev,
                "removable": False,
                "inserted": {"node-name": root, "ro": False, "image": image},
            }
        )
        stats.append({"device": "", "qdev": qdev, **(stat or {})})
    return block, stats[::-1], nodes[::-1]


@pytest.mark.sampled
@settings(max_examples=examples(60), deadline=None)
@given(devices())
def test_every_device_gets_its_own_nodes(found: list[Device]) -> None:
    """Also where two have the same file below: matching by names of files would mix them up."""
    disks = [view.disk for view in graph.disks(*answers(found), locate=locate)]
    assert [disk.name for disk in disks] == [device.name for device in found]
    for disk, device in zip(disks, found, strict=True):
        assert [(layer.node, str(layer.path), layer.image_format) for layer in disk.chain] == [
            (node.name, node.path, node.driver) for node in reversed(device.images)
        ]
        assert disk.root == device.nodes[0].name
        assert list(disk.filters) == [node.name for node in device.nodes[: device.nodes.index(device.images[0])]]
        assert all([bitmap.name for bitmap in layer.bitmaps] == [f"b-{layer.node}"] for layer in disk.chain)
        assert disk.obstacle is None
        assert disk.left_out is None


@pytest.mark.sampled
@settings(max_examples=examples(30), deadline=None)
@given(devices())
def test_without_the_list_of_nodes_only_bitmaps_are_missing(found: list[Device]) -> None:
    """Beside a stream they cannot be listed."""

    def bare(disk: GuestDisk) -> object:
        return disk.root, disk.filters, [(layer.node, layer.path, layer.virtual_size) for layer in disk.chain]

    block, stats, nodes = answers(found)
    with_nodes = graph.disks(block, stats, nodes, locate=locate)
    without = graph.disks(block, stats, None, locate=locate)
    assert [bare(each.disk) for each in with_nodes] == [bare(each.disk) for each in without]


def test_answers_from_two_moments_are_noticed() -> None:
    device = Device("vda", (Node("top", "qcow2", "/a"), Node("base", "qcow2", "/b")))
    block, stats, nodes = answers([device])
    for spoil in (
        lambda: stats[0].pop("backing"),
        lambda: stats[0].update({"node-name": "new"}),
        lambda: stats[0].update({"qdev": "gone"}),
    ):
        before = copy.deepcopy(stats)
        spoil()
        with pytest.raises(Inconsistent, match="the block graph changed at"):
            graph.disks(block, stats, nodes, locate=locate)
        stats[:] = before
    assert graph.disks(block, stats, nodes, locate=locate)


def test_a_chain_without_end_is_refused() -> None:
    device = Device("vda", tuple(Node(f"n{at}", "qcow2", f"/{at}") for at in range(300)))
    assert len(graph.disks(*answers([device]), locate=locate)[0].disk.chain) == 300
    image: Row = {"filename": "/a", "format": "qcow2", "virtual-size": 1}
    image["backing-image"] = image
    stat: Row = {"node-name": "a", "qdev": "x", "device": ""}
    stat["backing"] = stat
    block = [{"qdev": "x", "device": "", "inserted": {"node-name": "a", "image": image}}]
    with pytest.raises(Misread, match="more than 1000 images"):
        graph.disks(block, [stat], [], locate=locate)


FILE = '{"driver": "file", "filename": "/a"}'


@pytest.mark.parametrize(
    ("filename", "path"),
    [
        ("/a/b.qcow2", "/a/b.qcow2"),
        ("b.qcow2", "b.qcow2"),
        ("a/b:c.qcow2", "a/b:c.qcow2"),
        ("file:b:c.qcow2", "b:c.qcow2"),
        ("nbd:host:10809", None),
        ("rbd:pool/image", None),
        ("https://host/a.qcow2", None),
        ('json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/a"}}', "/a"),
        ('json:{"backing": null, "driver": "qcow2", "file": {"driver": "throttle", "file": ' + FILE + "}}", "/a"),
        ('json:{"driver": "qcow2", "file": {"driver": "nbd", "server": {}}}', None),
        ('json:{"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "/a"}}', None),
        ('json:{"driver": "qcow2", "file": "node"}', None),
        ("json:" + '{"driver":"qcow2","file":' * 5000 + "1" + "}" * 5000, None),
        ("json:{", None),
        ("json:[]", None),
        ("", None),
    ],
)  # fmt: skip
def test_what_a_name_of_an_image_means(filename: str, path: str | None) -> None:
    found = source_of(filename)
    assert found.path == path
    assert len(found.says) < 300


@pytest.mark.parametrize("how", ["luks", "qcow2"])
def test_an_encrypted_image_gets_no_overlay_in_plain(how: str) -> None:
    block, stats, nodes = answers([Device("vda", (Node("n", how, "/a"),))])
    block[0]["inserted"]["encrypted"] = how == "qcow2"
    disk = graph.disks(block, stats, nodes, locate=locate)[0].disk
    assert disk.obstacle == "it is encrypted; a new overlay would not be"


@pytest.mark.parametrize(
    ("qdev", "device", "name"),
    [
        ("/machine/peripheral/vda/virtio-backend", "", "vda"),
        ("/machine/peripheral/virtio-disk0/virtio-backend", "drive-virtio-disk0", "virtio-disk0"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "drive0", "drive0"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "", "disk3"),
        ("cd2", "", "cd2"),
        ("/machine/peripheral/../x", "", "disk3"),
        ("/machine/peripheral/a:b@c/virtio-backend", "", "a-b-c"),
        ("", "\x1b[2J", "2J"),
        ("", ".guest", "guest"),
    ],
)
def test_names_of_disks(qdev: str, device: str, name: str) -> None:
    assert graph.name_of(qdev, device, 3) == name
    assert is_disk_name(f"web1/{name}")


def test_two_disks_of_one_name_are_told_apart() -> None:
    found = [Device("vda", (Node(f"n{at}", "qcow2", f"/{at}"),)) for at in range(3)]
    block, stats, nodes = answers(found)
    for at, each in enumerate(block):
        each["device"] = stats[2 - at]["device"] = str(at)
    assert [view.disk.name for view in graph.disks(block, stats, nodes, locate=locate)] == ["vda", "vda.2", "vda.3"]


# --- Answers that no QEMU gives: each is one error of ours, or makes no difference.


class Recorded(Monitor):
    """Answers of a real QEMU, of which some were changed."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.path, self.peer = Path("/run/web1.qmp"), None
        self.known = known

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, **_options: object) -> Any:
        key = f"{command} {json.dumps(arguments, sort_keys=True)}"
        if key not in self.known and command not in self.known:
            raise Refused(command, "CommandNotFound", "unknown", subject=self.path)
        return self.known.get(key, self.known.get(command))

    def has(self, command: str, argument: str | None = None) -> bool:
        return argument is None or (command, argument) == ("query-named-block-nodes", "unknown")

    def mark(self) -> int:
        return 0

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a QEMU with two disks, a job and an export answers to all that is asked."""
    folder = tmp_path_factory.mktemp("recorded")
    for name, backing in (("base", None), ("top", "base"), ("other", None), ("target", None)):
        words = ["-b", str(folder / f"{backing}.qcow2"), "-F", "qcow2"] if backing else []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, folder / f"{name}.qcow2", "8M"], check=True)
    argv = ["-device", "virtio-serial", "-chardev", f"socket,path={folder / 'qga'},server=on,wait=off,id=c",
            "-device", "virtserialport,chardev=c,name=org.qemu.guest_agent.0",
            "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,id=net0"]  # fmt: skip
    disks = {"vda": folder / "top.qcow2", "vdb": folder / "other.qcow2"}
    with Machine(folder / "m", disks=disks, argv=argv) as machine:
        target = {
            "driver": "qcow2",
            "node-name": "t",
            "file": {"driver": "file", "filename": str(folder / "target.qcow2")},
        }
        machine.ask("blockdev-add", **target)
        machine.ask("blockdev-mirror", **{"job-id": "m", "device": "vdb-top", "target": "t", "sync": "full"})
        machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "nbd")}})
        machine.ask("block-export-add", **{"type": "nbd", "id": "e", "node-name": "vda-top", "name": "x"})
        queries = (
            "query-block", "query-blockstats", "query-named-block-nodes", "query-jobs", "query-status", "query-name",
            "query-chardev", "query-cpus-fast", "query-block-exports", "query-migrate", "query-uuid", "query-tpm",
            "x-debug-query-block-graph",
        )  # fmt: skip
        found = {name: machine.ask(name) for name in queries}
        for path in ("/machine/peripheral", "/machine/peripheral-anon"):
            found[f'qom-list {{"path": "{path}"}}'] = machine.ask("qom-list", path=path)
        found["qom-get"] = "org.qemu.guest_agent.0"
    return found


def test_devices_whose_data_are_elsewhere_or_are_the_hosts_own(known: dict[str, Any]) -> None:
    folder = 'qom-list {"path": "/machine/peripheral"}'
    devices = [
        {"name": "vda", "type": "child<scsi-block>"},
        {"name": "far", "type": "child<vhost-user-blk-pci>"},
        {"name": "gpu", "type": "child<vfio-pci>"},
    ]
    guest = QmpGuest(GuestAddress(qmp=Path("/run/web1.qmp")), monitor=Recorded({**known, folder: devices}))
    disks = {disk.name: disk for disk in guest.disks()}
    assert disks["vda"].obstacle == "the guest has the device itself (scsi-block)"
    assert (disks["far"].left_out, disks["far"].chain) == ("vhost-user-blk", ())
    assert guest.definition(with_secrets=True).immovable == (
        "vda (scsi-block) is a device of this host", "gpu (vfio-pci) is a device of this host",
    )  # fmt: skip


SMALL = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
FLAT = SMALL | st.lists(SMALL, max_size=3) | st.dictionaries(st.text(max_size=8), SMALL, max_size=3)
JUNK = FLAT | st.lists(FLAT, max_size=3) | st.dictionaries(st.text(max_size=8), FLAT, max_size=3)


def places(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all parts of a JSON value."""
    yield prefix
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in rows:
        yield from places(inner, (*prefix, key))


def changed(value: Any, place: tuple[Any, ...], junk: Any) -> Any:
    """A copy in which one part is something else, or is not there (junk: ...)."""
    if not place:
        return None if junk is ... else junk
    found = copy.deepcopy(value)
    at = found
    for key in place[:-1]:
        at = at[key]
    if junk is ...:
        del at[place[-1]]
    else:
        at[place[-1]] = junk
    return found


QUESTIONS: dict[str, Callable[[QmpGuest], object]] = {
    "disks": lambda guest: guest.disks(),
    "state": lambda guest: guest.state(),
    "process": lambda guest: guest.process(),
    "activities": lambda guest: guest.activities(),
    "statistics": lambda guest: guest.statistics("vda"),
    "definition": lambda guest: guest.definition(with_secrets=True),
    "agent": lambda guest: guest.agent(),
    "orphans": lambda guest: guest.overlays.close_orphans(),
    "job": lambda guest: guest.job("m", JobKind.COMMIT, "vda").progress(),
}


def ask_all(known: Mapping[str, Any]) -> dict[str, object]:
    """Everything, each either answered or one error of ours."""
    found: dict[str, object] = {}
    with suppress(SnapchainError):
        guest = QmpGuest(GuestAddress(qmp=Path("/run/web1.qmp")), monitor=Recorded(known))
        for name, question in QUESTIONS.items():
            try:
                found[name] = question(guest)
            except SnapchainError as error:
                found[name] = error
    assert all(len(str(each)) < 3000 for each in found.values() if isinstance(each, SnapchainError))
    return found


def test_the_recorded_answers_are_understood(known: dict[str, Any]) -> None:
    found = ask_all(known)
    assert not [each for each in found.values() if isinstance(each, SnapchainError)]
    assert {type(each).__name__ for each in (found["state"], found["definition"])} == {"State", "Definition"}


@pytest.mark.sampled
@settings(
    max_examples=examples(80),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_a_hostile_or_broken_qemu_causes_no_traceback(known: dict[str, Any], data: st.DataObject) -> None:
    spoilt = dict(known)
    for _ in range(data.draw(st.integers(1, 3))):
        command = data.draw(st.sampled_from(sorted(spoilt)))
        place = data.draw(st.sampled_from(list(places(spoilt[command]))))
        spoilt[command] = changed(spoilt[command], place, data.draw(JUNK | st.just(...)))
    ask_all(spoilt)
