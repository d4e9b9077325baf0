"""Boot tests read the clone's disks from the destination: nothing is restored, and nothing is left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from snapchain.cli import main
from snapchain.errors import InvalidInput
from snapchain.host.qemu_options import split
from snapchain.ops.failover import trial as module
from snapchain.ops.failover.served_disks import socket_of
from snapchain.ops.restore import domain_xml, qemu_argv
from snapchain.ops.restore.changed_definition import Changes, NewDisk
from tests.guest.agent_guest import boot_arguments
from tests.ops.guest_points import DOMAIN, Open, opened
from tests.ops.test_failover import argv
from tests.ops.test_failover_trial import check_nothing_is_left, place, stored, tried

__all__ = ["place"]

MiB = 1 << 20
_taken = module._taken
LOG = Path("/clone/console.log")


def bootable(folder: Path) -> tuple[str, ...]:
    """The small guest with an agent, on the disks of `argv`; its console waits for a client."""
    return (
        *(word if word != "32" else "256" for word in argv(folder)),
        *boot_arguments(),
        *("-chardev", f"socket,id=console,path={folder}/console,server=on,wait=on", "-serial", "chardev:console"),
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=ga,path={folder}/ga,server=on,wait=off"),
        *("-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0"),
    )


def test_a_guest_boots_from_its_point_until_its_agent_answers(
    place: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []

    def taken(images: Sequence[Path]) -> int:
        seen.append(_last(images))
        return _taken(images)

    monkeypatch.setattr(module, "_taken", taken)
    stored(place, tmp_path, bootable(tmp_path))
    report = tried(place, tmp_path)
    assert (report.ok, report.by, report.served, report.console) == (True, "agent", True, ())
    assert 0 < report.bytes_written < 2 * MiB, "only the overlays"
    assert "AGENT GUEST READY" in "".join(seen[-1]), "its console was written down, although its socket had no client"
    check_nothing_is_left(place, tmp_path)


def _last(images: Sequence[Path]) -> tuple[str, ...]:
    return module._last_lines(images[0].with_name("console.log"))


def test_one_that_does_not_boot_shows_its_console(
    place: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(place, tmp_path, argv(tmp_path))
    with pytest.raises(InvalidInput, match="are both wanted"):
        tried(place, tmp_path, check=["true"], console_says="x")
    monkeypatch.setattr(module, "_last_lines", lambda _: ("Kernel panic", "\x1b[31mno root"))
    replica = opened("replica", None, tmp_path)  # type: ignore[arg-type]
    stored(replica, tmp_path / "r", argv(tmp_path))
    words = ["verify", f"dir:{tmp_path}/replica::web1", "--boot", "--into", str(tmp_path / "trial")]
    assert main([*words, "--console-says", "login:", "--timeout", "1s"]) == 5
    out = capsys.readouterr().out
    assert "did not boot: its console does not say 'login:'" in out
    assert "Kernel panic" in out
    assert "\x1b[31m" not in out
    assert main(words) == 0, "it runs, and has no agent"
    check_nothing_is_left(replica, tmp_path)
    assert main(["verify", f"dir:{tmp_path}/replica::web1", "--boot", "--read-data"]) == 2
    assert main(["verify", f"dir:{tmp_path}/replica::web1", "--console-says", "x"]) == 2


def test_what_takes_too_much_of_this_host_ends(place: Open, tmp_path: Path) -> None:
    stored(place, tmp_path, argv(tmp_path))
    report = tried(place, tmp_path, console_says="never", space=1, seconds=10.0)
    assert (report.ok, report.by) == (False, "console")
    assert "may take 1" in (report.why_not or "")
    whole = tried(place, tmp_path, restores=True)
    assert (whole.ok, whole.served, whole.bytes_written > 0) == (True, False, True)
    check_nothing_is_left(place, tmp_path)


def test_the_console_is_found_in_a_file_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "console"
    search = module._Search(path, "login:")
    assert search.missing() is not None
    path.write_bytes(b"x" * 3 * MiB + b"lo")
    assert "does not say 'login:'" in (search.missing() or "")
    with path.open("ab") as file:
        file.write(b"gin: ")
    assert search.missing() is None
    path.write_bytes(b"\xff\n" * 9000 + b"\n".join(b"line %d" % number for number in range(100)) + b"\r\n\n")
    assert module._last_lines(path) == tuple(f"line {number}" for number in range(80, 100))
    assert module._last_lines(tmp_path / "none") == ()


def test_a_socket_that_the_kernel_takes(tmp_path: Path) -> None:
    assert socket_of(Path("/var/tmp/web1-test-0123abcd")) == Path("/var/tmp/web1-test-0123abcd/disks.sock")
    long = socket_of(Path("/" + "x" * 80) / "web1-test-0123abcd")
    assert long.name == "boot-0123abcd.sock"
    assert len(os.fsencode(long)) < 104


@pytest.mark.parametrize(
    ("port", "said"),
    [
        ((), ["null,id=snapchain-console"]),
        (("-serial", "stdio"), ["null,id=snapchain-console"]),
        (("-serial", "unix:/old/s,server=on"), ["socket,id=snapchain-console,path=/clone/s,server=on,wait=off"]),
        (("-chardev", "pty,id=a", "-serial", "chardev:a"), ["backend=pty,id=a"]),
        (("-chardev", "pty,id=a,logfile=/old/log", "-device", "isa-serial,chardev=a"), ["backend=pty,id=a"]),
        (("-chardev", "pty,id=a", "-device", "virtserialport,chardev=a"), ["pty,id=a", "null,id=snapchain-console"]),
    ],
)
def test_the_first_serial_port_of_a_command_line_is_logged(port: tuple[str, ...], said: list[str]) -> None:
    changes = Changes(disks={}, directory=Path("/clone"), without_network=True, console=LOG)
    line = qemu_argv._changed(["qemu", "-M", "q35", *port], changes, "test")
    words = list(line.words())
    chardevs = [value for name, value in pairwise(words) if name == "-chardev"]
    logged = f",logfile={LOG},logappend=off"
    assert chardevs == [*said[:-1], said[-1] + logged]
    assert all(split(each) for each in chardevs)


@pytest.mark.parametrize(
    "ports",
    [
        "",
        (
            "<serial type='pty'><target port='0'/><log file='/old'/></serial>"
            "<console type='pty'><target type='serial'/></console>"
        ),
        "<serial type='file'><source path='/old'/></serial>",
        "<console type='pty'><target type='virtio'/></console>",
    ],
)
def test_the_first_serial_port_of_a_domain_is_logged(ports: str) -> None:
    disks = {name: NewDisk(Path(f"/clone/{name}.qcow2"), "qcow2") for name in ("vda", "vdb")}
    changes = Changes(disks=disks, directory=Path("/clone"), without_network=True, console=LOG)
    text = DOMAIN.replace("</devices>", f"{ports}</devices>")
    devices = ET.fromstring(domain_xml.change(text, changes, subject="test").text).find("devices")
    assert devices is not None
    found = [each for each in devices if each.tag in ("serial", "console")]
    (port,) = found
    assert [(each.get("file"), each.get("append")) for each in port.findall("log")] == [(str(LOG), "off")]
