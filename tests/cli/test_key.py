"""snapchain key, and every question about a passphrase, as a user meets them."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import stat
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput
from snapchain.host import passphrases
from tests.cli.conftest import Run

_PATIENCE = 500
"""Fiftieths of a second without a question that is expected."""
GOOD, BETTER = "tuba glacier ninety", "otter ninety glacier"


class Person:
    """Sits at a terminal that is this process's standard input, and answers what it asks.

    answers: (part of a question, what is typed), each once and in order; shown: all that the terminal showed
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[tuple[str, str]] = []
        self._master, self._terminal = os.openpty()
        self._seen = io.StringIO()
        self._since = ""
        self._over = threading.Event()
        monkeypatch.setattr(passphrases, "_STDIN", self._terminal)
        monkeypatch.delenv("SNAPCHAIN_PASSWORD", raising=False)
        self._thread = threading.Thread(target=self._sit)
        self._thread.start()

    def _sit(self) -> None:
        idle = 0
        while not self._over.is_set() or select.select([self._master], [], [], 0)[0]:
            if not select.select([self._master], [], [], 0.02)[0]:
                idle += 1
                if idle == _PATIENCE:
                    os.write(self._master, b"\x04")  # an unexpected question: the end of the input
                continue
            idle = 0
            text = os.read(self._master, 4096).decode()
            self._seen.write(text)
            self._since += text
            while self.answers and self.answers[0][0] in self._since:
                question, typed = self.answers.pop(0)
                self._since = self._since.partition(question)[2]
                os.write(self._master, typed.encode())

    @property
    def shown(self) -> str:
        """Ends the sitting."""
        self._over.set()
        self._thread.join()
        return self._seen.getvalue()

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._terminal)[3] & termios.ECHO)

    def leave(self) -> None:
        self._over.set()
        self._thread.join()
        os.close(self._terminal)
        os.close(self._master)


@pytest.fixture
def person(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Person]:
    """After `run`, which sets a passphrase in the environment."""
    _ = run
    found = Person(monkeypatch)
    yield found
    found.leave()


def slots(run: Run) -> list[dict[str, object]]:
    found: list[dict[str, object]] = run("key", "list", "repo", "--json").json["slots"]
    return found


def test_from_init_to_a_new_passphrase(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "weak: it has fewer than 8 characters" in run("init", "repo").err
    monkeypatch.setenv("SNAPCHAIN_NEW_PASSWORD", GOOD)
    added = run("key", "add", "repo", "--label", "night shift", "--json").json
    assert (added["action"], added["left"], added["added"]["label"]) == ("add", 2, "night shift")
    shown = run("key", "list", "repo")
    assert "2 key slots of repo" in shown.out
    assert re.search(rf"{added['added']['slot'][:8]} +night shift", shown.out)
    old = next(each["slot"] for each in slots(run) if each["opened"])
    assert run("key", "remove", "repo", str(old)).status == 4
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", GOOD)
    removed = run("key", "remove", "repo", str(old)[:8])
    assert (removed.status, "removed a key slot of repo" in removed.out) == (0, True)
    assert [each["label"] for each in slots(run)] == ["night shift"]
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "secret")
    gone = run("log", "repo")
    assert (gone.status, "wrong passphrase" in gone.err) == (2, True)


def test_the_fields_of_the_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("init", "repo")
    listed = run("key", "list", "repo", "--json").json
    assert listed.keys() == {"destination", "repository", "slots"}
    (slot,) = listed["slots"]
    assert slot.keys() == {"slot", "label", "created", "host", "recovery", "opened", "cost", "warning"}
    assert slot["cost"].keys() == {"memory_kib", "iterations", "lanes", "factor"}
    monkeypatch.setenv("SNAPCHAIN_NEW_PASSWORD", GOOD)
    report = run("key", "change", "repo", "--json").json
    assert report.keys() == {"destination", "action", "added", "removed", "left", "not_deleted"}
    assert (report["action"], report["removed"], report["left"]) == ("change", slot["slot"], 1)
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", GOOD)
    plan = run("key", "add", "repo", "--dry-run", "--json").json
    assert (plan["dry_run"], plan["plan"]["added"], plan["plan"]["left"]) == (True, None, 2)
    assert "would add a key slot" in run("key", "add", "repo", "--dry-run").out


