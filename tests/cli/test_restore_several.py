"""snapchain restore --match, as a user says it."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run, qemu_img


def test_all_of_a_repository(run: Run, disk: Path) -> None:
    run("init", "repo")
    for name in ("db", "web1/vda"):
        assert run("ship", str(disk), f"repo::{name}").status == 0
    plan = run("restore", "repo", "out", "--match", "*", "--dry-run", "--json").json["plan"]
    assert plan.keys() == {
        "source", "directory", "items", "restored_before", "failed", "bytes_to_write", "bytes_free", "requests",
        "bytes_to_fetch", "seconds", "ok",
    }  # fmt: skip
    shown = run("restore", "repo", "out", "--match", "*", "--dry-run")
    assert ("would restore 2 disks of repo to out" in shown.out, Path("out").exists()) == (True, False)
    Path("out").mkdir()
    Path("out/db.qcow2").write_text("mine")
    some = run("restore", "repo", "out", "--match", "*")
    assert (some.status, "db cannot be restored" in some.err) == (10, True)
    Path("out/db.qcow2").unlink()
    report = run("restore", "repo", "out", "--match", "*", "--json").json
    assert (report["ok"], report["restored_before"], len(report["disks"])) == (True, ["web1/vda"], 1)
    for path in ("out/db.qcow2", "out/web1/vda.qcow2"):
        qemu_img("compare", disk, path)


def test_what_cannot_be_meant(run: Run, disk: Path) -> None:
    run("init", "repo")
    run("ship", str(disk), "repo::db")
    for words, text in (
        (("repo", "out"), "--match '*' for all"),
        (("repo::db", "out", "--match", "*"), "--match chooses among all disks"),
        (("repo", "out", "--match", "*", "--force"), "--match does not work together with --force\n"),
        (("repo", "-", "--match", "*"), "standard output takes one disk"),
        (("repo::db", "out.raw", "--point", "1"), "write DEST::DISK@1"),
    ):
        ended = run("restore", *words)
        assert (ended.status, text in ended.err) == (2, True), ended.err
    nothing = run("restore", "repo", "out", "--match", "d")
    assert (nothing.status, "a pattern fits the whole name" in nothing.err) == (3, True), nothing.err
    assert not Path("out").exists()


def test_a_hint_of_several_failures_is_shown_once(run: Run, disk: Path) -> None:
    run("init", "repo")
    for name in ("a", "b"):
        run("ship", str(disk), f"repo::{name}")
    Path("out").mkdir()
    for name in ("a", "b"):
        Path(f"out/{name}.qcow2").touch()
    ended = run("restore", "repo", "out", "--match", "*")
    assert (ended.status, ended.out.count("replaces no file"), ended.out.count("hint:")) == (10, 2, 1), ended.out
