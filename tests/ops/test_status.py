"""status: ages by a given clock, what counts as late, and what Nagios and Prometheus read of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from snapchain.cli import main
from snapchain.destination.protocol import Destination
from snapchain.errors import NotFound, Unavailable
from snapchain.model.disk_name import is_disk_name
from snapchain.objects.memory import MemoryStore
from snapchain.ops import monitoring
from snapchain.ops.guest_status import GuestStatus
from snapchain.ops.monitoring import Level, metrics, nagios, nagios_failure
from snapchain.ops.status import DestinationStatus, DiskStatus, StatusReport, Trouble, Wanted, status
from snapchain.repository.catalogue import generation_names
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.opening import open_repository
from snapchain.repository.repository import Repository
from tests.repository.synthetic import repository
from tests.repository.test_summaries import publish

NOW = datetime(2026, 11, 30, 2, tzinfo=UTC)
HOUR, DAY = 3600.0, 86400.0


@pytest.fixture
def repo() -> Repository:
    repo = repository(MemoryStore())
    publish(repo, "db/vda", [3, 2])
    publish(repo, "web1/vda", [2, 1])
    publish(repo, "web2/vda", [5, -3, -400])
    publish(repo, "web3/vda", [-1])
    publish(repo, "web4/vda", [])
    return repo


def wanted(repo: Repository, name: str | None = None) -> Wanted:
    return Wanted("/backup", name, lambda: RepositoryDestination(repo))


def down() -> Destination:
    raise Unavailable("the server does not answer", subject="s3://b")


def test_ages_by_the_clock(repo: Repository) -> None:
    report = status([wanted(repo)], max_age=26 * HOUR, now=NOW)
    rows = {each.disk: (each.point, each.age_seconds, each.late, each.points_of_the_future) for each in report.disks}
    assert rows == {
        "db/vda": (2, 2 * DAY, True, ()),
        "web1/vda": (2, DAY, False, ()),
        "web2/vda": (1, 5 * DAY, True, (2, 3)),
        "web3/vda": (None, None, True, (1,)),
        "web4/vda": (None, None, True, ()),
    }
    assert [each.disk for each in report.late] == ["db/vda", "web2/vda", "web3/vda", "web4/vda"]
    assert not report.is_sound
    later = status([wanted(repo)], max_age=26 * HOUR, now=NOW + timedelta(days=3))
    assert {each.disk: each.late for each in later.disks}["web2/vda"] is False, "time has reached its second point"
    unstated = status([wanted(repo)], now=NOW)
    assert {each.late for each in unstated.disks} == {None}
    assert unstated.is_sound, "points of the future alone are reported, and no fault"


@pytest.mark.parametrize(("age", "late"), [(26 * HOUR, False), (26 * HOUR + 1, True)])
def test_just_as_old_as_stated_is_in_time(age: float, late: bool) -> None:
    repo = repository(MemoryStore())
    publish(repo, "a", [age / DAY])
    (row,) = status([wanted(repo)], max_age=26 * HOUR, now=NOW).disks
    assert row.late is late


def test_what_cannot_be_read_hides_nothing(repo: Repository) -> None:
    *_, name = generation_names(repo.store, repo.keys.disk_key("db/vda"))
    repo.store.put(name, b"")
    asked = [Wanted("s3://b", None, down), wanted(repo)]
    report = status(asked, max_age=26 * HOUR, now=NOW)
    assert [(each.destination, each.trouble and each.trouble.kind) for each in report.destinations] == [
        ("s3://b", "unavailable"),
        (repo.store.url, None),
    ]
    (unread,) = (each for each in report.disks if each.trouble)
    assert unread.trouble is not None
    assert (unread.trouble.kind, unread.late) == ("corrupt", None)
    assert len(report.disks) == 5
    with pytest.raises(Unavailable, match="does not answer"):
        status(asked[:1], now=NOW, shows_troubles=False)


def test_some_disks(repo: Repository) -> None:
    def names(**how: object) -> list[str]:
        return [each.disk for each in status([wanted(repo)], now=NOW, **how).disks]  # type: ignore[arg-type]

    assert names(match=["web*"]) == ["web1/vda", "web2/vda", "web3/vda", "web4/vda"]
    assert names(match=["db/*", "web[12]/vda"]) == ["db/vda", "web1/vda", "web2/vda"]
    with pytest.raises(NotFound, match="fits x"):
        names(match=["x*"])
    both = status([wanted(repo, "db/vda"), wanted(repo, "web1/vda")], now=NOW)
    assert [each.disk for each in both.disks] == ["db/vda", "web1/vda"]
    assert len(both.destinations) == 1
    with pytest.raises(NotFound, match="no such disk or guest"):
        status([wanted(repo, "db")], now=NOW)


def test_a_guest_and_its_disks(repo: Repository) -> None:
    publish(repo, "web1/vdb", [1], instant="ab" * 16)
    report = status([wanted(repo, "web1")], now=NOW)
    assert [each.disk for each in report.disks] == ["web1/vda", "web1/vdb"]
    assert [each.guest for each in report.guests] == ["web1"]
    assert [each.guest for each in status([wanted(repo)], match=["web1"], now=NOW).guests] == ["web1"]
    assert status([wanted(repo)], match=["web2*"], now=NOW).guests == ()
    assert status([wanted(repo)], now=NOW, with_guests=False).guests == ()


# ---- Nagios


def report_of(*disks: DiskStatus, **more: object) -> StatusReport:
    places = (DestinationStatus(destination="/backup", kind="repository", disks=len(disks)),)
    return StatusReport(**{"guests": (), "destinations": places, "disks": disks, "time": NOW, **more})


def row(disk: str = "web1/vda", **more: object) -> DiskStatus:
    fields = {"point": 7, "time": NOW - timedelta(hours=1), "age_seconds": HOUR, "points": 7, "virtual_size": 1 << 30}
    return DiskStatus(destination="/backup", disk=disk, **{**fields, **more})


TROUBLE = Trouble(kind="corrupt", subject=None, message="the stored bytes were altered")
SILENT = DestinationStatus(destination="s3://b", trouble=TROUBLE)


@pytest.mark.parametrize(
    ("report", "level", "words"),
    [
        (report_of(row()), Level.OK, "1 disk, all readable"),
        (report_of(row(late=False), max_age_seconds=DAY), Level.OK, "none late"),
        (report_of(row(), row("web2", late=True), max_age_seconds=60.0), Level.CRITICAL, "1 disk late (web2)"),
        (report_of(row(trouble=TROUBLE)), Level.CRITICAL, "1 disk unreadable"),
        (report_of(row(points_of_the_future=(8,))), Level.WARNING, "1 disk with points of the future (web1/vda)"),
        (report_of(row(), guests=(GuestStatus(guest="g", destination="", owed=("x",)),)), Level.WARNING, "owed of g"),
        (report_of(row(), destinations=(SILENT,)), Level.UNKNOWN, "s3://b: the stored bytes were altered"),
        (report_of(row(late=True), destinations=(SILENT,), max_age_seconds=1.0), Level.CRITICAL, "late"),
        (report_of(), Level.UNKNOWN, "no disk is there"),
        (report_of(*(row(f"d{n}", late=True) for n in range(9)), max_age_seconds=1.0), Level.CRITICAL, "and 6 more"),
    ],
)
def test_the_level_is_the_worst(report: StatusReport, level: Level, words: str) -> None:
    found, line = nagios(report)
    assert found is level
    assert line.startswith(f"SNAPCHAIN {level.name} - ")
    assert words in line.partition("|")[0]


_VALUE = re.compile(r"([a-z_]+)=(-?\d+(?:\.\d+)?)(s|%|[KMGT]?B|c)?;(\d*);(\d*);(\d*)(?:;(\d*))?")


def values(line: str) -> dict[str, tuple[float, str, str]]:
    """By the guidelines for plugins, 'label'=value[UOM];warn;crit;min;max: label -> value, warn, crit."""
    _, bar, performance = line.partition("|")
    assert "\n" not in line
    assert bar
    assert "|" not in performance
    found = {}
    for word in performance.split():
        match = _VALUE.fullmatch(word)
        assert match is not None, word
        found[match[1]] = float(match[2]), match[4], match[5]
    return found


NAMES = st.text(min_size=1, max_size=30).filter(is_disk_name)


@given(st.lists(NAMES, min_size=1, max_size=3, unique=True))
def test_performance_data_whatever_disks_are_called(names: list[str]) -> None:
    _, line = nagios(report_of(*(row(name, late=True) for name in names), max_age_seconds=60.0))
    assert values(line) == {
        "disks": (len(names), "", ""),
        "late": (len(names), "", "0"),
        "unreadable": (0, "", "0"),
        "future": (0, "0", ""),
        "oldest_age": (3600, "", "60"),
    }


def test_what_is_not_known_is_unknown() -> None:
    level, line = nagios_failure(NotFound("a | b\nc", subject="/x"))
    assert (level, line) == (Level.UNKNOWN, "SNAPCHAIN UNKNOWN - /x: a \\x7c b\\nc")


# ---- Prometheus


def series(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """A small reader of the text format: name{label="value",...} number, with \\\\, \\" and \\n in values."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.match(r"# (HELP|TYPE) snapchain_[a-z_]+ ", line)
            continue
        name, _, rest = line.partition("{")
        labels = []
        while not rest.startswith("}"):
            label, _, rest = rest.lstrip(",").partition('="')
            value = ""
            while not rest.startswith('"'):
                if rest.startswith("\\"):
                    value += {"\\": "\\", '"': '"', "n": "\n"}[rest[1]]
                    rest = rest[2:]
                else:
                    value, rest = value + rest[0], rest[1:]
            labels.append((label, value))
            rest = rest[1:]
        key = name, tuple(labels)
        assert key not in found, "no series twice"
        found[key] = float(rest.removeprefix("} "))
    return found


