"""The fault matrix: four writers, two collectors and two readers for ten minutes, over stores that fail in every way.

    make soak ARGS='-k fault_matrix -s'     (SOAK_SECONDS=60 for a shorter look)

Each is a process of its own, four of them with a clock that is an hour wrong; some die at a call of the store, some are
stopped for longer than a lease lives (tests/ops/fault_matrix.py).  At the end, without faults: no point that was
reported and not dropped is lost, each shows what it showed, and verify agrees.  The counts are printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from snapchain.errors import Conflict, NotFound
from snapchain.repository import collecting
from snapchain.repository.opening import open_repository
from snapchain.repository.verification import verify
from tests.ops.fault_matrix import DEAD_SECONDS, DIED, PASSPHRASE, ledger
from tests.ops.shipping import restore
from tests.servers import S3Server

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
SKEW = "12m" if "TEST_S3_ENDPOINT" in os.environ else "1h"
"""moto and rclone take signatures of any time, other servers those of the last 15 minutes."""
ROLES = ("writer",) * 4 + ("collector",) * 2 + ("reader",) * 2


class Supervised:
    """One host, started again whenever it dies."""

    def __init__(self, number: int, role: str, place: Path, url: str) -> None:
        skew = [[], ["faketime", "-f", f"+{SKEW}"], [], ["faketime", "-f", f"-{SKEW}"]][number % 4]
        self._argv = [*skew, sys.executable, "-m", "tests.ops.fault_matrix", role, str(number), str(place), url]
        self._log = place / f"log{number}"
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.is_set():
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._argv, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
                )
            assert self._process.stdout is not None
            with self._process.stdout as lines:
                for text in lines:
                    self._hear(json.loads(text))
            status = self._process.wait()
            if self._end.is_set():
                return
            self.counts["deaths"] += 1
            if status != DIED:
                self.faults.append(f"{' '.join(self._argv)} ended with {status}: see {self._log}")
                return

    def _hear(self, line: dict[str, object]) -> None:
        counts = line.get("counts")
        if isinstance(counts, dict):
            self.counts.update(counts)
        else:
            self.faults.append(str(line))

    def stop_for(self, seconds: float) -> None:
        """As a virtual machine that is frozen."""
        self._signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._signal(signal.SIGCONT)
        self.counts["stops"] += 1

    def end(self) -> None:
        """Kill it, also one that was started again just now."""
        self._end.set()
        while self._thread.is_alive():
            self._signal(signal.SIGKILL)
            self._thread.join(0.1)

    def _signal(self, number: signal.Signals) -> None:
        """Send it to the whole group: faketime is a parent of its own, and there may be a qemu-img."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 900)
@pytest.mark.parametrize("kind", ["directory", "moto", "rclone"])
def test_four_writers_two_collectors_and_two_readers(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path / "repository")
    if kind != "directory":
        server: S3Server = request.getfixturevalue(kind)
        url = f"s3://{server.new_bucket()}/repository"
    (tmp_path / "ledger").mkdir()
    argv = [sys.executable, "-m", "snapchain", "init", url, "--block-size", "64K", "--pack-size", "512K", "-q"]
    subprocess.run(argv, check=True, env={**os.environ, "SNAPCHAIN_PASSWORD": PASSPHRASE})
    draw = random.Random(1)
    with ExitStack() as stack:
        hosts = [Supervised(number, role, tmp_path, url) for number, role in enumerate(ROLES)]
        for host in hosts:
            stack.callback(host.end)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until and not any(host.faults for host in hosts):
            time.sleep(draw.uniform(1, 8))
            if draw.random() < 0.3:
                draw.choice(hosts).stop_for(DEAD_SECONDS * draw.choice([0.5, 1.6]))
    counts = sum((host.counts for host in hosts), Counter[str]())
    print(f"\n{kind}, {SECONDS:.0f} s:", json.dumps(dict(sorted(counts.items())), indent=1))
    assert [fault for host in hosts for fault in host.faults] == []
    _check(tmp_path, url, "as it was left")
    opened = open_repository(url, passphrase=lambda: PASSPHRASE, writing=True)
    for _ in range(3):
        try:
            assert collecting.run(opened).findings == ()
        except Conflict:  # the claim of a host that was killed, which holds for ten minutes (exclusive.py)
            assert not opened.conditional
    _check(tmp_path, url, "after three collections")
    assert counts["points reported"] > 10
    assert counts["collections"] > 5
    assert counts["restores"] > 5


def _check(place: Path, url: str, when: str) -> None:
    """Nothing that was reported is lost."""
    opened = open_repository(url, passphrase=lambda: PASSPHRASE)
    report = verify(opened, share=1.0)
    assert report.ok, report.findings
    points, dropped = ledger(place)
    lost, wrong, whole, gone = [], [], 0, 0
    out = place / "out.raw"
    for (disk, point), contents in points.items():
        try:
            restore(opened, out, point, disk=disk, force=True)
        except NotFound:
            gone += 1
            if (disk, point) not in dropped:
                lost.append((disk, point))
            continue
        whole += 1
        if hashlib.sha256(out.read_bytes()).hexdigest() not in contents:
            wrong.append((disk, point))
    print(f"{when}: {whole} points whole, {gone} dropped, {len(lost)} lost, {len(wrong)} wrong")
    assert (lost, wrong) == ([], [])
