"""The night that a nightly job is for: many disks, some broken in different ways, and a window too short for all.

By the command line; every number that it tells is counted again from outside.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from snapchain.ops.nightly import plan
from tests.ops.nightly.evening import PIECE, House, Said, chain_of, hidden_bytes, leftovers, rows, snapchain
from tests.ops.nightly.exposition import value
from tests.ops.nightly.night import in_use
from tests.ops.stacks import same

GOOD = [f"good{number:02}" for number in range(17)]
BROKEN = ("middle", "rootless", "held", "refused", "vanished")
EVERY = (*GOOD, *BROKEN)

CONFIG = """
[budget]
{budget}
[keep]
last = 2
[[disks]]
path = "images/good00.qcow2"
merge_above = 4
[[disks]]
glob = "images/*.qcow2"
exclude = ["*-base.qcow2", "*-middle.qcow2"]
merge_above = 5
{hooks}
[[destinations]]
name = "vault"
url = "vault"
verify = {{ disks = 2, share = "100%" }}
"""
VANISHING = '[disks.hooks]\nbefore = ["sh", "-c", "{first}rm -f images/vanished.qcow2"]'


class Told:
    """One run: what it printed, against what is there."""

    def __init__(self, house: House, said: Said) -> None:
        self.house, self.said = house, said
        self.report: Any = said.json
        self.disks = rows(self.report)
        self.metrics = house.metrics()

    def outcome(self, disk: str) -> str:
        return str(self.disks[disk]["outcome"])

    def by_outcome(self, outcome: str) -> set[str]:
        return {disk for disk in self.disks if self.outcome(disk) == outcome}

    def check(self, before: dict[str, list[int] | None]) -> None:
        """Everything that must hold of any run."""
        report, metrics, house = self.report, self.metrics, self.house
        outcomes = Counter(self.outcome(disk) for disk in self.disks)
        assert report["counts"] == {each: outcomes[each] for each in ("ok", "busy", "left", "damaged", "failed")}
        assert {each: value(metrics, "disks", outcome=each) for each in report["counts"]} == report["counts"]
        whole = set(outcomes) <= {"ok"} and all(each["outcome"] == "ok" for each in report["destinations"])
        assert self.said.status == (0 if whole and not report["faults"] and not report["left"] else 10)
        assert value(metrics, "last_run_success") == (self.said.status == 0)
        kept = {name: each for name, each in report.items() if name != "notices"}  # of the command, not of the run
        assert json.loads((house.folder / "state" / "last-report.json").read_text()) == kept
        finished = _time(report["finished"])
        assert value(metrics, "last_run_timestamp_seconds") == pytest.approx(finished, abs=0.001)
        assert finished - _time(report["started"]) == pytest.approx(report["seconds"], abs=10)
        after = house.points(self.disks)
        for disk, row in self.disks.items():
            self._check_disk(disk, row, before[disk], after[disk])

    def _check_disk(self, disk: str, row: Any, before: list[int] | None, after: list[int] | None) -> None:
        assert value(self.metrics, "disk_success", disk=disk) == (row["outcome"] == "ok")
        assert (row["faults"] != []) == (row["outcome"] == "failed"), row
        assert (row["left"] != []) == (row["outcome"] == "left"), row
        (there,) = row["destinations"]
        assert (there["point"] is None) == (before is None or after is None or after[-1:] == before[-1:])
        lag = value(self.metrics, "rpo_lag_seconds", disk=disk, destination="vault")
        success = value(self.metrics, "last_success_timestamp_seconds", disk=disk, destination="vault")
        assert lag == pytest.approx(_time(self.report["finished"]) - success, abs=0.01)
        assert (success >= _time(self.report["started"])) == (there["point"] is not None)
        if row["outcome"] != "ok":
            return
        assert _time(self.report["started"]) <= success <= _time(self.report["finished"])
        assert before is not None
        assert after is not None
        assert there["point"] == after[-1] == (before[-1] + 1 if before else 1)
        assert after == [*before, after[-1]][-2:], "the rule keeps two"
        assert there["points"] == len(after) == value(self.metrics, "points", disk=disk)
        image = self.house.image(disk)
        chain = chain_of(image)
        assert row["chain_length"] == len(chain) == value(self.metrics, "chain_length", disk=disk) <= 5
        assert row["shadowed_bytes"] == hidden_bytes(image) == value(self.metrics, "shadowed_bytes", disk=disk)
        if row["merge"] is not None:
            assert row["merge"]["layers_after"] == len(chain)
            assert not any(Path(path).exists() for path in row["merge"]["removed"] if path not in map(str, chain))
        assert there["bytes_read"] == value(self.metrics, "shipped_bytes", disk=disk, destination="vault")
        assert there["bytes_stored"] == value(self.metrics, "stored_bytes", disk=disk, destination="vault")

    def new_bytes(self, disks: set[str]) -> set[int]:
        """Guest bytes read of these disks to be shipped."""
        return {self.disks[disk]["destinations"][0]["bytes_read"] for disk in disks}


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@pytest.fixture
def over_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Let the time of a run be over as soon as a file that its hooks write has so many lines."""

    def patch(begun: Path, count: int) -> None:
        def limits_of(*, clock: Callable[[], datetime], **named: Any) -> plan.Limits:
            def soon() -> datetime:
                over = begun.exists() and len(begun.read_text().splitlines()) >= count
                return clock() + timedelta(days=over)

            return plan.limits_of(clock=soon, **named)

        monkeypatch.setattr("snapchain.ops.nightly.run.limits_of", limits_of)

    return patch


