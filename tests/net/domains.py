"""Two hosts that each have a libvirtd, an sshd and a state of snapchain; a domain moves between them.

    with domain_hosts(folder) as (near, far, cable):
        near.define("web1", disks)
        near.migrate("web1", far, "replica", "--max-downtime", 10)

Spy: a proxy before a libvirtd that sees which calls of a migration come and are answered, and may do something then.
"""

from __future__ import annotations

import os
import shlex
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.guest.libvirt import definition, disk_xml
from tests.libvirtd import LibvirtHost
from tests.net.commands import reported, started
from tests.net.libvirt_host import libvirt_host
from tests.net.namespaces import Cable, two_hosts
from tests.net.sshd import SshHost, sshd
from tests.net.test_replica_over_ssh import remote

PATIENT = ("--max-downtime", "60")


@dataclass
class Side:
    """One host. way: the sshd by which the other one reaches it; folder: of its own state, run: of its sockets

    uri: of libvirt, as a snapchain on this host finds it that the other one has started
    """

    name: str
    host: LibvirtHost
    folder: Path
    run: Path
    way: SshHost = field(init=False)
    other: Side = field(init=False, repr=False)
    uri: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Of snapchain on this host, for a move to the other one."""
        settings = self.other.state
        if self.other.uri is not None:
            settings["LIBVIRT_DEFAULT_URI"] = self.other.uri
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
        return {
            **os.environ,
            **self.state,
            "SNAPCHAIN_SSH": shlex.join(("ssh", "-F", str(self.other.way.config))),
            "SNAPCHAIN_REMOTE": f"env {words} {remote()}",
        }

    @property
    def state(self) -> dict[str, str]:
        return {
            "XDG_STATE_HOME": str(self.folder / "state"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "XDG_RUNTIME_DIR": str(self.run),
        }

    def define(self, name: str, disks: Mapping[str, Path], **more: Any) -> None:
        """Define a domain, and start it."""
        xml = self.folder / f"{name}.xml"
        # Else SeaBIOS would show its guest the first one only.
        ordered = "".join(
            disk_xml(target, path, more=f"<boot order='{number}'/>")
            for number, (target, path) in enumerate(disks.items(), 1)
        )
        xml.write_text(definition(name, {}, **{**more, "more": ordered + more.get("more", "")}))
        self.host.virsh("define", xml)
        self.host.virsh("start", name)

    def begin(self, *words: object) -> subprocess.Popen[str]:
        """snapchain on this host; the process is its own."""
        inside = [*self.host.inside, "env", f"--chdir={Path.cwd()}"]
        return started(words, environment=self.environment, inside=inside)

    def begin_migration(self, name: str, replica: Path, *words: object) -> subprocess.Popen[str]:
        address = self.other.way.url(replica)
        return self.begin("migrate", "--domain", name, address, "--json", *PATIENT, *words)

    def snapchain(self, *words: object) -> tuple[int, Any]:
        """Its exit code, and the JSON object that it prints."""
        return reported(self.begin(*words, "--json"))

    def migrate(self, name: str, replica: Path, *words: object) -> dict[str, Any]:
        """The report of a move to the other host that succeeds."""
        status, report = reported(self.begin_migration(name, replica, *words))
        assert status == 0, report
        found: dict[str, Any] = report
        return found

    def state_of(self, name: str) -> str:
        """As libvirt says it; "" for a domain that it does not have."""
        argv = [*self.host.inside, "virsh", "-c", self.host.uri, "domstate", name]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def records(self) -> list[Path]:
        """What is in flight in guests here."""
        return list((self.folder / "state").glob("snapchain/guests/*.json"))

    def leftovers(self) -> list[Path]:
        """Directories for sockets of moves."""
        return [*(self.host.folder / "run" / "qemu").glob("snapchain-*"), *self.run.glob("snapchain/*")]

    @property
    def socket(self) -> Path:
        """Of its libvirtd, as it is reached from anywhere."""
        return self.host.folder / "run" / "libvirt-sock"


@contextmanager
def domain_hosts(folder: Path) -> Iterator[tuple[Side, Side, Cable]]:
    """Both, and the cable between them."""
    with ExitStack() as stack:
        one, two, cable = stack.enter_context(two_hosts())
        sides = []
        for name, host in (("kvm1", one), ("kvm2", two)):
            (folder / name).mkdir(parents=True)
            there = stack.enter_context(libvirt_host(host, folder / name / "libvirt", name))
            run = stack.enter_context(TemporaryDirectory(prefix="sc"))  # a short path, for sockets
            sides.append(Side(name, there, folder / name, Path(run)))
        for side, host, other in ((sides[0], one, sides[1]), (sides[1], two, sides[0])):
            side.other = other
            side.way = stack.enter_context(
                sshd(
                    folder / side.name / "sshd",
                    alias=side.name,
                    address=host.address,
                    there=side.host.inside,
                    here=other.host.inside,
                )
            )
        yield sides[0], sides[1], cable


_HEADER = struct.Struct(">7I")
_PROGRAM = 0x20008086
CALLS = {302: "begin", 303: "prepare", 305: "perform", 306: "finish", 307: "confirm"}


class Spy:
    """Before the libvirtd of a side. events: what has come by, such as `prepare call`, `prepare answer`

    on: called with each event before it is passed on; True drops it, and the connection
    """

    def __init__(self, path: Path, daemon: Path, on: Callable[[str], bool]) -> None:
        self.events: list[str] = []
        self.faults: list[Exception] = []
        self.uri = f"qemu+unix:///system?socket={path}"
        self._daemon, self._on = str(daemon), on
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Raises what `on` has raised."""
        self._listening.close()
        if self.faults:
            raise self.faults[0]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            server.connect(self._daemon)
            answers = threading.Thread(target=self._pass_on, args=(server, client), daemon=True)
            answers.start()
            self._pass_on(client, server)
            answers.join()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        pending = b""
        with suppress(OSError):
            while piece := source.recv(1 << 20):
                pending += piece
                while len(pending) >= _HEADER.size and len(pending) >= (length := _HEADER.unpack_from(pending)[0]):
                    if self._drops(pending):
                        pending = b""
                        raise ConnectionAbortedError
                    sink.sendall(pending[:length])
                    pending = pending[length:]
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _drops(self, message: bytes) -> bool:
        _, program, _, procedure, kind, _, _ = _HEADER.unpack_from(message)
        if program != _PROGRAM or procedure not in CALLS or kind not in (0, 1):
            return False
        event = f"{CALLS[procedure]} {('call', 'answer')[kind]}"
        self.events.append(event)
        try:
            return self._on(event)
        except Exception as error:  # noqa: BLE001 - raised by `close`: a thread of ours would take it along
            self.faults.append(error)
            return True
