"""send and receive, as a user meets them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import MiB, Run
from tests.ops.stacks import Layer, build, flat, same
from tests.replica.conftest import Place


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", [Layer(4 * MiB, ["write -P 1 0 2M"]), Layer(4 * MiB, ["write -P 2 1M 64k"])])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "replica")


def test_a_plan_changes_nothing(run: Run, chain: list[Path], place: Place) -> None:
    said = run("send", str(chain[-1]), f"dir:{place.root}::web1/vda", "--dry-run", "--json")
    plan = said.json["plan"]
    assert (plan["layers_present"], plan["data_bytes"]) == (0, 2 * MiB + 65536)
    assert [layer["files"] for layer in plan["layers"]] == [[str(path)] for path in chain]
    assert not place.root.exists()


def test_send_reports_what_it_did(run: Run, chain: list[Path], place: Place, tmp_path: Path) -> None:
    said = run("send", str(chain[-1]), f"dir:{place.root}::web1/vda", "--label", "first", "--json")
    assert said.status == 0
    assert (said.json["disk"], said.json["point"], said.json["layers_sent"]) == ("web1/vda", 1, 2)
    place.check(flat(chain[-1], tmp_path / "flat"))
    plainly = run("send", str(chain[-1]), f"dir:{place.root}::web1/vda")
    assert "sent web1/vda" in plainly.out
    assert "0 sent, 2 there already" in plainly.out


def test_progress_ends_with_the_whole(run: Run, chain: list[Path], place: Place) -> None:
    said = run("send", str(chain[-1]), f"dir:{place.root}::web1/vda", "--progress", "json", "--json")
    last = json.loads(said.err.splitlines()[-1])
    assert (last["event"], last["done"], last["total"]) == ("progress", 2 * MiB + 65536, 2 * MiB + 65536)


def test_a_stream_goes_through_a_pipe_and_a_file(chain: list[Path], place: Place, tmp_path: Path) -> None:
    snapchain = [sys.executable, "-m", "snapchain"]
    saved = tmp_path / "saved"
    with saved.open("wb") as stream:
        said = subprocess.run(
            [*snapchain, "send", chain[-1], "--disk", "web1/vda", "--json"],
            stdout=stream,
            stderr=subprocess.PIPE,
            check=True,
        )
    assert json.loads(said.stderr)["layers_sent"] == 2
    for new, present in ((2, 0), (0, 2)):
        with saved.open("rb") as stream:
            done = subprocess.run(
                [*snapchain, "receive", place.root, "--json"], stdin=stream, capture_output=True, check=True
            )
        report = json.loads(done.stdout)
        assert (len(report["layers"]), report["layers_present"]) == (new, present)
    place.check(flat(chain[-1], tmp_path / "flat"))


@pytest.mark.parametrize(
    ("words", "status", "kind"),
    [
        ([], 2, "invalid-input"),
        (["dir:/r"], 2, "invalid-input"),
        (["dir:relative::vda"], 2, "invalid-input"),
        (["/repository::vda"], 2, "invalid-input"),
        (["ssh://h::vda"], 2, "invalid-input"),
        (["ssh://-oProxyCommand=x/p::vda"], 2, "invalid-input"),
        (["dir:/r::vda", "--disk", "vda"], 2, "invalid-input"),
        (["dir:/r::vda", "--label", "7"], 2, "invalid-input"),
        (["--disk", "vda", "--dry-run"], 2, "invalid-input"),
        (["dir:/no/such/place::vda"], 3, "not-found"),
    ],
)
def test_what_is_wrong_is_said(run: Run, chain: list[Path], words: list[str], status: int, kind: str) -> None:
    said = run("send", str(chain[-1]), *words, "--json")
    assert (said.status, said.json["error"]["kind"]) == (status, kind)


def test_diverged_has_its_own_kind(run: Run, chain: list[Path], place: Place, tmp_path: Path) -> None:
    run("send", str(chain[-1]), f"dir:{place.root}::web1/vda")
    other = build(tmp_path / "other", [Layer(MiB)])[0]
    said = run("send", str(other), f"dir:{place.root}::web1/vda", "--json")
    assert (said.status, said.json["error"]["kind"]) == (4, "diverged")
    assert "--cut-replica" in said.json["error"]["hint"]
    assert run("send", str(other), f"dir:{place.root}::web1/vda", "--cut-replica").status == 0


def test_log_and_verify_of_a_replica(run: Run, chain: list[Path], place: Place) -> None:
    run("send", str(chain[-1]), f"dir:{place.root}::web1/vda", "--label", "first")
    for address in (f"dir:{place.root}", f"dir:{place.root}::web1/vda"):
        (disk,) = run("log", address, "--json").json["disks"]
        (point,) = disk["points"]
        assert (disk["name"], point["point"], point["labels"], point["layers"]) == ("web1/vda", 1, ["first"], 2)
        assert point["virtual_size"] == 4 * MiB
        assert "first" in run("log", address).out
        said = run("verify", address, "--read-data", "--json")
        assert (said.status, said.json["ok"], said.json["findings"]) == (0, True, [])
        assert said.json["checked_bytes"] >= 2 * MiB + 65536
        assert "all is well" in run("verify", address).out
    victim = place.files()[0]
    victim.unlink()
    said = run("verify", f"dir:{place.root}", "--json")
    assert (said.status, said.json["ok"]) == (5, False)
    assert (said.json["findings"][0]["disk"], said.json["findings"][0]["points"]) == ("web1/vda", [1])


@pytest.mark.parametrize(
    ("words", "status", "kind"),
    [
        (["log", "dir:/no/such/place"], 3, "not-found"),
        (["log", "dir:relative"], 2, "invalid-input"),
        (["log", "ssh://h"], 2, "invalid-input"),
        (["log", "dir:/r::vda@1"], 2, "invalid-input"),
        (["log", "dir:/r", "--password-file", "x"], 2, "invalid-input"),
        (["verify", "dir:/no/such/place"], 3, "not-found"),
        (["verify", "dir:/no/such/place", "--sample", "5%"], 3, "not-found"),
        (["verify", "dir:/r", "--limit-rate", "5M"], 2, "invalid-input"),
        (["gc", "dir:/r"], 2, "invalid-input"),
        (["serve-replica", "--stdio", "--root", "/no/such/place"], 3, "not-found"),
    ],
)
def test_what_is_wrong_with_a_replica_is_said(run: Run, words: list[str], status: int, kind: str) -> None:
    said = run(*words, *([] if words[0] == "serve-replica" else ["--json"]))
    assert said.status == status
    assert words[0] == "serve-replica" or said.json["error"]["kind"] == kind


def test_an_epoch_shuts_the_old_writer_out(run: Run, chain: list[Path], place: Place, tmp_path: Path) -> None:
    address = f"dir:{place.root}::web1/vda"
    theirs = Path(shutil.copytree(chain[0].parent, tmp_path / "another host")) / chain[1].name
    assert run("send", str(chain[0]), address, "--epoch", "2").status == 0
    assert run("log", address, "--json").json["disks"][0]["epoch"] == 2
    said = run("send", str(theirs), address, "--json")
    assert (said.status, said.json["error"]["kind"]) == (4, "conflict")
    assert "epoch 1, and here it is in epoch 2" in said.json["error"]["message"]
    assert run("send", str(chain[1]), address).status == 0, "it is noted beside the image"
    assert run("send", str(theirs), address, "--epoch", "2").status == 0


def test_ship_restore_and_inspect(run: Run, chain: list[Path], place: Place, tmp_path: Path) -> None:
    address = f"dir:{place.root}::web1/vda"
    plan = run("ship", str(chain[-1]), address, "--dry-run", "--json").json["plan"]
    assert (plan["layers_present"], plan["bytes_to_read"], len(plan["layers"])) == (0, 2 * MiB + 65536, 2)
    assert not place.root.exists()
    said = run("ship", str(chain[-1]), address, "--label", "first", "--json")
    assert (said.status, said.json["point"], said.json["layers_sent"], said.json["layers_present"]) == (0, 1, 2, 0)
    assert {"disk", "bytes_read", "bytes_stored", "content_id"} <= said.json.keys()
    assert "shipped web1/vda as point 2" in run("ship", str(chain[-1]), address).out
    shown = flat(chain[-1], tmp_path / "flat")
    for options, name in (([], "a.raw"), ([], "a.qcow2"), (["--chain"], "b.qcow2")):
        plan = run("restore", f"{address}@first", name, *options, "--dry-run", "--json").json["plan"]
        assert not (tmp_path / name).exists()
        said = run("restore", f"{address}@first", name, *options, "--json", "--progress", "json")
        assert (said.status, said.json["point"], said.json["bytes_written"]) == (0, 1, plan["bytes_to_write"])
        assert said.json["files"] == [file["path"] for file in plan["files"]]
        assert same(tmp_path / name, shown, image_format=name.partition(".")[2])
        last = json.loads(said.err.splitlines()[-1])
        assert (last["event"], last["done"]) == ("progress", plan["bytes_to_write"])
    assert run("restore", address, "a.raw", "--json").json["error"]["kind"] == "conflict"
    assert "restored web1/vda, point 2, to a.raw" in run("restore", address, "a.raw", "--force").out
    said = run("inspect", f"{address}@1", "--json")
    assert [layer["data_bytes"] for layer in said.json["layers"]] == [2 * MiB, 65536]
    assert said.json["layers"][0]["shadowed_bytes"] == 65536
    assert "hidden" in run("inspect", address).out


@pytest.mark.parametrize(
    ("words", "status", "kind", "hint"),
    [
        (["restore", "dir:/no/such/place::vda", "a.raw"], 3, "not-found", None),
        (["restore", "dir:relative::vda", "a.raw"], 2, "invalid-input", "write dir:/"),
        (["restore", "dir:/r::vda", "a.raw", "--password-file", "x"], 2, "invalid-input", None),
        (["restore", "dir:/r", "a.raw"], 2, "invalid-input", "DEST::DISK"),
        (["restore", "dir:/r::vda", "a.unknown"], 2, "invalid-input", "--format"),
        (["inspect", "dir:/no/such/place::vda"], 3, "not-found", None),
        (["gc", "dir:/r"], 2, "invalid-input", "merge"),
        (["init", "dir:/r"], 2, "invalid-input", "needs no init"),
        (["ship", "IMAGE", "dir:/r::vda", "--password-command", "x"], 2, "invalid-input", None),
    ],
)
def test_what_a_replica_cannot_do_is_said(
    run: Run, chain: list[Path], words: list[str], status: int, kind: str, hint: str | None
) -> None:
    said = run(*(str(chain[-1]) if word == "IMAGE" else word for word in words), "--json")
    assert (said.status, said.json["error"]["kind"]) == (status, kind)
    assert hint is None or hint in said.json["error"]["hint"]


def test_merge_at_a_replica(run: Run, chain: list[Path], place: Place) -> None:
    at = f"dir:{place.root}::web1/vda"
    for path in chain:
        assert run("send", str(path), at).status == 0
    plan = run("merge", at, "--keep-last", "1", "--dry-run")
    assert "would make 1 layer of 2 of web1/vda" in plan.out
    assert len(place.files()) == 2
    said = run("merge", at, "--keep-last", "1", "--progress", "json")
    assert "merged web1/vda: 2 layers became 1" in said.out
    assert json.loads(said.err.splitlines()[-1])["event"] == "progress"
    again = run("merge", at, "--keep-last", "1")
    assert "web1/vda: no layers to merge" in again.out
    report = run("merge", at, "--keep-last", "1", "--json").json
    assert (report["layers_before"], report["layers_after"], report["points_kept"]) == (1, 1, [2])
    assert (report["bytes_moved"], report["bytes_freed"], report["strategy"]) == (0, 0, "nothing")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--keep-last", "1", "--flatten"],
        ["--keep-last", "1", "--strategy", "absorb"],
        ["--keep-last", "1", "--password-file", "/dev/null"],
        ["--keep-last", "1", "--time-zone", "Nowhere/Land"],
    ],
)
def test_a_merge_at_a_replica_that_is_refused(run: Run, chain: list[Path], place: Place, words: list[str]) -> None:
    at = f"dir:{place.root}::web1/vda"
    run("send", str(chain[-1]), at)
    said = run("merge", at, *words, "--json")
    assert (said.status, said.json["error"]["kind"]) == (2, "invalid-input")
