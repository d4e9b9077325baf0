"""Every report says what was asked of an S3 server, as the server itself has counted it, and what that costs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from snapchain.cli.stats import _month
from snapchain.errors import InvalidInput, NotFound
from snapchain.model.traffic import GIB, Bill, Prices, Traffic
from snapchain.ops.prices import VARIABLE, prices_of
from tests.objects.proxy import counting_proxy
from tests.ops.stacks import Layer, build
from tests.servers import S3Server, moto_s3

PRICES = 'currency = "EUR"\nput = 5\nget = 0.4\nstorage = 1024\ndownload = 0.09\n'
MiB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto_s3(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def image(tmp_path: Path) -> Path:
    writes = [f"write -P {number + 1} {number}M 300k" for number in range(8)]
    return build(tmp_path / "chain", [Layer(64 * MiB, writes), Layer(64 * MiB, ["write -P 99 9M 1M"])])[-1]


@pytest.fixture
def repository(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"s3://{server.new_bucket()}/prefix"


def run(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> Any:
    """What a command prints: its JSON object, or its text without --json."""
    from snapchain.cli import main

    ended = main([str(word) for word in words])
    shown = capsys.readouterr()
    assert ended == status, shown.err
    return json.loads(shown.out) if "--json" in words else shown.out


def test_every_report_counts_what_the_server_counts(
    server: S3Server,
    repository: str,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = tmp_path / "prices.toml"
    table.write_text(PRICES)
    monkeypatch.setenv(VARIABLE, str(table))
    run(capsys, "init", repository, "--no-encryption", "--quiet")
    disk, restored = f"{repository}::web1", tmp_path / "restored.qcow2"
    with counting_proxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        for words in (
            ("ship", image, disk),
            ("verify", repository, "--read-data"),
            ("restore", disk, restored),
            ("gc", repository),
            ("merge", disk, "--keep-last", "1"),
            ("log", repository),
            ("restore", disk, tmp_path / "never.qcow2", "--dry-run"),
        ):
            proxy.seen.clear()
            (bill,) = run(capsys, *words, "--json")["traffic"]
            methods = Counter(each.method for each in proxy.seen)
            assert bill["destination"] == repository
            assert bill["puts"] == methods["PUT"], words
            assert bill["lists"] + bill["gets"] == methods["GET"], words
            assert (bill["heads"], bill["deletes"]) == (methods["HEAD"], methods["DELETE"]), words
            assert bill["lists"] == sum("list-type" in each.path for each in proxy.seen), words
            assert bill["bytes_up"] == sum(each.sent for each in proxy.seen), words
            assert bill["bytes_down"] == sum(each.received for each in proxy.seen), words
            assert (bill["retries"], bill["refused"]) == (0, 0)
            cost = 5 * methods["PUT"] + 5 * bill["lists"] + 0.4 * (bill["gets"] + bill["heads"])
            assert bill["cost"] == pytest.approx(cost / 1000 + 0.09 * bill["bytes_down"] / GIB), words
            assert bill["currency"] == "EUR"
        stats = run(capsys, "stats", repository, "--json")
        assert stats["month_cost"] == pytest.approx(stats["stored_bytes"] / MiB, rel=1e-3)
        assert f"a month              {stats['month_cost']:.2f} EUR" in run(capsys, "stats", repository)


def test_the_requests_of_a_dry_run_are_those_of_the_restore(
    repository: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "init", repository, "--no-encryption", "--quiet")
    run(capsys, "ship", image, f"{repository}::web1", "--pack-size", "512K", "--quiet")
    plan = run(capsys, "restore", f"{repository}::web1", tmp_path / "out.qcow2", "--dry-run", "--json")["plan"]
    (bill,) = run(capsys, "restore", f"{repository}::web1", tmp_path / "out.qcow2", "--json")["traffic"]
    assert plan["requests"] > 0
    assert 0 <= bill["gets"] - plan["requests"] <= 20, "besides the data, a restore reads a few records"
    assert 0 <= bill["bytes_down"] - plan["bytes_to_fetch"] <= 64 << 10


def test_a_person_is_told_and_a_directory_counts_nothing(
    repository: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "init", repository, "--no-encryption", "--quiet")
    shown = run(capsys, "ship", image, f"{repository}::web1")
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("requests")]
    assert " PUT, " in line
    assert " up, " in line
    assert "EUR" not in line, "without a table of prices there is no cost"
    run(capsys, "init", tmp_path / "second", "--no-encryption", "--quiet")
    copied = run(capsys, "copy", repository, tmp_path / "second", "--json")
    assert [each["destination"] for each in copied["traffic"]] == [repository]
    assert copied["traffic"][0]["cost"] is None
    assert "traffic" not in run(capsys, "gc", tmp_path / "second", "--json")
    assert "requests" not in run(capsys, "gc", tmp_path / "second")


def test_a_night_counts_each_destination(
    repository: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "init", repository, "--no-encryption", "--quiet")
    run(capsys, "init", tmp_path / "here", "--no-encryption", "--quiet")
    config = tmp_path / "night.toml"
    config.write_text(
        f'time_zone = "UTC"\nstate = "{tmp_path}/night"\n[[disks]]\npath = "{image}"\nname = "web1"\n'
        f'[[destinations]]\nname = "vault"\nurl = "{repository}"\nprices = {{ currency = "EUR", put = 5 }}\n'
        f'[[destinations]]\nname = "here"\nurl = "{tmp_path}/here"\n'
    )
    config.chmod(0o600)
    vault, here = run(capsys, "nightly", config, "--json")["destinations"]
    bill = vault["traffic"]
    assert bill["destination"] == "vault"
    assert bill["puts"] > 3
    assert bill["cost"] == pytest.approx(5 * (bill["puts"] + bill["lists"]) / 1000)
    assert here["traffic"] is None
    assert "    requests: " in run(capsys, "nightly", config)


# ---- the table of prices


@given(
    st.builds(Traffic, puts=st.integers(0, 10**6), gets=st.integers(0, 10**6), bytes_down=st.integers(0, 1 << 50)),
    st.builds(Traffic, lists=st.integers(0, 10**6), deletes=st.integers(0, 10**6)),
    st.builds(Prices, currency=st.just("EUR"), put=st.floats(0, 100), delete=st.floats(0, 1), download=st.floats(0, 1)),
)
def test_costs_add_up(one: Traffic, other: Traffic, prices: Prices) -> None:
    both = Traffic(**Counter(one.model_dump()) + Counter(other.model_dump()))
    assert prices.of(both) == pytest.approx(prices.of(one) + prices.of(other))
    assert Bill.of("s3://b", one, None).cost is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("put = 1", "currency: field required"),
        ('currency = "EUR"\nput = -1', "put: input should be greater than or equal to 0"),
        ('currency = "EUR"\nput = inf', "put: input should be a finite number"),
        ('currency = "EUR"\nputs = 1', "puts: is unknown"),
        ("currency = EUR", "not TOML"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=words) as caught:
        prices_of({VARIABLE: str(path)})
    assert caught.value.subject == str(path)
    with pytest.raises(NotFound, match="no such file") as missing:
        prices_of({VARIABLE: str(tmp_path / "none")})
    assert VARIABLE in str(missing.value.hint)
    assert prices_of({VARIABLE: ""}) is None


def test_a_small_cost_of_a_month_is_not_shown_as_nothing() -> None:
    assert [_month(cost, "EUR") for cost in (None, 0.0, 0.003, 1.5)] == ["", "0.00 EUR", "under 0.01 EUR", "1.50 EUR"]
