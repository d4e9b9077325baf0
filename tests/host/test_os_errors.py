"""One way to tell of an error of the operating system, with a file that the user knows."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput, Unavailable
from snapchain.host.os_errors import os_errors, translated
from snapchain.host.temporary_names import NEW, RESTORE, temporary_beside
from snapchain.image.opening import open_image
from snapchain.ops.restore.output import OutputFile


def denied(number: int = errno.EACCES) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_permission_is_denied_in_one_way(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told = translated(denied(number), "/images/a.qcow2")

    def refuse(*_: object, **__: object) -> int:
        raise denied(number)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InvalidInput, match="permission denied") as opened:
        open_image(Path("/images/a.qcow2"), subject="/images/a.qcow2")
    assert (str(opened.value), opened.value.hint) == (str(told), told.hint)
    assert str(told) == "/images/a.qcow2: permission denied"
    assert told.hint == "run as a user who may read and write it"


@pytest.mark.parametrize(
    "path",
    [
        temporary_beside(Path("/images/a.b.qcow2"), purpose="snapshot"),
        temporary_beside(Path("/images/a.b.qcow2"), purpose=RESTORE),
        OutputFile(Path("/images/a.b.qcow2")).growing,
    ],
)
def test_a_temporary_file_is_told_by_the_name_that_the_user_knows(path: Path) -> None:
    told = translated(denied(), path)
    assert str(told) == "/images/a.b.qcow2: permission denied: no file can be made beside it"
    assert told.hint == "run as a user who may write to /images"
    full = translated(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path)
    assert isinstance(full, Unavailable)
    assert full.subject == "/images/a.b.qcow2"


def test_a_note_is_told_by_its_image() -> None:
    note = Path("/images/.snapchain-layer-web1.2.qcow2-1234567.json")
    assert str(translated(denied(), note)) == f"/images/web1.2.qcow2: permission denied for its note {note.name}"
    begun = temporary_beside(note, purpose=NEW)
    assert str(translated(denied(), begun)) == str(translated(denied(), note)), "no temporary name is told"


@pytest.mark.parametrize("name", ["a.qcow2", ".hidden", ".a.qcow2", ".a.b-c", ".snapchain-layer-x.json"])
def test_other_names_stay(name: str) -> None:
    with pytest.raises(InvalidInput, match="permission denied") as raised, os_errors(f"/images/{name}"):
        raise denied()
    assert raised.value.subject == f"/images/{name}"
