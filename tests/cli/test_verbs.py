"""The main job by its commands: what they print, which fields their JSON has, how they end."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
from contextlib import chdir, redirect_stdout
from pathlib import Path

import pytest

from snapchain.cli import main
from tests.cli.conftest import MiB, Run, made_disk, qemu_img, spawned, write

DISK = "repo::web1/vda"


def test_the_main_job(run: Run, disk: Path, tmp_path: Path) -> None:
    assert run("init", "repo").status == 0
    first = run("ship", str(disk), DISK, "--json").json
    assert first["disk"] == "web1/vda"
    assert first["point"] == 1
    assert first["layers_sent"] == 1
    assert first["bytes_read"] == 3 * MiB
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk, tmp_path / "first.raw")

    assert run("snapshot", str(disk)).status == 0
    write(disk, "write -P 3 1M 1M", "write -z 8M 64k")
    second = run("ship", str(disk), DISK, "--label", "changed", "--json").json
    assert (second["point"], second["layers_sent"]) == (2, 1)
    assert second["bytes_read"] == MiB
    assert second["content_id"] != first["content_id"]

    newest = run("restore", DISK, "newest.qcow2", "--json").json
    assert newest["content_id"] == second["content_id"]
    assert run("restore", f"{DISK}@1", "old.raw").status == 0
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", "newest.qcow2", disk)
    qemu_img("compare", "-f", "raw", "-F", "raw", "old.raw", "first.raw")


def test_shipping_again_sends_nothing(run: Run, disk: Path) -> None:
    run("init", "repo")
    run("ship", str(disk), DISK)
    again = run("ship", str(disk), DISK, "--json").json
    assert (again["layers_sent"], again["bytes_read"], again["bytes_stored"]) == (0, 0, 0)


def test_a_dry_run_shows_the_plan_and_does_nothing(run: Run, disk: Path) -> None:
    assert run("init", "repo", "--dry-run").status == 0
    assert not Path("repo").exists()
    run("init", "repo")
    plan = run("ship", str(disk), DISK, "--dry-run", "--json").json
    assert plan["dry_run"] is True
    assert plan["plan"]["bytes_to_read"] == 3 * MiB
    before = disk.stat().st_ino
    assert run("snapshot", str(disk), "--dry-run").status == 0
    assert disk.stat().st_ino == before
    assert run("restore", DISK, "out.raw").status == 3, "nothing was shipped, so there is no such disk"


@pytest.mark.parametrize(
    ("words", "status", "kind"),
    [
        (["ship"], 2, "invalid-input"),
        (["ship", "web1.qcow2", "repo"], 2, "invalid-input"),
        (["ship", "web1.qcow2", "nowhere::vda"], 3, "not-found"),
        (["ship", "gone.qcow2", "repo::vda"], 3, "not-found"),
        (["ship", "web1.qcow2", "repo::vda", "--format", "vmdk"], 2, "invalid-input"),
        (["ship", "web1.qcow2", "repo::vda", "--label", "7"], 2, "invalid-input"),
        (["ship", "web1.qcow2", "repo::vda", "--limit-rate", "fast"], 2, "invalid-input"),
        (["init", "repo"], 4, "conflict"),
        (["init", "other", "--cipher", "rot13"], 2, "invalid-input"),
        (["restore", "repo::vda", "out.raw"], 3, "not-found"),
        (["restore", "repo", "out.raw"], 2, "invalid-input"),
    ],
)
def test_what_is_wrong_has_a_kind_and_a_code(run: Run, disk: Path, words: list[str], status: int, kind: str) -> None:
    run("init", "repo")
    said = run(*words, "--json")
    assert said.status == status
    error = said.json["error"]
    assert (error["kind"], error["exit_code"]) == (kind, status)
    assert said.err == ""
    plainly = run(*words)
    assert (plainly.status, plainly.out) == (status, "")
    assert plainly.err.startswith("snapchain: error: ")
    assert "Traceback" not in plainly.err


def test_the_passphrase_has_three_sources(
    run: Run, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("init", "repo")
    monkeypatch.delenv("SNAPCHAIN_PASSWORD")
    (tmp_path / "pass").write_text("secret\nnot this line\n")
    assert run("ship", str(disk), DISK).status == 2
    assert run("ship", str(disk), DISK, "--password-file", "pass").status == 0
    assert run("ship", str(disk), DISK, "--password-command", "cat pass").status == 0
    assert run("ship", str(disk), DISK, "--password-command", "echo wrong").status == 2
    assert run("ship", str(disk), DISK, "--password-command", "false").status == 8
    assert run("ship", str(disk), DISK, "--password-file", "gone").status == 2
    (tmp_path / "pass").chmod(0o604)
    assert "every user of this host can read" in run("ship", str(disk), DISK, "--password-file", "pass").err
    (tmp_path / "pass").chmod(0o602)
    assert run("ship", str(disk), DISK, "--password-file", "pass").status == 2
    (tmp_path / "pass").chmod(0o600)
    assert run("ship", str(disk), DISK, "--password-file", "pass", "--password-command", "cat pass").status == 2


def test_an_unencrypted_repository_asks_for_no_passphrase(
    run: Run, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SNAPCHAIN_PASSWORD")
    assert run("init", "repo", "--no-encryption").status == 0
    assert run("ship", str(disk), DISK).status == 0


def test_a_backing_file_elsewhere_must_be_allowed(
    run: Run, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("init", "repo")
    here = tmp_path / "here"
    here.mkdir()
    top = here / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", top)
    refused = run("ship", str(top), DISK)
    assert refused.status == 6
    assert "--image-dir" in refused.err
    assert run("ship", str(top), DISK, "--image-dir", str(tmp_path)).status == 0
    monkeypatch.setenv("SNAPCHAIN_IMAGE_DIRS", f"/nowhere:{tmp_path}")
    assert run("ship", str(top), DISK).status == 0


def test_quiet_says_nothing_and_progress_speaks_json(run: Run, disk: Path) -> None:
    run("init", "repo")
    said = run("ship", str(disk), DISK, "--quiet")
    assert (said.status, said.out, said.err) == (0, "", "")
    write(disk, "write -P 9 4M 1M")
    said = run("ship", str(disk), DISK, "--progress", "json", "--json")
    last = json.loads(said.err.splitlines()[-1])
    assert (last["event"], last["done"]) == ("progress", last["total"])
    assert said.json["point"] == 2


@pytest.mark.costly_slots  # a child opens it
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_all_points_and_says_how_to_go_on(
    run: Run, disk: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run("init", "repo")
    run("ship", str(disk), DISK)
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(4 * MiB))
    write(disk, f"write -s {noise} 4M 4M")
    words = ["ship", str(disk), DISK, "--limit-rate", "100K", "--progress", "json"]
    with spawned(words, tmp_path) as slow:
        assert slow.stderr is not None
        assert any('"progress"' in line for line in iter(slow.stderr.readline, "")), "it ended before it had begun"
        slow.send_signal(number)
        _, err = slow.communicate()
    assert slow.returncode == 130
    assert "snapchain: interrupted" in err
    assert "snapchain: hint: every earlier point is whole; run it again to finish" in err
    assert "Traceback" not in err
    assert run("restore", f"{DISK}@1", "old.raw").status == 0
    assert run("ship", str(disk), DISK, "--json").json["point"] == 2


@pytest.mark.costly_slots  # a child opens it
def test_a_reader_that_goes_away_is_no_error(run: Run, disk: Path, tmp_path: Path) -> None:
    run("init", "repo")
    run("ship", str(disk), DISK)
    reading, writing = os.pipe()
    os.close(reading)
    with spawned(["ship", str(disk), DISK, "--json"], tmp_path, stdout=writing) as child:
        os.close(writing)
        _, err = child.communicate()
    assert (child.returncode, err) == (141, "")


def test_no_words_show_the_help(run: Run) -> None:
    assert run().status == 2
    assert run("--help").status == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell: str, tmp_path: Path) -> None:
    """What `snapchain --install-completion` installs: the shell asks the program itself."""
    words = "snapchain re"
    asking = {"_SNAPCHAIN_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": words}  # zsh and fish
    asking |= {"COMP_WORDS": words, "COMP_CWORD": "1", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}  # bash, fish
    with spawned([], tmp_path, env={**os.environ, **asking}) as child:
        out, _ = child.communicate()
    assert "restore" in out


def test_the_module_runs_as_the_command_does(tmp_path: Path) -> None:
    with spawned(["--version"], tmp_path) as child:
        assert child.communicate()[0].startswith("snapchain ")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A directory with a repository of five points of one disk, each of a changed block; their content ids."""
    place = tmp_path_factory.mktemp("week")
    disk = made_disk(place)

    def run(*words: str) -> str:
        out = io.StringIO()
        with chdir(place), redirect_stdout(out):
            assert main(words) == 0
        return out.getvalue()

    def shipped(*words: str) -> str:
        return str(json.loads(run("ship", str(disk), DISK, "--json", *words))["content_id"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(place.with_name(f"{place.name}-state")))
        patch.setenv("XDG_CACHE_HOME", str(place.with_name(f"{place.name}-cache")))
        run("init", "repo", "--no-encryption")
        ids = [shipped("--label", "first")]
        for day in range(2, 6):
            run("snapshot", str(disk))
            write(disk, f"write -P {day} 0 1M", f"write -P {day} {day}M 64k")
            ids.append(shipped())
    return place, ids


@pytest.fixture
def week(
    prepared: tuple[Path, list[str]], run: Run, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """A copy of that directory in the one where the commands run; no passphrase, as it is not encrypted."""
    monkeypatch.delenv("SNAPCHAIN_PASSWORD")
    shutil.copytree(prepared[0], tmp_path, dirs_exist_ok=True)
    return prepared[1]


def test_log_lists_all_points(run: Run, week: list[str]) -> None:
    log = run("log", "repo", "--json").json
    (disk,) = log["disks"]
    assert disk["name"] == "web1/vda"
    assert [point["content_id"] for point in disk["points"]] == week
    assert [point["point"] for point in disk["points"]] == [1, 2, 3, 4, 5]
    assert [point["layers"] for point in disk["points"]] == [1, 2, 3, 4, 5]
    assert disk["points"][0]["labels"] == ["first"]
    assert {point["virtual_size"] for point in disk["points"]} == {16 * MiB}
    assert all(point["time"].endswith("Z") for point in disk["points"])
    shown = run("log", DISK).out
    assert "first" in shown
    assert run("log", "repo::nobody").status == 3
    assert run("log", f"{DISK}@1").status == 2


def test_a_time_as_log_shows_it_names_no_earlier_point(run: Run, week: list[str]) -> None:
    for line, point in zip(run("log", DISK).out.splitlines()[2:], range(1, 6), strict=True):
        restored = run("restore", f"{DISK}@{line.split()[1]}", f"{point}.raw", "--json").json
        assert restored["point"] >= point


def test_inspect_draws_the_chain(run: Run, disk: Path, week: list[str]) -> None:
    report = run("inspect", str(disk), "--json").json
    assert report["virtual_size"] == 16 * MiB
    assert [layer["data_bytes"] for layer in report["layers"]] == [3 * MiB, *[MiB + 65536] * 4]
    assert [layer["shadowed_bytes"] for layer in report["layers"]] == [MiB, MiB, MiB, MiB, 0]
    assert {layer["format"] for layer in report["layers"]} == {"qcow2"}
    assert {layer["virtual_size"] for layer in report["layers"]} == {16 * MiB}
    assert [layer["zero_bytes"] for layer in report["layers"]] == [0] * 5
    assert report["layers"][-1]["path"] == str(disk)
    shown = run("inspect", str(disk)).out.splitlines()
    assert shown[1].startswith("● web1.qcow2")
    assert shown[9].startswith("◉ web1.1.qcow2")
    assert "1.0 MiB hidden" in shown[9]
    stored = run("inspect", f"{DISK}@3", "--json").json
    assert (len(stored["layers"]), stored["content_id"]) == (3, week[2])


def test_diff_names_the_ranges(run: Run, disk: Path, week: list[str]) -> None:
    found = run("diff", f"{DISK}@2", f"{DISK}@3", "--json").json
    assert found["ranges"] == [{"offset": 0, "length": MiB}, {"offset": 3 * MiB, "length": 65536}]
    assert found["changed_bytes"] == MiB + 65536
    assert run("diff", DISK, str(disk)).out == "no difference\n"
    assert "differ in 2 ranges" in run("diff", f"{DISK}@4", DISK).out


def test_verify_says_what_is_damaged_and_ends_with_5(run: Run, week: list[str], tmp_path: Path) -> None:
    whole = run("verify", "repo", "--read-data", "--json")
    assert (whole.status, whole.json["ok"], whole.json["findings"]) == (0, True, [])
    assert whole.json["checked_bytes"] > MiB
    assert run("verify", DISK, "--sample", "50%").status == 0
    pack = max((tmp_path / "repo" / "packs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    pack.chmod(0o600)
    with pack.open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    found = run("verify", "repo", "--read-data", "--json")
    assert (found.status, found.json["ok"]) == (5, False)
    assert found.json["findings"]
    assert run("verify", "repo", "--read-data").out.startswith("damaged: ")
    assert run("verify", "repo", "--read-data", "--sample", "5%").status == 2


def test_merge_makes_one_overlay_under_the_same_path(run: Run, disk: Path, week: list[str], tmp_path: Path) -> None:
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk, tmp_path / "truth.raw")
    plan = run("merge", str(disk), "--dry-run", "--json").json["plan"]
    assert (plan["layers_before"], plan["layers_after"]) == (5, 2)
    done = run("merge", str(disk), "--json").json
    assert (done["layers_before"], done["layers_after"]) == (5, 2)
    assert done["strategy"] == plan["strategy"] in ("new-file", "absorb", "commit")
    assert done["bytes_moved"] == plan["bytes_to_move"] <= MiB + 4 * 65536
    assert [(each["first"], each["last"]) for each in plan["merges"]] == [(1, 4)]
    assert [layer["data_bytes"] for layer in plan["layers"]]
    assert done["bytes_freed"] > 0
    qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "truth.raw", disk)
    assert run("ship", str(disk), DISK, "--json").json["content_id"] == week[-1]
    assert "there was nothing to merge" in run("merge", str(disk)).out
    assert run("merge", str(disk), "--flatten", "--json").json["layers_after"] == 1
    qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "truth.raw", disk)


def test_merge_of_a_range_keeps_the_rest(run: Run, disk: Path, week: list[str], tmp_path: Path) -> None:
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk, tmp_path / "truth.raw")
    done = run("merge", str(disk), "--from", "web1.2.qcow2", "--to", "web1.3.qcow2", "--json").json
    assert done["layers_after"] == 4
    qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "truth.raw", disk)


