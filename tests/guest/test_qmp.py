"""QMP over a socket: every way in which the other side can fail is one plain error, in bounded time and memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, ToolFailed, Unavailable
from snapchain.guest.qmp import LARGEST_ANSWER, Monitor, Refused, commands_of
from tests.guest.machine import Machine
from tests.guest.spy import DROP, LOSE, Fault, Place, Spy, messages
from tests.servers import DIE_WITH_PARENT

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\n'


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("machine")) as found:
        yield found


@contextmanager
def server(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[Path]:
    """A server of one client at a time, each served by a function of the test."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(4)

    def run() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client, suppress(OSError, ValueError):
                    serve(client)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield path
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def answering(answer: Callable[[dict[str, Any]], bytes]) -> Callable[[socket.socket], None]:
    """Greets, negotiates, and answers each command with the bytes of a function."""

    def serve(client: socket.socket) -> None:
        client.sendall(GREETING)
        for message in messages(client):
            command = json.loads(message)
            if command["execute"] == "qmp_capabilities":
                client.sendall(b'{"return": {}}\n')
            else:
                client.sendall(answer(command))

    return serve


def test_a_command_and_its_refusal(machine: Machine) -> None:
    with Monitor(machine.qmp) as monitor:
        assert monitor.fields("query-status")["running"] is True
        assert monitor.peer == machine.process.pid
        with pytest.raises(Refused, match="QEMU refused job-dismiss: Job not found") as caught:
            monitor.execute("job-dismiss", {"id": "sc-none"})
        assert caught.value.error_class in {"DeviceNotActive", "GenericError"}
        assert caught.value.exit_code == 8
        with pytest.raises(ToolFailed, match="the answer to query-status was not understood"):
            monitor.rows("query-status")
        with pytest.raises(ToolFailed, match="the answer to query-jobs was not understood"):
            monitor.fields("query-jobs")


def test_what_qemu_can_do_is_asked_not_guessed(machine: Machine, tmp_path: Path) -> None:
    with Spy(tmp_path / "spy", machine.qmp) as spy, Monitor(spy.path) as monitor:
        assert monitor.has("block-commit")
        assert not monitor.has("no-such-command")
        assert spy.names() == ["query-commands"], "the schema is large, and the guest waits for it"
        assert monitor.has("block-commit", "base-node")
        assert monitor.has("query-named-block-nodes", "flat")
        assert not monitor.has("block-commit", "no-such-argument")
        assert not monitor.has("no-such-command", "x")
        assert spy.names() == ["query-commands", "query-qmp-schema"]
    assert commands_of([{"name": "x", "meta-type": "command", "arg-type": "7"}, {"name": "7", "members": 3}]) == {
        "x": frozenset()
    }


def test_events_wake_those_who_wait(machine: Machine) -> None:
    with Monitor(machine.qmp) as monitor:
        before = monitor.mark()
        assert not monitor.wait(lambda name, _: name == "STOP", after=before, seconds=0)
        stopping = threading.Timer(0.05, lambda: machine.ask("stop"))
        stopping.start()
        assert monitor.wait(lambda name, _: name == "STOP", after=before, seconds=60)
        stopping.join()
        machine.ask("cont")
        assert monitor.wait(lambda name, _: name == "STOP", after=before, seconds=0), "also one that came before"


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no such socket") as caught:
        Monitor(tmp_path / "none")
    assert "-qmp unix:PATH" in str(caught.value.hint)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    with pytest.raises(NotFound, match="no process listens at this socket: its QEMU has ended"):
        Monitor(tmp_path / "stale")
    (tmp_path / "file").write_text("text")
    with pytest.raises(InvalidInput, match="not a socket"):
        Monitor(tmp_path / "file")


def test_a_human_monitor(tmp_path: Path) -> None:
    monitor = tmp_path / "hmp"
    with (
        Machine(tmp_path / "m", argv=["-monitor", f"unix:{monitor},server=on,wait=off"]),
        pytest.raises(InvalidInput, match="not a QMP socket: it is that of QEMU's human monitor"),
    ):
        Monitor(monitor)


