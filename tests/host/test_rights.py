"""Root's thread with the rights of somebody else, and root again afterwards."""

from __future__ import annotations

import os
import pwd
import threading
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput, Unsupported
from snapchain.host import rights as module
from snapchain.host.os_errors import os_errors
from snapchain.host.rights import EVERYBODY, DeniedToOther, Rights, acting_as
from tests.host.others import ALICE, KVM, file, root_only

pytestmark = root_only


def can_read(path: Path) -> bool:
    try:
        path.read_bytes()
    except PermissionError:
        return False
    return True


def test_the_kernel_judges_by_the_other_rights_and_by_roots_again(open_host: Path) -> None:
    secret, theirs = file(open_host / "secret"), file(open_host / "theirs", uid=ALICE)
    of_group = file(open_host / "group", gid=KVM, mode=0o640)
    before = os.getgroups()
    with acting_as(Rights(ALICE, KVM, (KVM,))):
        assert [can_read(path) for path in (secret, theirs, of_group)] == [False, True, True]
        with acting_as(None):
            assert not can_read(secret)
        with acting_as(EVERYBODY):
            assert [can_read(path) for path in (secret, theirs, of_group)] == [False, False, False]
        assert can_read(theirs)
    assert can_read(secret)
    assert os.getgroups() == before


def test_supplementary_groups_count_and_root_group_is_left_behind(open_host: Path) -> None:
    of_group, of_root = file(open_host / "group", gid=KVM, mode=0o640), file(open_host / "root", gid=0, mode=0o640)
    with acting_as(Rights(ALICE, ALICE, (KVM,))):
        assert can_read(of_group)
        assert not can_read(of_root)


def test_other_threads_stay_root(open_host: Path) -> None:
    secret = file(open_host / "secret")
    inside, done, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        inside.wait()
        seen.append((can_read(secret), os.getgroups()))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    groups = os.getgroups()
    with acting_as(Rights(ALICE, ALICE, (KVM,))):
        inside.set()
        done.wait()
    thread.join()
    assert seen == [(True, groups)]


def test_roots_rights_come_back_after_any_error(open_host: Path) -> None:
    secret = file(open_host / "secret")
    for error in (ValueError, KeyboardInterrupt, OSError):
        with pytest.raises(error, match=r"^$"), acting_as(EVERYBODY):
            raise error
        assert can_read(secret)


def test_a_denial_says_to_whom(open_host: Path) -> None:
    secret = file(open_host / "secret")
    with (
        pytest.raises(DeniedToOther, match="Permission denied") as raised,
        acting_as(Rights.of_user(ALICE)),
        secret.open(),
    ):
        pass
    assert raised.value.rights.uid == ALICE
    with (
        pytest.raises(InvalidInput, match=f"permission denied to user {ALICE}, with whose rights") as said,
        os_errors(secret),
        acting_as(Rights.of_user(ALICE)),
        secret.open(),
    ):
        pass
    assert said.value.subject == str(secret)


def test_users_have_the_groups_of_their_accounts() -> None:
    account = next(each for each in pwd.getpwall() if each.pw_uid not in (0, 65534))
    found = Rights.of_user(account.pw_uid)
    assert (found.uid, found.gid) == (account.pw_uid, account.pw_gid)
    assert set(found.groups) == set(os.getgrouplist(account.pw_name, account.pw_gid))
    assert Rights.of_user(ALICE) == Rights(ALICE, 65534, ())


def test_a_kernel_that_changes_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def __getattr__(self, _name: str) -> object:
            return lambda *_arguments: 0

    monkeypatch.setattr(module, "_libc", Libc)
    with (
        pytest.raises(Unsupported, match=f"rights of user {ALICE}.*the kernel did not change") as raised,
        acting_as(Rights.of_user(ALICE)),
    ):
        pytest.fail("the block ran as root")
    assert "run snapchain as that user" in str(raised.value.hint)


def test_a_securebit_that_keeps_roots_capabilities_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._libc()

    class Libc:
        setfsuid, setfsgid, syscall = real.setfsuid, real.setfsgid, real.syscall

        def prctl(self, *_arguments: int) -> int:
            return 0x2F

    monkeypatch.setattr(module, "_libc", Libc)
    with pytest.raises(Unsupported, match="securebit"), acting_as(Rights.of_user(ALICE)):
        pytest.fail("the block ran with root's capabilities")


def test_the_words_name_users_and_groups() -> None:
    assert str(EVERYBODY) == "everybody"
    assert str(Rights.of_user(ALICE)) == f"user {ALICE}"
    assert str(Rights.of_group(KVM)) == f"group {KVM}"
