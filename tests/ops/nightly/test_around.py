"""What stands around a run: hooks, the state, the lock, the metrics, the units for systemd."""

from __future__ import annotations

import os
import re
import subprocess
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from snapchain.errors import Busy, ToolFailed
from snapchain.ops.exposition import Family, encode
from snapchain.ops.nightly.config import Hooks
from snapchain.ops.nightly.document import parse
from snapchain.ops.nightly.hooks import HookRunner
from snapchain.ops.nightly.open_destination import passphrase_of
from snapchain.ops.nightly.preview import preview
from snapchain.ops.nightly.report import Outcome
from snapchain.ops.nightly.run import directory_of
from snapchain.ops.nightly.state import DiskState, StateFile
from snapchain.ops.nightly.systemd import units
from snapchain.ops.single_run import only_run
from snapchain.repository.opening import create_repository
from tests.ops.nightly import exposition
from tests.ops.nightly.night import EVENING, Clock, Host, in_use, row
from tests.ops.stacks import write
from tests.waiting import HANG, started_with, wait_until

FIXTURES = Path(__file__).parents[3] / "fixtures" / "0.1"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.repository()
    return made


# -- hooks -------------------------------------------------------------------------------------------------------------


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_hooks_see_the_facts_in_the_order_of_the_night(host: Host, tmp_path: Path) -> None:
    image = host.disk("web1")
    note = script(
        tmp_path / "note",
        f'echo "$SNAPCHAIN_HOOK disk=$SNAPCHAIN_DISK image=$SNAPCHAIN_IMAGE sealed=$SNAPCHAIN_SEALED '
        f'outcome=$SNAPCHAIN_OUTCOME snapshot=$SNAPCHAIN_SNAPSHOT ok=$SNAPCHAIN_DISKS_OK" >> {tmp_path}/log',
    )
    every = "".join(f'{name} = ["{note}"]\n' for name in ("before", "after", "on_failure"))
    report = host.run(
        f'[hooks]\n{every}[[disks]]\nglob = "images/*.qcow2"\n[disks.hooks]\n{every}after_snapshot = ["{note}"]\n'
    )
    assert report.outcome is Outcome.OK
    sealed = host.images / "web1.1.qcow2"
    assert (tmp_path / "log").read_text().splitlines() == [
        "before disk= image= sealed= outcome= snapshot= ok=",
        f"before disk=web1 image={image} sealed= outcome= snapshot= ok=",
        f"after_snapshot disk=web1 image={image} sealed= outcome= snapshot=made ok=",
        f"after disk=web1 image={image} sealed={sealed} outcome=ok snapshot= ok=",
        "after disk= image= sealed= outcome=ok snapshot= ok=1",
    ]


def test_a_hook_that_fails_or_hangs_concerns_its_disk_alone(host: Host, tmp_path: Path) -> None:
    for name in ("fails", "hangs", "sound"):
        host.disk(name)
    after = f'after_snapshot = ["touch", "{tmp_path}/guest-started"]\nafter = ["touch", "{tmp_path}/ended"]\n'
    hangs = script(tmp_path / "hangs", "sleep 1000 & wait; true")
    text = (
        f'[[disks]]\npath = "images/fails.qcow2"\n[disks.hooks]\nbefore = ["false"]\n{after}'
        f'on_failure = ["sh", "-c", "echo $SNAPCHAIN_ERROR > {tmp_path}/error"]\n'
        f'[[disks]]\npath = "images/hangs.qcow2"\n[disks.hooks]\nbefore = ["{hangs}"]\ntimeout = 0.5\n'
        '[[disks]]\npath = "images/sound.qcow2"\n'
    )
    report = host.run(text)
    assert {disk.disk: disk.outcome for disk in report.disks} == {
        "fails": Outcome.FAILED,
        "hangs": Outcome.FAILED,
        "sound": Outcome.OK,
    }
    assert row(report, "fails").snapshot == "none"
    assert (tmp_path / "guest-started").exists(), "what `before` has stopped is started again"
    assert (tmp_path / "ended").exists()
    assert "exit status 1" in (tmp_path / "error").read_text()
    assert "0.5 seconds" in row(report, "hangs").faults[0].message
    wait_until(lambda: started_with(tmp_path) == [])