@given(st.lists(NAMES, max_size=4, unique=True))
def test_metrics_whatever_disks_are_called(names: list[str]) -> None:
    report = report_of(*(row(name, late=True, points_of_the_future=(8, 9)) for name in names), max_age_seconds=60.0)
    found = series(metrics(report).decode())
    for name in names:
        key = (("destination", "/backup"), ("disk", name))
        assert found["snapchain_status_disk_points", key] == 7
        assert found["snapchain_status_disk_newest_timestamp_seconds", key] == (NOW - timedelta(hours=1)).timestamp()
        assert found["snapchain_status_disk_points_of_the_future", key] == 2
        assert found["snapchain_status_disk_late", key] == 1
        assert found["snapchain_status_disk_readable", key] == 1
        assert found["snapchain_status_disk_virtual_bytes", key] == 1 << 30
    assert len([key for key in found if key[0] == "snapchain_status_disk_points"]) == len(names)


def test_metrics_of_what_cannot_be_asked() -> None:
    guest = GuestStatus(guest="g", destination="/backup", owed=("x", "y"))
    places = (DestinationStatus(destination="/backup"), SILENT)
    report = report_of(row(trouble=TROUBLE), row(), destinations=places, guests=(guest,))
    found = {name: value for (name, labels), value in series(metrics(report).decode()).items() if len(labels) == 2}
    assert found["snapchain_status_guest_owed"] == 2
    ups = {labels: value for (name, labels), value in series(metrics(report).decode()).items() if name.endswith("_up")}
    assert ups == {(("destination", "/backup"),): 1, (("destination", "s3://b"),): 0}
    broken = series(metrics(report_of(row(trouble=TROUBLE, point=None, time=None))).decode())
    key = (("destination", "/backup"), ("disk", "web1/vda"))
    assert broken["snapchain_status_disk_readable", key] == 0
    assert ("snapchain_status_disk_newest_timestamp_seconds", key) not in broken