def test_warnings_are_shown_and_survive_quiet(run: Run) -> None:
    run("init", "repo")
    Path("repo/keys", "0" * 32).write_bytes(b"{}")
    shown = run("key", "list", "repo")
    assert f"warning: {'0' * 32}: the key slot is damaged" in shown.out
    quiet = run("key", "list", "repo", "--quiet")
    assert (quiet.out, f"warning: {'0' * 32}" in quiet.err) == ("", True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lst", "repo"], "unknown action 'lst'"),
        (["remove", "repo"], "no key slot is named"),
        (["list", "repo", "abcd"], "SLOT is not for `key list`"),
        (["list", "repo", "--cost", "2"], "--cost is not for `key list`"),
        (["change", "repo", "--recovery"], "--recovery is not for `key change`"),
        (["add", "repo", "--keep-passphrase"], "--keep-passphrase is not for `key add`"),
        (["add", "repo", "--even-own"], "--even-own is not for `key add`"),
        (["add", "repo", "--cost", "3"], "unknown cost 3"),
        (["add", "repo", "--recovery", "--new-password-file", "x"], "are both given"),
        (["add", "repo", "--new-password-file", "x", "--new-password-command", "y"], "are both given"),
        (["add", "repo", "--recovery"], "does not run on one"),
        (["add", "repo"], "no new passphrase was given"),
        (["remove", "repo", "zzzz"], "no such key slot"),
        (["list", "dir:/r"], "a replica is not encrypted, so it has no keys"),
    ],
)
def test_what_does_not_belong_together(words: list[str], said: str, run: Run) -> None:
    run("init", "repo")
    ended = run("key", *words)
    assert (ended.status, said in ended.err) == (3 if "zzzz" in words else 2, True), ended.err
    assert len(list(Path("repo/keys").iterdir())) == 1


def test_a_recovery_key_in_a_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("init", "repo")
    said = run("key", "add", "repo", "--recovery-file", "paper")
    assert said.status == 0
    paper = Path("paper")
    assert stat.S_IMODE(paper.stat().st_mode) == 0o600
    text = paper.read_text().strip()
    assert text not in said.out + said.err
    assert [each["recovery"] for each in slots(run)] == [False, True]
    again = run("key", "add", "repo", "--recovery-file", "paper")
    assert (again.status, "exists" in again.err, paper.read_text().strip()) == (4, True, text), again.err
    for typed in (text, text.lower().replace("-", "")):
        monkeypatch.setenv("SNAPCHAIN_PASSWORD", typed)
        assert run("log", "repo").status == 0
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", ("X" if text[0] != "X" else "Y") + text[1:])
    assert "as a recovery key, its group 1 has a mistake" in run("log", "repo").err
    monkeypatch.delenv("SNAPCHAIN_PASSWORD")
    assert run("log", "repo", "--password-file", "paper").status == 0


def test_a_recovery_key_that_got_no_slot_leaves_no_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.errors import Conflict
    from snapchain.repository import slot_list

    def lost(*_: object, **__: object) -> None:
        raise Conflict("others are faster")

    run("init", "repo")
    monkeypatch.setattr(slot_list, "change", lost)
    assert run("key", "add", "repo", "--recovery-file", "paper").status == 4
    assert not Path("paper").exists()
    assert len(list(Path("repo/keys").iterdir())) == 1


# --- at a terminal


def test_init_asks_twice_and_refuses_what_is_guessed_first(run: Run, person: Person) -> None:
    person.answers = [
        ("New passphrase of repo: ", "password1\n"),
        ("it is made of common passwords", ""),
        ("New passphrase of repo: ", f"{GOOD}\n"),
        ("The same again: ", f"{GOOD}x\n"),
        ("The two are not the same.", ""),
        ("New passphrase of repo: ", f"{GOOD}\n"),
        ("The same again: ", f"{GOOD}\n"),
        ("Passphrase of repo: ", f"{GOOD}\n"),
    ]
    assert run("init", "repo").status == 0
    assert run("log", "repo").status == 0
    assert person.answers == []
    assert person.echoes
    shown = person.shown
    assert "snapchain key add DEST --recovery" in shown
    assert "loses everything" in shown
    assert GOOD not in shown, "it is not echoed"


def test_a_passphrase_that_was_mistyped_twice_is_asked_for_again(run: Run, person: Person) -> None:
    refused = "Wrong passphrase, or the repository's configuration was altered. Try again."
    person.answers = [
        ("New passphrase", f"{GOOD}\n"),
        ("again", f"{GOOD}\n"),
        ("Passphrase of repo: ", f"{BETTER}\n"),
        (refused, ""),
        ("Passphrase of repo: ", f"{BETTER}\n"),
        (refused, ""),
        ("Passphrase of repo: ", f"{GOOD}\n"),
    ]
    run("init", "repo")
    assert run("log", "repo").status == 0
    assert person.answers == []


def test_after_three_wrong_passphrases_the_command_ends_with_a_code_of_its_own(run: Run, person: Person) -> None:
    person.answers = [("New passphrase", f"{GOOD}\n"), ("again", f"{GOOD}\n")]
    person.answers += [("Passphrase of repo: ", f"{BETTER}\n")] * 3
    run("init", "repo")
    ended = run("log", "repo", "--json")
    assert (ended.status, ended.json["error"]["kind"]) == (2, "invalid-input")
    shown = person.shown
    assert (shown.count("Passphrase of repo"), shown.count("Try again")) == (3, 2)