def test_a_hook_may_be_a_note_only(tmp_path: Path) -> None:
    told: list[str] = []
    HookRunner(Hooks(after=("false",), failing="note"), {}, on_notice=told.append).run("after")
    assert "the after hook: ended with exit status 1" in told[0]
    with pytest.raises(ToolFailed, match="not installed"):
        HookRunner(Hooks(after=("no-such-program",)), {}, on_notice=told.append).run("after")


def test_when_the_first_hook_of_a_run_fails_nothing_is_begun(host: Host, tmp_path: Path) -> None:
    host.disk("web1")
    report = host.run(f'[hooks]\nbefore = ["false"]\nafter = ["touch", "{tmp_path}/after"]\n')
    assert report.outcome is Outcome.FAILED
    assert row(report, "web1").outcome is Outcome.LEFT
    assert (tmp_path / "after").exists()
    assert host.repository().catalogues() == []


def test_a_guest_started_after_the_snapshot_is_not_waited_for(host: Host) -> None:
    """The image is free again as soon as it is sealed: the sealed files alone are shipped and, when free, merged."""
    image = host.disk("web1")
    for night in range(4):
        host.run("")
        write(image, f"write -P {night + 50} {night * 128}k 128k")
    text = "[[disks]]\nglob = 'images/*.qcow2'\nmerge_above = 4\n"

    started: list[object] = []

    def guest(event: object) -> None:
        if getattr(event, "phase", "") == "ship web1" and not started:
            started.append(event)
            guests.enter_context(in_use(image))

    with ExitStack() as guests:
        report = row(host.run(text, on_event=guest), "web1")
    assert report.outcome is Outcome.OK
    assert report.destinations[0].outcome is Outcome.OK
    assert report.merge is None
    assert report.why_not_merged is not None
    assert "qemu-io" in report.why_not_merged


# -- state -------------------------------------------------------------------------------------------------------------


def test_the_state_of_another_image_under_the_same_name_knows_none_of_its_layers(tmp_path: Path) -> None:
    file = StateFile.open(tmp_path / "state.json", on_notice=print)
    file.put_disk("web1", DiskState(image=Path("/a"), layers=(Path("/a.1"),), chain_length=2))
    again = StateFile.open(tmp_path / "state.json", on_notice=print)
    assert again.disk("web1", Path("/a")).layers
    assert not again.disk("web1", Path("/b")).layers


# -- lock --------------------------------------------------------------------------------------------------------------


def test_a_second_run_waits_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    told: list[str] = []
    with only_run(path, wait=0, on_wait=told.append):
        with pytest.raises(Busy, match=f"pid {os.getpid()}"), only_run(path, wait=0, on_wait=told.append):
            raise AssertionError
        assert told == []
        began = time.monotonic()
        with pytest.raises(Busy, match="another run is at work"), only_run(path, wait=0.3, on_wait=told.append):
            raise AssertionError
        assert time.monotonic() - began > 0.25
        assert len(told) == 1
    with ExitStack() as held:
        held.enter_context(only_run(path, wait=0, on_wait=told.append))
        with only_run(path, wait=HANG, on_wait=lambda _: held.close()):
            pass


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_keep_to_the_format_whatever_disks_are_called(host: Host) -> None:
    odd = 'we"ird\\x,{y}=" ä'
    host.disk(odd)
    host.disk("web1")
    report = host.run("", clock=Clock(step=timedelta(seconds=1)))
    path = host.directory / "snapchain.prom"
    found = exposition.read(path.read_text())
    assert exposition.value(found, "points", disk=odd, destination="vault") == 1
    assert all(family.type == "gauge" for family in found.values())
    assert {
        "snapchain_last_success_timestamp_seconds", "snapchain_last_run_timestamp_seconds",
        "snapchain_last_run_success", "snapchain_chain_length", "snapchain_shadowed_bytes", "snapchain_shipped_bytes",
        "snapchain_stored_bytes",        "snapchain_rpo_lag_seconds", "snapchain_points", "snapchain_duration_seconds",
    } <= set(found)  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o644
    assert exposition.value(found, "last_run_timestamp_seconds", nightly="nightly") == report.finished.timestamp()
    shipped = host.metric("last_success_timestamp_seconds", disk="web1", destination="vault")
    assert EVENING.timestamp() <= shipped <= report.finished.timestamp()
    assert host.metric("rpo_lag_seconds", disk="web1") == report.finished.timestamp() - shipped