def test_merge_in_the_repository_keeps_what_the_rules_name(run: Run, week: list[str]) -> None:
    rules = ["--keep-last", "2", "--keep-label", "first"]
    plan = run("merge", DISK, *rules, "--dry-run", "--json").json["plan"]
    assert [point["point"] for point in plan["points"] if point["kept"]] == [1, 4, 5]
    assert len(run("log", "repo", "--json").json["disks"][0]["points"]) == 5
    assert "keep" in run("merge", DISK, *rules, "--dry-run").out
    done = run("merge", DISK, *rules, "--json").json
    assert (done["layers_before"], done["layers_after"], done["bytes_moved"]) == (5, 3, 0)
    for point in (1, 4, 5):
        assert run("restore", f"{DISK}@{point}", f"{point}.raw", "--json").json["content_id"] == week[point - 1]
    assert run("restore", f"{DISK}@3", "3.raw").status == 3
    assert run("verify", "repo", "--read-data").status == 0


@pytest.mark.parametrize(
    "words",
    [
        [DISK],
        [DISK, "--flatten", "--keep-last", "2"],
        [DISK, "--keep-last", "-2"],
        [DISK, "--keep-within", "soon"],
        [f"{DISK}@2", "--keep-last", "2"],
        ["web1.qcow2", "--keep-last", "2", "--from", "web1.1.qcow2"],
        ["web1.qcow2", "--strategy", "magic"],
        ["web1.qcow2", "--budget-bytes", "much"],
        ["web1.qcow2", "--at", "repo"],
        ["web1.qcow2", "--max-layers", "0"],
        [DISK, "--keep-last", "2", "--max-layers", "3"],
        [DISK, "--keep-last", "2", "--budget-seconds", "3"],
        ["web1.qcow2", "--flatten", "--from", "web1.1.qcow2"],
    ],
)
def test_a_merge_that_makes_no_sense_is_refused(run: Run, week: list[str], words: list[str]) -> None:
    assert run("merge", *words).status == 2