def test_a_wrong_passphrase_of_a_script_is_final_also_at_a_terminal(
    run: Run, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", GOOD)
    run("init", "repo")
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", BETTER)
    assert run("log", "repo").status == 2
    assert person.shown == ""


def test_a_change_asks_for_the_old_and_the_new_one(run: Run, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", GOOD)
    run("init", "repo")
    monkeypatch.delenv("SNAPCHAIN_PASSWORD")
    person.answers = [
        ("Passphrase of repo: ", f"{GOOD}\n"),
        ("New passphrase of repo: ", f"{BETTER}\n"),
        ("The same again: ", f"{BETTER}\n"),
        ("Passphrase of repo: ", f"{BETTER}\n"),
    ]
    assert run("key", "change", "repo").status == 0
    assert run("key", "change", "repo", "--keep-passphrase").status == 0
    assert person.answers == []


def test_a_recovery_key_is_shown_on_the_terminal_alone(
    run: Run, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", GOOD)
    run("init", "repo")
    said = run("key", "add", "repo", "--recovery", "--json")
    found = re.search(r"^ +((?:[0-9A-Z]{5}-){6}[0-9A-Z]{5})\r?$", person.shown, re.MULTILINE)
    assert found is not None
    assert found[1] not in said.out + said.err
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", found[1])
    assert [each["opened"] for each in slots(run)] == [False, True]


def test_a_passphrase_that_was_given_is_not_asked_for(
    run: Run, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "secret")
    assert run("init", "repo").status == 0
    assert run("log", "repo").status == 0
    assert person.shown == ""


def test_a_repository_without_encryption_asks_for_nothing(run: Run, person: Person) -> None:
    assert run("init", "repo", "--no-encryption").status == 0
    for path in Path(os.environ["XDG_STATE_HOME"]).rglob("*.json"):
        path.unlink()  # this machine does not know it
    assert run("log", "repo").status == 0
    assert person.shown == ""


@pytest.mark.parametrize(("typed", "words"), [("\x04", "is empty"), ("\n", "is empty")])
def test_an_end_of_the_input_is_no_passphrase(typed: str, words: str, run: Run, person: Person) -> None:
    person.answers = [("New passphrase", typed)]
    ended = run("init", "repo")
    assert (ended.status, words in ended.err) == (2, True)
    assert person.echoes
    assert not Path("repo/config").exists()


def test_other_threads_are_not_asked(person: Person) -> None:
    _ = person
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(passphrases.is_at_terminal()))
    thread.start()
    thread.join()
    assert (passphrases.is_at_terminal(), found) == (True, [False])


def test_what_is_no_utf_8_is_refused(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    person.answers = [("?", "x")]
    monkeypatch.setattr(passphrases, "_typed_line", lambda _fd: b"\xff\xfe\n")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        passphrases.ask("? ")
    assert person.echoes


# --- processes of their own, with a terminal that controls them


def at_terminal(words: Sequence[str], answer: str, typed: bytes, folder: Path) -> tuple[int, str, bool]:
    """Run a command at a terminal. What it ended with, what was shown, and whether the terminal echoes at the end."""
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.pop("SNAPCHAIN_PASSWORD", None)
        os.execv(sys.executable, [sys.executable, "-m", "snapchain", *words])
    shown, answered = "", False
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece.decode("utf-8", "replace")
        if not answered and answer in shown:
            answered = True
            assert not termios.tcgetattr(master)[3] & termios.ECHO
            os.write(master, typed)
    _, status = os.waitpid(pid, 0)
    echoes = bool(termios.tcgetattr(master)[3] & termios.ECHO)
    os.close(master)
    return os.waitstatus_to_exitcode(status), shown, echoes


def test_ctrl_c_at_the_question_is_clean(tmp_path: Path) -> None:
    status, shown, echoes = at_terminal(["init", "repo"], "New passphrase of repo: ", b"half of it\x03", tmp_path)
    assert (status, echoes) == (130, True), shown
    assert "half" not in shown
    assert "Traceback" not in shown
    assert re.search(r"New passphrase of repo: \r\nsnapchain: interrupted", shown), shown
    assert list(tmp_path.glob("repo/keys/*")) == []


@pytest.mark.parametrize("stdin", ["null", "pipe", "background"])
def test_without_a_terminal_nobody_is_asked(stdin: str, tmp_path: Path, run: Run) -> None:
    run("init", "repo")
    words = [sys.executable, "-m", "snapchain", "log", "repo"]
    environment = {name: value for name, value in os.environ.items() if name != "SNAPCHAIN_PASSWORD"}
    if stdin == "background":
        words = ["sh", "-mc", f"{sys.executable} -m snapchain log repo & wait $!"]
        pid, master = pty.fork()
        if pid == 0:
            os.chdir(tmp_path)
            os.environ.pop("SNAPCHAIN_PASSWORD", None)
            os.execvp(words[0], words)
        shown = b""
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        _, ended = os.waitpid(pid, 0)
        os.close(master)
        status, said = os.waitstatus_to_exitcode(ended), shown.decode()
    else:
        kind = subprocess.DEVNULL if stdin == "null" else subprocess.PIPE
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, stdin=kind if kind == subprocess.DEVNULL else None,
            input=None if kind == subprocess.DEVNULL else b"secret\n", capture_output=True, check=False,
        )  # fmt: skip
        status, said = done.returncode, done.stderr.decode()
    assert (status, "no passphrase was given" in said) == (2, True), said
    assert "Passphrase of" not in said