def test_metrics_are_replaced_whole_and_leave_nothing_behind(host: Host) -> None:
    host.disk("web1")
    path = host.directory / "snapchain.prom"
    (host.directory / ".snapchain.prom.new-01234567").write_text("of a killed run")
    path.write_text("old")
    with path.open() as reader:
        host.run("")
        assert reader.read() == "old"
    assert [each.name for each in host.directory.iterdir() if "prom" in each.name] == ["snapchain.prom"]


def test_metrics_that_cannot_be_written_are_a_failure_and_no_more(host: Host) -> None:
    host.disk("web1")
    (host.directory / "snapchain.prom").mkdir()
    report = host.run("")
    assert report.outcome is Outcome.FAILED
    assert report.faults[0].step == "metrics"
    assert row(report, "web1").outcome is Outcome.OK


def test_label_values_are_escaped() -> None:
    text = encode([Family("x", "y", [({"disk": 'a"b\\c\x1bd'}, 1.0)])]).decode()
    assert "\x1b" not in text
    assert exposition.value(exposition.read(text), "x", disk='a"b\\c\\x1bd') == 1.0


def test_every_metric_of_0_1_is_there(host: Host) -> None:
    """Names, types, help and labels, as monitoring was set up for them; fixtures/0.1/metrics.prom is by version 0.1."""
    host.disk("web1")
    host.run("[keep]\nlast = 2\n")
    now = exposition.read((host.directory / "snapchain.prom").read_text())
    then = exposition.read((FIXTURES / "metrics.prom").read_text())
    for name, family in then.items():
        assert (now[name].type, now[name].documentation) == (family.type, family.documentation)
        assert [each.labels.keys() for each in now[name].samples] == [each.labels.keys() for each in family.samples]


# -- systemd -----------------------------------------------------------------------------------------------------------

CONFIG = """
time_zone = "Europe/Berlin"
window = "22:30-06:00"
name = "web"
metrics = "/var/lib/node-exporter/snapchain.prom"
[[disks]]
glob = "/images/*/*.qcow2"
[[disks]]
path = "/images/web1/disk.qcow2"
[[disks]]
path = "/srv/my images/100%.qcow2"
[[destinations]]
name = "here"
url = "/backup"
[[destinations]]
name = "there"
url = "s3://bucket/prefix"
"""