def test_a_metrics_file_is_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "new" / "a.prom"
    for report in (report_of(row()), report_of(row("web2"))):
        assert monitoring.write_metrics(str(place), report) is None
        assert place.read_bytes() == metrics(report)
    assert [each.name for each in place.parent.iterdir()] == ["a.prom"]
    assert place.stat().st_mode & 0o777 == 0o644


# ---- on the command line


@pytest.fixture
def shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A repository `repo` with a disk of yesterday and one of last year."""
    from snapchain.destinations import open_destination
    from snapchain.repository.opening import create_repository

    monkeypatch.chdir(tmp_path)
    create_repository("repo", passphrase=lambda: None, encryption="none")
    place = open_destination("repo", writing=True)
    assert isinstance(place, RepositoryDestination)
    ago = (datetime.now(UTC) - NOW) / timedelta(days=1)
    publish(place.repository, "web1/vda", [1 - ago])
    publish(place.repository, "old", [400 - ago, 365 - ago])

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["status", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_one_line_a_disk(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = shown("repo")
    assert code == 0
    head, *lines = out.splitlines()
    assert head.split()[:2] == ["disk", "point"]
    assert [line.split()[0] for line in lines] == ["old", "web1/vda"]
    assert "365 d" in lines[0]
    assert "24 h" in lines[1]


def test_when_a_disk_was_verified(shown: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert "verified" not in shown("repo")[1], "nobody has read anything yet"
    from tests.cli.conftest import made_disk
    from tests.ops.shipping import ship

    ship(made_disk(tmp_path), open_repository("repo", passphrase=lambda: None, writing=True), disk="web9/vda")
    before = datetime.now(UTC).replace(microsecond=0)
    assert main(["verify", "repo::web9/vda", "--read-data", "-q"]) == 0
    code, out, _ = shown("repo")
    assert code == 0
    assert "verified" in out.splitlines()[0]
    report = StatusReport.model_validate_json(re.sub(r', "notices": \[[^\]]*\]', "", shown("repo", "--json")[1]))
    found = {each.disk: each.verified for each in report.disks}
    assert {disk for disk, time in found.items() if time is None} == {"old", "web1/vda"}
    assert found["web9/vda"] is not None
    assert before <= found["web9/vda"] <= datetime.now(UTC)
    stamps = {
        dict(labels)["disk"]: value
        for (name, labels), value in series(metrics(report).decode()).items()
        if name == "snapchain_status_disk_verified_timestamp_seconds"
    }
    assert stamps == {"old": 0, "web1/vda": 0, "web9/vda": found["web9/vda"].timestamp()}


def test_exit_codes(shown: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = shown("repo", "--max-age", "26h")
    assert code == 10
    assert re.search(r"^old .* late$", out, re.MULTILINE)
    assert "1 disk older than 26 h" in out + err
    assert shown("repo", "--max-age", "26h", "--match", "web*")[0] == 0
    assert shown("repo", "--max-age", "500d")[0] == 0
    assert shown("repo::web1/vda", "--max-age", "26h")[0] == 0
    assert shown("gone")[0] == 3
    code, out, err = shown("gone", "repo")
    assert code == 10
    assert "web1/vda" in out
    assert "there is no such directory" in out + err
    assert shown("repo", "--max-age", "soon")[0] == 2
    assert shown("repo", "--nagios", "--json")[0] == 3
    assert shown("repo", "--metrics", "-", "--json")[0] == 2
    assert shown("repo", "--max-age", "26h", "--nagios")[0] == 2
    assert shown("repo", "--nagios")[0] == 0
    code, out, _ = shown("gone", "--nagios")
    assert (code, out.count("\n")) == (3, 1)
    code, out, _ = shown("repo", "--metrics", "-", "--max-age", "26h")
    assert code == 10
    assert len(series(out)) == 2 + 2 * 7
    assert shown("repo", "--metrics", "a.prom")[0] == 0
    assert len(series((tmp_path / "a.prom").read_text())) == 2 + 2 * 6


def test_json_has_all_fields(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = shown("repo", "--json", "--max-age", "26h")
    assert code == 10
    report = StatusReport.model_validate_json(re.sub(r', "notices": \[[^\]]*\]', "", out))
    assert [(each.disk, each.late, each.points) for each in report.disks] == [("old", True, 2), ("web1/vda", False, 1)]