def test_twenty_two_disks_five_of_them_broken_and_a_window_too_short(
    tmp_path: Path, over_at: Callable[[Path, int], None]
) -> None:
    house = House(tmp_path)
    house.init()
    house.disk("refused", seed=99)
    shipped = snapchain("ship", house.image("refused"), "vault::refused", folder=tmp_path)
    assert shipped.status == 0
    (records,) = (tmp_path / "vault" / "disks").iterdir()
    for seed, disk in enumerate(each for each in EVERY if each != "refused"):
        house.disk(disk, seed=seed)
    house.configure(CONFIG.format(budget="", hooks=""))
    first = Told(house, house.nightly("--json"))
    first.check({disk: [1] if disk == "refused" else [] for disk in EVERY})
    assert first.by_outcome("ok") == set(EVERY)

    # A day, in which guests write and things break.
    for number, disk in enumerate(EVERY):
        house.guest_writes(disk, 100 + number, number % 4)
        house.remember(disk)
    middle = house.images / "middle-middle.qcow2"
    whole_middle = middle.read_bytes()
    base = house.images / "rootless-base.qcow2"
    base.rename(tmp_path / "kept-base")
    _damage_l1(middle)
    catalogue = max(records.iterdir())
    whole_catalogue = catalogue.read_bytes()
    catalogue.write_bytes(whole_catalogue[:-20] + bytes(20))
    before = house.points(EVERY)
    with ExitStack() as guests:
        guests.enter_context(in_use(house.image("held")))

        # The first night: there is time for some.
        over_at(tmp_path / "begun", 9)
        house.configure(CONFIG.format(budget="time = 3600", hooks=VANISHING.format(first="echo >> begun; ")))
        (vanished := house.image("vanished")).rename(tmp_path / "kept-vanished")
        vanished.symlink_to(tmp_path / "kept-vanished")
        short = Told(house, house.nightly("--json"))
        short.check(before)
        left, done = short.by_outcome("left"), short.by_outcome("ok")
        assert left
        assert done
        assert done <= set(GOOD)
        assert short.by_outcome("busy") == set()
        for disk in left:
            assert "the time of 3600 seconds is over" in short.disks[disk]["left"][0]
        assert short.report["destinations"][0]["outcome"] in {"left", "failed"}
        assert short.new_bytes(done) <= {PIECE}

        # The next one, with time enough: those that were left come first, and what is broken still is.
        house.configure(CONFIG.format(budget="", hooks=VANISHING.format(first="")))
        vanished.symlink_to(tmp_path / "kept-vanished")
        order = list(rows(json.loads(house.nightly("--dry-run", "--json").out)["plan"]))
        before = house.points(EVERY)
        second = Told(house, house.nightly("--json"))
        assert list(second.disks) == order
        untouched = {disk for disk in left if short.disks[disk]["left"][0].startswith("all of it")}
        assert set(order[: len(untouched)]) <= left
        second.check(before)
        assert second.by_outcome("ok") == set(GOOD)
        merged = (short if "good00" in done else second).disks["good00"]
        assert (merged["merge"]["layers_before"], merged["chain_length"]) == (5, 4)
        assert second.by_outcome("failed") == set(BROKEN)
        kinds = {disk: second.disks[disk]["faults"][0]["kind"] for disk in BROKEN}
        assert kinds == {
            "middle": "corrupt", "rootless": "not-found", "held": "busy", "refused": "corrupt", "vanished": "not-found",
        }  # fmt: skip
        assert "qemu-io" in second.disks["held"]["faults"][0]["message"]
        assert second.new_bytes(set(GOOD) & untouched) == {PIECE}
    for disk in GOOD:
        assert house.is_restored(disk), disk
        assert house.reads_as_remembered(disk), disk

    # Mended: a night without faults.
    base = tmp_path / "kept-base"
    base.rename(house.images / "rootless-base.qcow2")
    middle.write_bytes(whole_middle)
    catalogue.write_bytes(whole_catalogue)
    vanished.unlink(missing_ok=True)
    (tmp_path / "kept-vanished").rename(vanished)
    house.configure(CONFIG.format(budget="", hooks=""))
    house.remember("held")
    before = house.points(EVERY)
    third = Told(house, house.nightly("--json"))
    third.check(before)
    assert third.said.status == 0
    assert third.by_outcome("ok") == set(EVERY)
    for disk in BROKEN:
        assert house.is_restored(disk), disk
        assert house.reads_as_remembered(disk), disk
    out = tmp_path / "restored.qcow2"
    assert snapchain("restore", "vault::good00", out, folder=tmp_path).status == 0
    assert same(out, tmp_path / "truths" / "good00.raw")
    log = snapchain("log", "vault", "--json", folder=tmp_path).json["disks"]
    assert {each["name"]: [point["point"] for point in each["points"]] for each in log} == house.points(EVERY)
    verified = snapchain("verify", "vault", "--read-data", "--json", folder=tmp_path)
    assert (verified.status, verified.json["findings"]) == (0, [])
    collected = snapchain("gc", "vault", "--dry-run", "--json", folder=tmp_path).json["plan"]
    assert collected["packs_deleted"] == 0, "the run itself has collected"
    assert leftovers([house.images, tmp_path / "state", tmp_path / "metrics"]) == []


def _damage_l1(path: Path) -> None:
    """The first entry of the L1 table leads outside of the file; the header is sound."""
    with path.open("r+b") as image:
        image.seek(40)
        table = int.from_bytes(image.read(8), "big")
        image.seek(table)
        image.write((1 << 63 | 1 << 50).to_bytes(8, "big"))