_YES = r"yes|no"
_TIME = r"infinity|\d+(?:s|min|h)"
_WORDS = r"(?:[A-Z]+_[A-Z_]+ ?)+"
_PATH = r"-?/[^\s\"%]*|\"-?/(?:[^\"%]|%%)*\""
DIRECTIVES = {
    "Unit": {"Description": r".+", "Documentation": r"man:\S+", "Wants": r"\S+\.target", "After": r"\S+\.target"},
    "Service": {
        "Type": "oneshot", "ExecStart": r"/\S+( .+)?", "TimeoutStartSec": _TIME, "TimeoutStopSec": _TIME,
        "KillMode": "mixed", "Nice": r"-?\d+", "IOSchedulingClass": "best-effort|idle", "IOSchedulingPriority": "[0-7]",
        "Environment": r"(?:[A-Z_]+=\S+ ?)+", "EnvironmentFile": rf"{_PATH}", "StateDirectory": r"[a-z]+",
        "CacheDirectory": r"[a-z]+", "StateDirectoryMode": "0700", "CacheDirectoryMode": "0700", "UMask": "0077",
        "LimitCORE": "0", "MemoryMax": r"\d+G", "TasksMax": r"\d+", "PrivateMounts": _YES, "PrivateDevices": _YES,
        "LoadCredential": r"[\w.-]+:/(?:[^%]|%%)*", "SetCredential": r"[\w.-]+:\\n", "ProtectProc": "invisible",
        "ProtectSystem": "strict", "ReadWritePaths": _PATH, "PrivateTmp": _YES, "ProtectHome": f"{_YES}|read-only",
        "DevicePolicy": "closed", "DeviceAllow": r"(?:block|char)-\S+ [rwm]+", "CapabilityBoundingSet": _WORDS,
        "NoNewPrivileges": _YES, "ProtectKernelTunables": _YES, "ProtectKernelModules": _YES, "ProtectKernelLogs": _YES,
        "ProtectControlGroups": _YES, "ProtectClock": _YES, "ProtectHostname": _YES, "RestrictNamespaces": _YES,
        "RestrictRealtime": _YES, "RestrictSUIDSGID": _YES, "LockPersonality": _YES,
        "RestrictAddressFamilies": _WORDS.replace("A-Z_", "A-Z0-9_"), "SystemCallArchitectures": "native",
        "SystemCallFilter": r"@system-service", "SystemCallErrorNumber": "EPERM",
    },
    "Timer": {
        "OnCalendar": r"\*-\*-\* \d\d:\d\d:\d\d \S+", "Persistent": _YES, "AccuracySec": _TIME,
    },
    "Install": {"WantedBy": r"timers\.target"},
}  # fmt: skip
"""What may stand where, from systemd.unit(5), .service(5), .exec(5), .resource-control(5), .timer(5), .syntax(7)."""
_SEVERAL = {"ReadWritePaths", "DeviceAllow", "LoadCredential", "SetCredential"}


def sections(text: str) -> dict[str, dict[str, list[str]]]:
    """A unit file, as strictly as the manual pages allow. systemd itself only warns of what it does not know."""
    found: dict[str, dict[str, list[str]]] = {}
    current = ""
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            current = line.strip("[]")
            assert current in DIRECTIVES
            assert current not in found
            found[current] = {}
            continue
        name, equals, value = line.partition("=")
        assert equals, line
        assert re.fullmatch(DIRECTIVES[current][name], value), line
        found[current].setdefault(name, []).append(value)
        assert name in _SEVERAL or len(found[current][name]) == 1, line
    return found