def test_an_interrupted_close_leaves_no_thread(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    drop = Monitor._drop

    def interrupted(monitor: Monitor) -> None:
        drop(monitor)
        raise KeyboardInterrupt

    monitor = Monitor(machine.qmp)
    before = {thread for thread in threading.enumerate() if thread.name.startswith("qmp ")}
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "_drop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            monitor.close()
    assert len(before) == 1
    assert not {thread for thread in before if thread.is_alive()}
    monitor.close()


def test_permission_denied(machine: Machine) -> None:
    code = (
        "import sys; from pathlib import Path; from snapchain.guest.qmp import Monitor\n"
        "from snapchain.errors import InvalidInput\n"
        "try: Monitor(Path(sys.argv[1]))\n"
        "except InvalidInput as error: print(error, '|', error.hint)\n"
    )
    machine.qmp.chmod(0o700)
    argv = ["setpriv", "--reuid=65534", "--clear-groups", "--bounding-set=-all", sys.executable, "-c", code]
    done = subprocess.run([*argv, machine.qmp], capture_output=True, text=True, check=True)
    assert "permission denied | run as a user who may read and write it" in done.stdout


def test_a_path_longer_than_the_kernel_takes(tmp_path: Path) -> None:
    def seven(command: dict[str, Any]) -> bytes:
        return json.dumps({"return": 7, "id": command["id"]}).encode() + b"\n"

    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    here = Path.cwd()
    os.chdir(folder)
    try:
        with server(
            Path("s"), answering(lambda command: json.dumps({"return": 7, "id": command["id"]}).encode() + b"\n")
        ):
            os.chdir(here)
            with Monitor(folder / "s") as monitor:
                assert monitor.execute("query-x") == 7
    finally:
        os.chdir(here)


def test_another_client_is_named(machine: Machine) -> None:
    code = (
        f"import socket,time; s=socket.socket(socket.AF_UNIX); s.connect({str(machine.qmp)!r}); s.recv(1);"
        "print(flush=True); time.sleep(1000)"
    )
    holder = subprocess.Popen([*DIE_WITH_PARENT, sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.stdout.close()
        with pytest.raises(Busy, match=rf"no greeting within 0\.3 seconds: \S+ \(pid {holder.pid}\) is connected"):
            Monitor(machine.qmp, patience=0.3)
    finally:
        holder.kill()
        holder.wait()
    Monitor(machine.qmp).close()


def test_libvirts_own_socket_has_another_hint(tmp_path: Path) -> None:
    path = tmp_path / "libvirt" / "qemu" / "domain-3-my web"
    path.mkdir(parents=True)

    def silent(client: socket.socket) -> None:
        client.recv(1)

    with server(path / "s", silent), pytest.raises(Busy, match="sent no greeting") as caught:
        Monitor(path / "s", patience=0.2)
    assert str(caught.value.hint).endswith("--domain 'my web'")


@pytest.mark.parametrize(
    "greeting",
    [b"SSH-2.0-OpenSSH\r\n", b"[]\n", b"{}\n", b'{"QMP": 3}\n', b"[" * 100_000 + b"\n", b"\xff\xfe\n", b"7\n"],
)
def test_what_is_no_monitor(tmp_path: Path, greeting: bytes) -> None:
    with server(tmp_path / "s", lambda client: client.sendall(greeting)):
        with pytest.raises(InvalidInput, match="not a QMP socket") as caught:
            Monitor(tmp_path / "s")
        assert len(str(caught.value)) < 1000


def test_a_server_that_hangs_up(tmp_path: Path) -> None:
    with server(tmp_path / "s", lambda _: None), pytest.raises(Unavailable, match="QEMU closed the connection"):
        Monitor(tmp_path / "s")
    with (
        server(tmp_path / "t", lambda client: client.sendall(GREETING)),
        pytest.raises(Unavailable, match="QEMU closed the connection"),
    ):
        Monitor(tmp_path / "t")


@pytest.mark.parametrize(
    "answer",
    [
        b"no JSON\n",
        b"[" * 100_000 + b"\n",
        b"x" * (LARGEST_ANSWER + 100_000) + b"\n",
        b"null\n",
        b'{"error": {"class": "GenericError", "desc": "unparsable"}}\n',
        b'{"id": "ID"}\n',
        b'{"id": "ID", "error": 3}\n',
        b'{"id": "ID", "error": {"class": 3, "desc": []}}\n',
        b'{"id": ["ID"], "return": 3}\n',
        b'{"return": 3}\n',
        b'{"event": 3, "id": "ID"}\n{"event": {"x": []}, "data": 7}\n' * 5_000,  # more than is kept
        b'{"event": "X", "data": []}\n{"id": "other", "return": 3}\n',
    ],
    ids=range(12),
)
def test_answers_that_are_none(tmp_path: Path, answer: bytes) -> None:
    """An error of ours for each, at once or at the deadline, and nothing on stderr."""

    def reply(command: dict[str, Any]) -> bytes:
        return answer.replace(b"ID", command["id"].encode())

    with server(tmp_path / "s", answering(reply)), Monitor(tmp_path / "s", command_seconds=1, patience=5) as monitor:
        for command in ("query-block", "stop"):
            with pytest.raises((Unavailable, ToolFailed), match=f"{command}|connection") as caught:
                monitor.execute(command)
            assert len(str(caught.value)) < 1200


def test_a_hanging_qemu_has_a_deadline(machine: Machine, tmp_path: Path) -> None:
    with (
        Spy(tmp_path / "spy", machine.qmp, Fault(0, Place.SENT, LOSE)) as spy,
        Monitor(spy.path, command_seconds=1.5) as monitor,
    ):
        with pytest.raises(Unavailable, match=r"did not answer query-status within 1\.5 seconds"):
            monitor.execute("query-status")
        assert monitor.fields("query-status")["status"] == "running", "the connection is still good"


@pytest.mark.parametrize("place", [Place.BEFORE, Place.SENT])
def test_only_what_changes_nothing_is_sent_again(machine: Machine, tmp_path: Path, place: Place) -> None:
    with Spy(tmp_path / "spy", machine.qmp, Fault(0, place, DROP), Fault(2, place, DROP)) as spy:
        with Monitor(spy.path) as monitor:
            assert monitor.fields("query-status")["status"] == "running"
            with pytest.raises(Unavailable, match="lost before its answer to stop; whether it was done is unknown"):
                monitor.execute("stop")
            assert monitor.fields("query-status")["status"] == ("running" if place is Place.BEFORE else "paused")
            monitor.execute("cont")
        assert spy.names() == ["query-status", "query-status", "stop", "query-status", "cont"]


def test_a_lost_link_ends_a_wait(machine: Machine, tmp_path: Path) -> None:
    with Spy(tmp_path / "spy", machine.qmp) as spy, Monitor(spy.path) as monitor:
        before = monitor.mark()
        threading.Timer(0.05, spy.drop).start()
        assert monitor.wait(lambda name, _: name == "NEVER", after=before, seconds=100)
        assert monitor.fields("query-status")["running"] is True
        assert monitor.wait(lambda name, _: name == "NEVER", after=before, seconds=0) is False


def test_another_qemu_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    with Machine(tmp_path / "m") as first:
        monitor = Monitor(first.qmp)
        first.kill()
        with pytest.raises(NotFound, match="its QEMU has ended"):
            monitor.execute("query-status")
        with Machine(tmp_path / "m"), pytest.raises(Conflict, match="another QEMU listens at this socket now"):
            monitor.execute("query-status")
        monitor.close()
        with pytest.raises(Unavailable, match="the connection to QEMU was closed"):
            monitor.execute("query-status")


def test_nodes_are_not_listed_beside_a_stream(tmp_path: Path) -> None:
    """QEMU 7.2 dies of it when the stream is over, also by a failure or by cancelling it."""
    image = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    overlay = tmp_path / "b.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay], check=True)
    subprocess.run(["qemu-io", "-c", "write 0 32M", image], check=True, stdout=subprocess.DEVNULL)
    with (
        Machine(tmp_path / "m", disks={"vda": overlay}) as machine,
        Spy(tmp_path / "spy", machine.qmp) as spy,
        Monitor(spy.path) as monitor,
    ):
        job = {"job-id": "sc-s", "device": "vda-top", "auto-finalize": False, "auto-dismiss": False, "speed": 65536}
        monitor.execute("block-stream", job)
        listings: list[tuple[str, dict[str, Any]]] = [
            ("query-named-block-nodes", {"flat": True}), ("query-blockstats", {"query-nodes": True}),
        ]  # fmt: skip
        for command, arguments in listings:
            with pytest.raises(Busy, match="the block job sc-s streams"):
                monitor.execute(command, arguments)
        before = monitor.mark()
        monitor.execute("job-cancel", {"id": "sc-s"})
        assert monitor.wait(lambda _, data: data.get("status") == "concluded", after=before, seconds=60)
        for command, arguments in listings:
            with pytest.raises(Busy, match="the block job sc-s streams"):
                monitor.execute(command, arguments)
        assert monitor.rows("query-block")
        monitor.execute("job-dismiss", {"id": "sc-s"})
        assert monitor.rows("query-named-block-nodes")
        spy.check()
        assert machine.status() == "running"


def test_silence_on_stderr(tmp_path: Path) -> None:
    """The library logs what goes wrong, and asyncio what nobody picked up: a user gets one error instead."""
    code = (
        "import sys; from pathlib import Path; from snapchain.guest.qmp import Monitor\n"
        "from snapchain.errors import SnapchainError\n"
        "try:\n"
        "    with Monitor(Path(sys.argv[1]), command_seconds=1) as m: m.execute('stop')\n"
        "except SnapchainError as error: print(error)\n"
    )
    for answer in (b"no JSON\n", b"", b"[" * 100_000 + b"\n"):
        path = tmp_path / f"s{len(answer)}"
        with server(path, answering(lambda _, answer=answer: answer)):  # type: ignore[misc]
            done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert "stop" in done.stdout


def test_closing_ends_its_thread(machine: Machine) -> None:
    before = threading.active_count()
    monitor = Monitor(machine.qmp)
    monitor.close()
    monitor.close()
    assert threading.active_count() == before