def test_a_chain_is_restored_as_its_layers(run: Run, disk: Path, week: list[str], tmp_path: Path) -> None:
    back = tmp_path / "back"
    back.mkdir()
    report = run("restore", DISK, str(back / "web1.qcow2"), "--chain", "--json").json
    assert len(report["files"]) == 5
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", disk, back / "web1.qcow2")
    assert run("restore", DISK, str(back / "web1.qcow2")).status == 4, "an existing file is not overwritten"
    assert run("restore", DISK, str(back / "web1.qcow2"), "--force").status == 0


def test_a_name_that_is_no_text_is_refused(run: Run) -> None:
    said = run("ship", os.fsdecode(b"web\xff.qcow2"), DISK)
    assert said.status == 6
    assert r"web\xff.qcow2: not UTF-8 text" in said.err


def test_a_terminal_without_utf8_still_gets_its_picture(disk: Path, tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    with spawned(["inspect", str(disk)], tmp_path, env={**os.environ, **plain}) as child:
        out, err = child.communicate()
    assert (child.returncode, err) == (0, "")
    assert "web1.qcow2" in out


def test_the_compression_is_chosen_for_a_run_or_for_all(
    run: Run, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"".join(b"%d %d\n" % (n, n * n) for n in range(60000))[:MiB].ljust(MiB, b"x"))
    write(disk, f"write -s {text} 0 1M")
    weights = {}
    for mode in ("fast", "max", "max by variable"):
        run("init", f"store {mode}", "--no-encryption")
        if "variable" in mode:
            monkeypatch.setenv("SNAPCHAIN_COMPRESSION", "max")
        words = [] if "variable" in mode else ["--compression", mode]
        weights[mode] = run("ship", str(disk), f"store {mode}::vda", *words, "--json").json["bytes_stored"]
    assert abs(weights["max"] - weights["max by variable"]) < 1000 < weights["fast"] - weights["max"]
    monkeypatch.delenv("SNAPCHAIN_COMPRESSION")
    for words, match in [
        (["ship", str(disk), "store max::vda", "--compression", "best"], "unknown compression 'best'"),
        (["ship", str(disk), "store max::vda", "--compression", "best", "-n"], "unknown compression 'best'"),
        (["ship", str(disk), f"dir:{tmp_path}/r::vda", "--compression", "max"], "a replica keeps plain files"),
    ]:
        said = run(*words)
        assert said.status == 2
        assert match in said.err


def test_the_pack_size_is_set_at_init_or_for_a_run(
    run: Run, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def largest() -> int:
        return max(path.stat().st_size for path in (tmp_path / "store" / "packs").rglob("*") if path.is_file())

    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(4).randbytes(3 * MiB))
    write(disk, f"write -s {noise} 0 3M")
    assert run("init", "store", "--pack-size", "1M", "--json").json["pack_size"] == MiB
    assert run("ship", str(disk), "store::vda").status == 0
    assert MiB // 2 < largest() <= MiB
    write(disk, f"write -s {noise} 1k 2M")
    monkeypatch.setenv("SNAPCHAIN_PACK_SIZE", "512K")
    before = {path.name for path in (tmp_path / "store" / "packs").rglob("*")}
    assert run("ship", str(disk), "store::vda").status == 0
    added = [path for path in (tmp_path / "store" / "packs").rglob("*") if path.name not in before and path.is_file()]
    assert added
    assert max(path.stat().st_size for path in added) <= MiB // 2
    assert run("gc", "store", "--pack-size", "2M").status == 0
    for words, match in [
        (["ship", str(disk), "store::vda", "--pack-size", "1K"], "the pack size is out of range: 1024 bytes"),
        (["init", "other", "--pack-size", "1M", "--block-size", "1M"], "no room for a block"),
        (["ship", str(disk), f"dir:{tmp_path}/r::vda", "--pack-size", "1M"], "a replica has no packs"),
    ]:
        said = run(*words)
        assert said.status == 2
        assert match in said.err


@pytest.mark.parametrize(
    "words",
    [
        "snapshot web1.qcow2",
        "snapshot web1.qcow2 --overlay web1.qcow2",
        "ship web1.qcow2 repo::web1",
        "send web1.qcow2 dir:{here}/replica::web1",
        "restore repo::web1 web1.qcow2",
        "merge web1.qcow2 --remove web1.qcow2",
        "inspect web1.qcow2 --image-dir web1.qcow2",
        "doctor web1.qcow2",
        "nightly web1.qcow2",
        "receive web1.qcow2",
        "log repo --password-file web1.qcow2",
        "serve-replica --stdio --root web1.qcow2",
    ],
)
def test_no_path_is_judged_by_the_parser_of_the_command_line(
    run: Run, disk: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """It would say "not readable" of a file that this user may not read, and hint at --help."""
    monkeypatch.setattr("os.access", lambda *_arguments, **_named: False)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert "is not readable" not in run(*words.format(here=disk.parent).split()).err