def test_units_are_what_systemd_takes(tmp_path: Path) -> None:
    made = units(
        parse(CONFIG, path=Path("/etc/snapchain/web 1.toml")), Path("/etc/snapchain/web 1.toml"), program=["/bin/true"]
    )
    assert made.service_path.name == "snapchain-web.service"
    service = made.service.splitlines()
    assert 'ExecStart=/bin/true nightly "/etc/snapchain/web 1.toml"' in service
    assert [line for line in service if line.startswith("ReadWritePaths=")] == [
        "ReadWritePaths=-/backup",
        "ReadWritePaths=-/images",
        'ReadWritePaths="-/srv/my images"',
        "ReadWritePaths=-/var/lib/node-exporter",
    ]
    assert "OnCalendar=*-*-* 22:30:00 Europe/Berlin" in made.timer.splitlines()
    for directive in ("ProtectSystem=strict", "NoNewPrivileges=yes", "SystemCallFilter=@system-service", "UMask=0077"):
        assert directive in service
    assert set(sections(made.service)) == {"Unit", "Service"}
    assert set(sections(made.timer)) == {"Unit", "Timer", "Install"}
    files = [tmp_path / made.service_path.name, tmp_path / made.timer_path.name]
    files[0].write_text(made.service)
    files[1].write_text(made.timer)
    done = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    # An exposure of 2.9 at most: what is left is root, the network, and the capabilities that the work takes.
    judge = ["systemd-analyze", "security", "--offline=yes", "--threshold=29", "--no-pager", str(files[0])]
    done = subprocess.run(judge, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def service_of(text: str) -> dict[str, list[str]]:
    path = Path("/etc/snapchain/x.toml")
    return sections(units(parse(text, path=path), path, program=["/bin/true"]).service)["Service"]


def test_what_a_service_may_use_is_bounded() -> None:
    for disks in (1, 4):
        found = service_of(f"concurrency = {disks}\n{CONFIG}")
        assert found["MemoryMax"] == [f"{disks + 1}G"]
        assert found["TasksMax"] == [str(128 * (disks + 1))]
        assert found["LimitCORE"] == ["0"]


def test_a_service_has_the_capabilities_for_the_rights_of_others_and_no_more() -> None:
    (found,) = service_of(CONFIG)["CapabilityBoundingSet"]
    wanted = "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER SETGID SETUID SYS_PTRACE"
    assert found.split() == [f"CAP_{each}" for each in wanted.split()]
    argv = ["systemd-analyze", "syscall-filter", "@system-service"]
    allowed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    assert {"setfsuid", "setfsgid", "@setuid", "copy_file_range", "flock"} <= set(allowed)


@pytest.mark.parametrize(
    "disk", ['path = "/dev/vg/web1"', 'glob = "/dev/vg/*"', 'path = "/i/a"\nimage_dirs = ["/dev/vg"]']
)
def test_a_service_sees_disks_only_where_they_are_images(disk: str) -> None:
    assert service_of(CONFIG)["PrivateDevices"] == ["yes"]
    assert "DeviceAllow" not in service_of(CONFIG)
    found = service_of(CONFIG.replace('path = "/images/web1/disk.qcow2"', disk))
    assert (found["DevicePolicy"], found["DeviceAllow"]) == (["closed"], ["block-* r"])
    assert "PrivateDevices" not in found


def test_a_service_gets_passphrases_as_credentials() -> None:
    more = [
        ("file", 'password_file = "/etc/my 100%.secret"'),
        ("program", 'password_command = ["/bin/pass"]'),
        ("variable", 'password_env = "SECRET"'),
        ("no name: for it", ""),
    ]
    text = CONFIG + "".join(f'[[destinations]]\nname = "{name}"\nurl = "/{name}"\n{line}\n' for name, line in more)
    found = service_of(text)
    assert found["LoadCredential"] == [
        "here:/etc/snapchain/web-here.secret",
        "there:/etc/snapchain/web-there.secret",
        "file:/etc/my 100%%.secret",
    ]
    assert found["SetCredential"] == [r"here:\n", r"there:\n", r"file:\n"]


@pytest.mark.parametrize(
    ("configured", "credential", "wanted"),
    [
        ('password_file = "{here}/file"', "handed over\n", "handed over"),
        ('password_file = "{here}/file"', "\n", "in the file"),  # SetCredential, for a file that was not there
        ('password_file = "{here}/file"', None, "in the file"),
        ("", "handed over\n", "handed over"),
        ("", None, "in the environment"),
        ('password_env = "OTHER"', "handed over\n", "in another variable"),
        ('password_command = ["echo", "printed"]', "handed over\n", "printed"),
    ],
)
def test_a_credential_comes_before_the_file_that_it_was_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: str, credential: str | None, wanted: str
) -> None:
    (tmp_path / "file").write_text("in the file")
    (tmp_path / "credentials").mkdir()
    if credential is not None:
        (tmp_path / "credentials" / "vault").write_text(credential)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "in the environment")
    monkeypatch.setenv("OTHER", "in another variable")
    text = f'time_zone = "UTC"\n[[disks]]\npath = "/a"\n[[destinations]]\nname = "vault"\nurl = "/b"\n{configured}\n'
    (destination,) = parse(text.replace("{here}", str(tmp_path)), path=tmp_path / "n.toml").destinations
    assert passphrase_of(destination, on_notice=lambda _: None)() == wanted


