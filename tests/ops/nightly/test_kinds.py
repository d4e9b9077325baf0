"""Nights that ship to replicas beside repositories: the same night, whatever the kind of destination."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from snapchain.destinations import open_destination
from snapchain.image import ImageChain
from snapchain.model.events import Event, Notice
from snapchain.ops.nightly.document import parse
from snapchain.ops.nightly.preview import NightlyPlan, preview
from snapchain.ops.nightly.report import Outcome
from snapchain.ops.nightly.systemd import units
from snapchain.ops.ship.run import ShipRequest, run as ship
from snapchain.source.counted_sums import CountedSums
from tests.ops.nightly import exposition
from tests.ops.nightly.night import Clock, Host, MiB, row
from tests.ops.stacks import flat, write

NIGHT = timedelta(days=1)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.repository()
    return made


def both(host: Host, more: str = "") -> str:
    return f"""
[keep]
last = 3
[[disks]]
glob = "images/*.qcow2"
name = "{{stem}}/vda"
merge_above = 4
[[destinations]]
name = "vault"
url = "repo"
[[destinations]]
name = "standby"
url = "dir:{host.directory}/replica"
{more}
"""


def test_a_week_of_nights_to_a_repository_and_a_replica(host: Host, tmp_path: Path) -> None:
    images = [host.disk("web1"), host.disk("db1")]
    clock, text = Clock(), both(host)
    replica = f"dir:{tmp_path}/replica"
    for night in range(6):
        clock.now += NIGHT
        for image in images:
            flat(image, tmp_path / f"{image.stem}-{night}.raw")
        events: list[Event] = []
        report = host.run(text, clock=clock, on_event=events.append)
        assert (report.outcome, report.faults) == (Outcome.OK, ())
        told = [event.message for event in events if isinstance(event, Notice)]
        assert not [words for words in told if "reading" in words], "each file is counted once"
        for name in ("web1/vda", "db1/vda"):
            vault, standby = row(report, name).destinations
            assert (vault.point, standby.point) == (night + 1, night + 1)
            assert vault.bytes_read == standby.bytes_read == 256 << 10
            assert vault.content_id == standby.content_id
            assert (vault.points, standby.points) == (min(night + 1, 3),) * 2
            # Local merges go on: both kinds are found to hold what is merged.
            assert (row(report, name).chain_length or 0) <= 5
        for image in images:
            write(image, f"write -P {100 + night} {night * 256}k 256k")

    for each in report.destinations:
        assert each.outcome is Outcome.OK
        assert sum(result.checked_bytes for result in each.verified) >= MiB
    vault_end, standby_end = report.destinations
    assert vault_end.gc is not None
    assert standby_end.gc is None, "the space of a replica is free at once: there is nothing to collect"

    for url in (str(tmp_path / "repo"), replica):
        for image in images:
            (there,) = open_destination(url).disks(f"{image.stem}/vda")
            assert [point.point for point in there.points] == [4, 5, 6]
            for point in there.points:
                _check(url, f"{image.stem}/vda", point.point, tmp_path / f"{image.stem}-{point.point - 1}.raw")

    found = exposition.read((tmp_path / "snapchain.prom").read_text())
    for destination in ("vault", "standby"):
        where = {"disk": "web1/vda", "destination": destination}
        assert exposition.value(found, "points", **where) == 3
        assert exposition.value(found, "layers", **where) >= 1
        assert exposition.value(found, "rpo_lag_seconds", **where) == 0
        assert exposition.value(found, "destination_success", destination=destination) == 1
        assert exposition.value(found, "verified_bytes", destination=destination) >= MiB


def test_what_was_sent_to_a_replica_is_not_read_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    image, clock = host.disk("web1"), Clock()
    read: list[int] = []
    unread = CountedSums.unread

    def noting(sums: CountedSums, chain: ImageChain, count: int) -> int:
        read.append(unread(sums, chain, count))
        return read[-1]

    monkeypatch.setattr(CountedSums, "unread", noting)
    for night in range(3):
        clock.now += NIGHT
        assert host.run(both(host), clock=clock).outcome is Outcome.OK
        write(image, f"write -P {100 + night} {night * 256}k 256k")
    assert sum(read) == 0


def test_a_disk_that_was_handed_over_and_back_is_merged_here_too(host: Host) -> None:
    image, clock, text = host.disk("web1"), Clock(), both(host)
    for night in range(5):
        clock.now += NIGHT
        write(image, f"write -P {100 + night} 0 64k")
        report = host.run(text, clock=clock)
        assert (report.outcome, row(report, "web1/vda").faults) == (Outcome.OK, ())
        if not night:
            (sealed,) = host.directory.glob("images/web1.*.qcow2")
            request = ShipRequest(image=sealed, disk="web1/vda", epoch=3)
            ship(request, open_destination(f"dir:{host.directory}/replica"))
    assert row(report, "web1/vda").merge is not None


def _check(url: str, disk: str, point: int, truth: Path) -> None:
    from snapchain.ops.restore.run import Restoration

    out = truth.with_suffix(".back.raw")
    out.unlink(missing_ok=True)
    Restoration(open_destination(url), disk, out, point=str(point)).run()
    assert out.read_bytes() == truth.read_bytes()


def test_a_dry_run_shows_the_same_for_both(host: Host) -> None:
    image, text = host.disk("web1"), both(host)
    first = _preview(host, text)
    assert first.sound, first
    assert [each.bytes_to_read for each in first.disks[0].destinations] == [256 << 10] * 2
    assert not (host.directory / "replica").exists()
    clock = Clock()
    for night in range(3):
        clock.now += NIGHT
        host.run(text, clock=clock)
        write(image, f"write -P {night + 50} 1M 64k")
    before = sorted(path for path in (host.directory / "replica").rglob("*"))
    plan = _preview(host, text.replace("last = 3", "last = 1"), clock)
    assert plan.sound, plan
    assert [each.points_dropped for each in plan.disks[0].destinations] == [(1, 2, 3)] * 2, "tonight's is the last one"
    assert [[row.kept for row in each.points] for each in plan.disks[0].destinations] == [[False] * 3] * 2
    assert [each.bytes_to_read for each in plan.disks[0].destinations] == [64 << 10] * 2
    assert [each.gc for each in plan.destinations] == [True, False]
    assert [each.verify for each in plan.destinations] == [("web1/vda",)] * 2
    assert sorted(path for path in (host.directory / "replica").rglob("*")) == before


def _preview(host: Host, text: str, clock: Clock | None = None) -> NightlyPlan:
    host.path.write_text(host.whole(text))
    return preview(parse(host.path.read_text(), path=host.path), host.path, clock=clock or Clock())


def test_damage_at_a_replica_is_found_and_remembered(host: Host) -> None:
    host.disk("web1")
    text = both(host, "verify = { share = '100%' }")
    assert host.run(text).outcome is Outcome.OK
    (file,) = (host.directory / "replica").rglob("web1*.qcow2")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o600)
    file.write_bytes(data)
    report = host.run(text)
    assert report.outcome is Outcome.FAILED
    vault, standby = report.destinations
    assert vault.outcome is Outcome.OK
    assert standby.outcome is Outcome.FAILED
    assert standby.faults[0].step == "verify web1/vda"
    assert host.metric("verify_findings", destination="standby") >= 1


def test_a_replica_that_does_not_answer_is_found_before_the_snapshot(host: Host, tmp_path: Path) -> None:
    """Opening it sends nothing; without a destination that answers, a snapshot would only make the chain longer."""
    image = host.disk("web1")
    (tmp_path / "file").write_text("no directory")
    text = both(host).replace('name = "vault"\nurl = "repo"\n[[destinations]]\n', "")
    text = text.replace(f"dir:{tmp_path}/replica", "ssh://nobody@host.invalid/replica")
    report = host.run(text)
    disk = row(report, "web1/vda")
    assert (disk.outcome, disk.snapshot) == (Outcome.FAILED, "none"), disk
    assert "host.invalid" in str(disk.faults[0])
    assert [path.name for path in host.images.iterdir()] == [image.name]


def test_a_rate_and_a_size_of_packs(host: Host) -> None:
    host.disk("web1")
    assert host.run(both(host, "limit_rate = '100M'")).outcome is Outcome.OK
    report = host.run(both(host, "pack_size = '1M'"))
    assert "no packs" in report.destinations[1].faults[0].message


def test_the_service_may_write_to_a_local_replica_and_asks_no_passphrase_for_it(host: Host) -> None:
    text = host.whole(both(host, '[[destinations]]\nname = "far"\nurl = "ssh://root@kvm2/srv/replica"\n'))
    text = text.replace(f"dir:{host.directory}/replica", "dir:/srv/replica")
    service = units(parse(text, path=host.path), host.path, program=["snapchain"]).service
    assert "ReadWritePaths=-/srv/replica" in service
    assert "LoadCredential=vault:" in service
    assert "LoadCredential=standby:" not in service
    assert "LoadCredential=far:" not in service
