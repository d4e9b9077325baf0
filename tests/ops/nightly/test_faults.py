"""Runs that are killed, stopped, short of room, or run into each other: by the real command line."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.objects.scripted import DROP, Script, scripted_server
from tests.ops.nightly.evening import House, chain_of, command, leftovers, rows, snapchain
from tests.ops.nightly.exposition import value
from tests.ops.stacks import clean
from tests.servers import ACCESS_KEY, SECRET_KEY
from tests.waiting import wait_until

ONE_CALL = 5  # the first attempt and its retries
CONFIG = """
[keep]
last = 1
[[disks]]
glob = "images/*.qcow2"
exclude = ["*-base.qcow2", "*-middle.qcow2"]
merge_above = 4
{hooks}
[[destinations]]
name = "vault"
url = "vault"
verify = {{ disks = 1, share = "100%" }}
"""


@pytest.fixture
def house(tmp_path: Path) -> House:
    made = House(tmp_path)
    made.init()
    made.configure(CONFIG.format(hooks=""))
    return made


@contextmanager
def running(house: House, *words: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command("nightly", house.config, *words),
        cwd=house.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def wait_for(seen: Callable[[], object], child: subprocess.Popen[str]) -> None:
    wait_until(seen, alive=lambda: child.poll() is None)


# -- killed ------------------------------------------------------------------------------------------------------------


def killed_at(house: House, phase: str) -> None:
    """As soon as it says that it is in this phase."""
    with running(house, "--progress", "json") as child:
        assert child.stderr is not None
        for line in child.stderr:
            told = json.loads(line)
            if told.get("phase") == phase:
                child.kill()
                break
        else:
            pytest.fail(f"it never came to {phase}: {child.communicate()}")


def killed_by_hook(house: House, hook: str) -> None:
    """When the hook of the second disk runs."""
    before = house.config.read_text()
    kill = f'[disks.hooks]\n{hook} = ["sh", "-c", "test $SNAPCHAIN_DISK != b || kill -9 $PPID"]\n'
    house.configure(CONFIG.format(hooks=kill))
    with running(house) as child:
        assert child.wait() == -signal.SIGKILL
    house.config.write_text(before)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (killed_by_hook, "after_snapshot"),
        (killed_at, "ship b"),
        (killed_at, "merge b"),
        (killed_by_hook, "after"),
        (killed_at, "merge a at vault"),
        (killed_at, "gc vault"),
    ],
)
def test_killed_in_the_middle_the_next_run_ends_as_if_nothing_had_happened(
    house: House, how: Callable[[House, str], None], what: str
) -> None:
    disks = ("a", "b")
    for seed, disk in enumerate(disks):
        house.disk(disk, seed=seed)
    assert house.nightly().status == 0
    for at, disk in enumerate(disks):
        house.guest_writes(disk, at + 1, at)
        house.remember(disk)
    how(house, what)
    for disk in disks:
        assert house.reads_as_remembered(disk), what
    said = house.nightly("--json")
    assert said.status == 0, said.out + said.err
    for disk in disks:
        assert house.reads_as_remembered(disk), what
        assert house.is_restored(disk), what
        # A night may leave one layer more, which the next one merges: seen now and then, cause not found yet.
        assert len(chain_of(house.image(disk))) in {4, 5}
        assert all(clean(path) for path in chain_of(house.image(disk)))
    assert leftovers([house.images, house.folder / "state", house.folder / "metrics"]) == []
    assert not list((house.folder / "vault" / "leases").glob("*"))
    assert house.is_sound()


def test_killed_at_random_again_and_again(house: House) -> None:
    chance = random.Random(3)
    disks = ("a", "b", "c")
    for seed, disk in enumerate(disks):
        house.disk(disk, seed=seed)
    for night in range(3):
        for at, disk in enumerate(disks):
            house.guest_writes(disk, 20 * night + at + 1, chance.randrange(32))
            house.remember(disk)
        with running(house, "--progress", "json") as child:
            assert child.stderr is not None
            for _ in range(chance.randrange(1, 10)):  # of a dozen at least: it is at work, and not at its end
                assert child.stderr.readline(), child.communicate()
            child.kill()
        assert all(house.reads_as_remembered(disk) for disk in disks)
    said = house.nightly("--json")
    assert said.status == 0, said.out
    assert all(house.is_restored(disk) and house.reads_as_remembered(disk) for disk in disks)
    assert leftovers([house.images, house.folder / "state", house.folder / "metrics"]) == []


# -- stopped -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_tells_what_it_has_done(house: House, number: int) -> None:
    for seed, disk in enumerate(("a", "b", "c")):
        house.disk(disk, seed=seed)
    hooks = '[disks.hooks]\nbefore = ["sh", "-c", "case $SNAPCHAIN_DISK in b) touch hanging; sleep 1000;; esac"]\n'
    hooks += 'after = ["sh", "-c", "echo $SNAPCHAIN_DISK >> after"]\n'
    house.configure(CONFIG.format(hooks=hooks))
    with running(house, "--json") as child:
        wait_for((house.folder / "hanging").exists, child)
        child.send_signal(number)
        out, err = child.communicate()
    assert (child.returncode, err) == (130, "")
    report = json.loads(out)
    told = rows(report)
    assert report["interrupted"]
    assert {disk: told[disk]["outcome"] for disk in told} == {"a": "ok", "b": "left", "c": "left"}
    assert told["b"]["left"] == ["before hook: the run was interrupted in the middle of it"]
    assert (house.folder / "after").read_text().split() == ["a", "b"], "what the first hook stopped is started again"
    metrics = house.metrics()
    assert value(metrics, "last_run_success") == 0
    assert value(metrics, "disks", outcome="left") == 2
    assert value(metrics, "last_success_timestamp_seconds", disk="c", destination="vault") == 0
    house.configure(CONFIG.format(hooks=""))
    again = house.nightly("--json")
    assert again.status == 0
    assert list(rows(again.json)) == ["b", "c", "a"]


# -- short of room, unreachable ----------------------------------------------------------------------------------------


@pytest.fixture
def script() -> Iterator[Script]:
    with scripted_server() as server:
        yield server


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for 3 MiB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "none", mounted], check=True)
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


@pytest.mark.root
def test_a_repository_without_room_fails_those_that_find_none_and_no_other(house: House, small: Path) -> None:
    for seed, disk in enumerate(("a", "b", "c")):
        house.disk(disk, seed=seed)
    noise = house.folder / "noise"
    noise.write_bytes(random.Random(1).randbytes(4 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", noise, house.image("b")], check=True)
    assert snapchain("init", "small/vault", "--no-encryption", folder=house.folder).status == 0
    house.configure(CONFIG.format(hooks="").replace('url = "vault"', 'url = "small/vault"'))
    said = house.nightly("--json")
    assert said.status == 10
    told = rows(said.json)
    assert {disk: told[disk]["outcome"] for disk in told} == {"a": "ok", "b": "failed", "c": "ok"}
    (fault,) = told["b"]["faults"]
    assert (fault["kind"], fault["step"]) == ("unavailable", "ship to vault")
    assert "no space left" in fault["message"]
    assert house.points("abc", "small/vault") == {"a": [1], "b": [], "c": [1]}
    assert house.is_sound("small/vault")
    subprocess.run(["mount", "-o", "remount,size=20M", small], check=True)
    house.remember("b")
    assert house.nightly("--json").status == 0
    assert house.is_restored("b", "small/vault")


@pytest.mark.root
def test_no_room_for_the_state_and_the_metrics_is_told_and_the_work_is_done(house: House, small: Path) -> None:
    house.disk("a", seed=1)
    text = house.config.read_text().replace('"state"', '"small/state"').replace('"metrics/', '"small/metrics/')
    house.config.write_text(text)
    (small / "filler").write_bytes(bytes(3 << 20))
    said = house.nightly("--json")
    if said.status != 10:  # not even the directory: then it cannot know that it is alone, and does nothing
        assert said.json["error"]["kind"] == "unavailable"
        (small / "filler").write_bytes(bytes((3 << 20) - (16 << 10)))
        (small / "state").mkdir()
        (small / "filler").write_bytes(bytes(3 << 20))
        said = house.nightly("--json")
    assert said.status == 10
    assert {fault["step"] for fault in said.json["faults"]} >= {"metrics", "state"}
    assert rows(said.json)["a"]["outcome"] == "ok"
    assert house.points("a") == {"a": [1]}


def test_a_server_that_is_down_beside_a_repository_that_works(
    house: House, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.says(DROP)
    for name, text in {
        "AWS_ENDPOINT_URL_S3": script.endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, text)
    for seed, disk in enumerate("abcdef"):
        house.disk(disk, seed=seed)
        house.remember(disk)
    away = '[[destinations]]\nname = "away"\nurl = "s3://bucket/x"\n'
    house.configure(CONFIG.format(hooks="") + away)
    said = house.nightly()
    assert len(script.requests) == ONE_CALL, "the server is not asked again for each disk"
    assert said.status == 10
    assert "a, b, c, d and 2 more: ship to away" in said.out
    report = json.loads((house.folder / "state" / "last-report.json").read_text())
    for row in rows(report).values():
        assert [each["outcome"] for each in row["destinations"]] == ["ok", "failed"]
        assert row["faults"][0]["kind"] == "unavailable"
        assert row["why_not_merged"] == "not every destination holds it"
    assert [each["outcome"] for each in report["destinations"]] == ["ok", "failed"]
    metrics = house.metrics()
    assert value(metrics, "destination_success", destination="away") == 0
    assert value(metrics, "rpo_lag_seconds", disk="a", destination="away") == float("inf")
    assert value(metrics, "rpo_lag_seconds", disk="a", destination="vault") < 3600
    assert all(house.is_restored(disk) for disk in "abcdef")


# -- beside each other -------------------------------------------------------------------------------------------------


def test_a_second_run_leaves_with_its_own_code_or_waits(house: House) -> None:
    house.disk("a", seed=1)
    hook = 'before = ["sh", "-c", "touch hanging; until test -e go; do sleep 0.02; done"]'
    house.configure(CONFIG.format(hooks=f"[disks.hooks]\n{hook}\n"))
    with running(house, "--json") as first:
        wait_for((house.folder / "hanging").exists, first)
        second = house.nightly("--json")
        assert (second.status, second.json["error"]["kind"]) == (9, "busy")
        assert f"pid {first.pid}" in second.json["error"]["message"]
        with running(house, "--json", "--wait", "1h") as waiting:
            assert waiting.stderr is not None
            assert f"waiting for another run (pid {first.pid}" in waiting.stderr.readline()
            assert waiting.poll() is None
            (house.folder / "go").touch()
            reports = [_json(child.communicate()) for child in (first, waiting)]
    assert [child.returncode for child in (first, waiting)] == [0, 0]
    assert [rows(report)["a"]["destinations"][0]["point"] for report in reports] == [1, 2]


def test_two_configurations_that_share_disks_at_the_same_time_hurt_nothing(house: House) -> None:
    for seed, disk in enumerate("abc"):
        house.disk(disk, seed=seed)
    other = House.__new__(House)
    other.__dict__ |= {**house.__dict__, "config": house.folder / "other.toml"}
    other.config.write_text(house.config.read_text().replace('"state"', '"state2"').replace("web.prom", "other.prom"))
    for night in range(2):
        for at, disk in enumerate("abc"):
            house.guest_writes(disk, 30 * night + at + 1, night + at)
            house.remember(disk)
        with running(house, "--json") as one, running(other, "--json") as two:
            said = [_json(child.communicate()) for child in (one, two)]
        for report in said:
            for row in rows(report).values():
                # Whoever came second to a disk may have found it taken; nothing else may be wrong with it.
                assert all(fault["kind"] in {"busy", "conflict"} for fault in row["faults"]), row["faults"]
        assert all(house.reads_as_remembered(disk) for disk in "abc")
    alone = house.nightly("--json")
    assert alone.status == 0, alone.out
    assert all(house.is_restored(disk) and house.reads_as_remembered(disk) for disk in "abc")
    assert all(clean(path) for disk in "abc" for path in chain_of(house.image(disk)))
    assert house.is_sound()


def _json(said: tuple[str, str]) -> Any:
    assert "bug in snapchain" not in said[0] + said[1]
    return json.loads(said[0])


# -- by mistake --------------------------------------------------------------------------------------------------------


def test_a_pattern_that_finds_nothing_is_no_success(house: House) -> None:
    said = house.nightly()
    assert said.status == 10
    assert "the pattern finds no image" in said.out
    assert value(house.metrics(), "last_run_success") == 0
    dry = house.nightly("--dry-run")
    assert dry.status == 10


def test_a_damaged_state_costs_no_more_than_the_order(house: House) -> None:
    for seed, disk in enumerate("ab"):
        house.disk(disk, seed=seed)
    assert house.nightly().status == 0
    state = house.folder / "state" / "state.json"
    state.write_bytes(state.read_bytes()[:100] + b"\xff\x00")
    again = house.nightly("--json")
    assert (again.status, "is damaged" in again.err) == (0, True)
    assert {row["destinations"][0]["bytes_read"] for row in rows(again.json).values()} == {0}
    shutil.rmtree(house.folder / "state")
    assert house.nightly().status == 0
