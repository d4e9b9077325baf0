"""Passphrases: from a file, a pipe or a program, and what is told of a file that others can read or replace."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput
from snapchain.host import passphrases


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("correct horse\nnot this line\n")
    path.chmod(0o600)
    return path


def read(path: Path) -> tuple[str, list[str]]:
    notes: list[str] = []
    return passphrases.from_file(path, on_notice=notes.append), notes


def test_each_mode_has_its_answer(secret: Path) -> None:
    for mode in range(0o1000):
        secret.chmod(mode | 0o400)
        if mode & 0o002:
            with pytest.raises(InvalidInput, match="every user of this host can replace") as caught:
                read(secret)
            assert (caught.value.subject, caught.value.hint) == (str(secret), f"chmod 600 {secret}")
        else:
            note = f"{secret}: every user of this host can read this passphrase (chmod 600 {secret})"
            assert read(secret) == ("correct horse", [note] if mode & 0o004 else [])


@pytest.mark.root
def test_a_file_of_another_user_is_told(secret: Path) -> None:
    os.chown(secret, 65534, 65534)
    words, (note,) = read(secret)
    assert words == "correct horse"
    assert note == f"{secret}: the user nobody can read and replace this passphrase, whose file it is"


def test_a_directory_that_everybody_may_write_to_is_refused(secret: Path) -> None:
    for mode in (0o755, 0o1777, 0o777):
        secret.parent.chmod(mode)
        if mode != 0o777:
            assert read(secret) == ("correct horse", [])
            continue
        with pytest.raises(InvalidInput, match="every user of this host can replace this passphrase") as caught:
            read(secret)
        assert (caught.value.subject, caught.value.hint) == (str(secret), f"chmod o-w {secret.parent}")


@pytest.mark.root
def test_a_directory_of_another_user_is_told(secret: Path) -> None:
    os.chown(secret.parent, 65534, 65534)
    words, (note,) = read(secret)
    assert words == "correct horse"
    assert note == f"{secret}: the user nobody can replace this passphrase, whose directory it is"


def test_the_file_behind_a_link_is_judged_and_a_command_is_quoted(secret: Path, tmp_path: Path) -> None:
    secret.chmod(0o644)
    link = tmp_path / "a'; id #"
    link.symlink_to(secret)
    words, (note,) = read(link)
    assert words == "correct horse"
    assert note.endswith(f"""(chmod 600 '{tmp_path}/a'"'"'; id #')""")


def test_a_file_swapped_after_it_was_opened_is_not_judged_by_its_name(
    secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret.chmod(0o644)
    opened = os.open

    def swapping(path: Path, flags: int) -> int:
        fd = opened(path, flags)
        path.unlink()
        path.write_text("other")
        path.chmod(0o600)
        return fd

    monkeypatch.setattr(os, "open", swapping)
    words, notes = read(secret)
    assert (words, len(notes)) == ("correct horse", 1)


def test_a_pipe_is_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o666)
    writer = threading.Thread(target=lambda: pipe.write_text("correct horse\n"))
    writer.start()
    assert read(pipe) == ("correct horse", [])
    writer.join()


def test_a_pipe_that_nobody_writes_to_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passphrases, "_SECONDS", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="no passphrase has come"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(("text", "why"), [(b"", "empty"), (b"\n", "empty"), (b"\xff\n", "not UTF-8")])
def test_what_is_no_passphrase_is_refused(secret: Path, text: bytes, why: str) -> None:
    secret.write_bytes(text)
    with pytest.raises(InvalidInput, match=why):
        read(secret)


@pytest.mark.parametrize("name", ["gone", "."])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        read(tmp_path / name)
    assert re.search(re.escape(str(tmp_path)), str(caught.value.subject))