def test_without_a_window_the_timer_has_an_hour_and_secrets_in_files_need_no_environment() -> None:
    text = CONFIG.replace('window = "22:30-06:00"\n', "").replace('url = "', 'password_file = "/etc/p"\nurl = "')
    text = text.replace("s3://", "/backup/")  # S3 takes its keys from the environment
    made = units(parse(text, path=Path("/etc/x.toml")), Path("/etc/x.toml"), program=["/usr/bin/snapchain"])
    assert "OnCalendar=*-*-* 02:00:00 Europe/Berlin" in made.timer
    assert "EnvironmentFile" not in made.service


def test_now_has_a_zone() -> None:
    from snapchain.ops.nightly.run import now_utc

    assert now_utc().tzinfo is UTC
    assert abs(now_utc() - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_state_that_cannot_be_read_is_not_written_over_and_hinders_no_work(host: Host) -> None:
    host.disk("web1")
    host.run("")
    path = host.directory / "state" / "state.json"
    path.rename(host.directory / "kept.json")
    path.symlink_to(host.directory / "kept.json")  # which is refused, as what only root could have made
    before = (host.directory / "kept.json").read_bytes()
    report = host.run("")
    assert row(report, "web1").outcome is Outcome.OK
    assert (report.outcome, report.faults[0].step) == (Outcome.FAILED, "state")
    assert path.is_symlink()
    assert (host.directory / "kept.json").read_bytes() == before


def test_a_report_and_a_state_that_cannot_be_written_are_faults_and_the_work_is_done(host: Host) -> None:
    host.disk("web1")
    state = host.directory / "state"
    for name in ("state.json", "last-report.json"):
        (state / name / "in the way").mkdir(parents=True)
    report = host.run("")
    assert row(report, "web1").outcome is Outcome.OK
    assert {fault.step for fault in report.faults} == {"state", "report"}
    assert len(host.repository().catalogue("web1").points) == 1
    assert host.metric("last_run_success") == 0
    assert host.metric("points", disk="web1", destination="vault") == 1


def test_root_by_hand_and_the_service_share_state_and_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("/etc/snapchain/web.toml")
    config = parse(CONFIG, path=path)
    environment = sections(units(config, path, program=["/bin/true"]).service)["Service"]["Environment"][0]
    (home,) = [word.partition("=")[2] for word in environment.split() if word.startswith("XDG_STATE_HOME=")]
    monkeypatch.setenv("XDG_STATE_HOME", home)
    by_service = directory_of(config, path)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert directory_of(config, path) == by_service
    assert by_service.parent == Path("/var/lib/snapchain/nightly")


def test_a_dry_run_finds_hooks_whose_program_is_not_there(host: Host) -> None:
    host.disk("web1")
    text = '[hooks]\nafter = ["no-such-program"]\n[[disks]]\nglob = "images/*.qcow2"\n'
    host.path.write_text(host.whole(f'{text}[disks.hooks]\nbefore = ["neither", "this"]\nafter = ["true"]\n'))
    plan = preview(parse(host.path.read_text(), path=host.path), host.path, clock=Clock())
    assert [(fault.subject, fault.message) for fault in plan.faults] == [
        ("no-such-program", "the after hook: not installed")
    ]
    assert [fault.subject for fault in plan.disks[0].faults] == ["neither"]
    assert not plan.sound


def test_an_encrypted_destination_without_a_passphrase_says_which_variable_is_meant(host: Host) -> None:
    host.disk("web1")
    create_repository(str(host.directory / "locked"), passphrase=lambda: "secret")
    report = host.run('[[destinations]]\nname = "vault"\nurl = "locked"\npassword_env = "MY_SECRET"\n')
    (fault,) = row(report, "web1").faults
    assert (fault.step, "MY_SECRET" in fault.message) == ("open", True)


def test_even_a_small_share_of_a_small_disk_is_a_sample(host: Host) -> None:
    host.disk("web1")
    report = host.run('[[destinations]]\nname = "vault"\nurl = "repo"\nverify = { share = "1%" }\n')
    assert report.destinations[0].verified[0].checked_bytes == 256 << 10
    records = host.run('[[destinations]]\nname = "vault"\nurl = "repo"\nverify = { share = "0%" }\n')
    assert records.destinations[0].verified[0].checked_bytes == 0
