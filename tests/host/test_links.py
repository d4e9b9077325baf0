"""Following links: where os.path.realpath leads, and who could have chosen that."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from snapchain.errors import InvalidInput, Unsupported
from snapchain.host.links import follow, others_may_write

NAMES = ["a", "b", "c"]


@st.composite
def trees(draw: st.DrawFn) -> dict[str, str]:
    """Links by path, two directories deep, to names that may be there or not, or lead on."""
    places = [*NAMES, *(f"d/{name}" for name in NAMES)]
    targets = [*places, *(f"../{name}" for name in places), "d", "../d/../d/a", "file", "../file", "none/../file"]
    return draw(st.dictionaries(st.sampled_from(places), st.sampled_from(targets), max_size=5))


@given(links=trees(), start=st.sampled_from([*NAMES, "d/a", "d/../d/b", "a/a", "new", "d/new"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_leads_where_the_kernel_leads(
    tmp_path_factory: pytest.TempPathFactory, links: dict[str, str], start: str
) -> None:
    place = tmp_path_factory.mktemp("t")
    (place / "d").mkdir()
    (place / "file").write_bytes(b"")
    for name, target in links.items():
        (place / name).symlink_to(target)
    path = place / start
    try:
        path.stat()
    except FileNotFoundError:
        is_there = False
    except OSError:
        with pytest.raises(InvalidInput) as caught:
            follow(path)
        assert str(place) in str(caught.value.subject)
        return
    else:
        is_there = True
    try:
        found = follow(path)
    except InvalidInput:
        assert not is_there
        return
    assert found.by_link == path.is_symlink()
    if is_there:
        assert found.path.samefile(path)
        assert not found.path.is_symlink()
    if not found.by_link:
        assert found.path == path
    assert not found.exposed


@pytest.mark.parametrize("mode", [0o755, 0o775, 0o757, 0o1777])
@pytest.mark.parametrize("at", ["last", "directory", "first", "second"])
def test_a_link_that_others_may_change_is_known(tmp_path: Path, mode: int, at: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_bytes(b"")
    shared = tmp_path / "shared"
    shared.mkdir()
    match at:
        case "last":
            (shared / "x").symlink_to("../there/file")
            path = shared / "x"
        case "directory":
            (shared / "d").symlink_to("../there")
            path = shared / "d" / "file"
        case "first":
            (shared / "x").symlink_to("../second")
            (tmp_path / "second").symlink_to("there/file")
            path = shared / "x"
        case "second":
            (shared / "x").symlink_to("../there/file")
            (tmp_path / "first").symlink_to("shared/x")
            path = tmp_path / "first"
    shared.chmod(mode)
    assert follow(path).exposed == (mode != 0o755) == others_may_write(shared.stat())


@pytest.mark.root
@pytest.mark.parametrize(
    ("mode", "owner", "of_directory", "is_followed"),
    [
        (0o777, 65534, 0, False),
        (0o1777, 65534, 0, False),
        (0o777, 0, 0, True),
        (0o777, 65534, 65534, True),
        (0o755, 65534, 0, True),
        (0o775, 65534, 0, True),
    ],
)
def test_a_link_of_another_user_is_followed_as_the_kernel_would(
    tmp_path: Path, mode: int, owner: int, of_directory: int, *, is_followed: bool
) -> None:
    (tmp_path / "file").write_bytes(b"")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "x").symlink_to("../file")
    os.lchown(shared / "x", owner, owner)
    os.chown(shared, of_directory, of_directory)
    shared.chmod(mode)
    if is_followed:
        assert follow(shared / "x").path == tmp_path / "file"
        return
    with pytest.raises(Unsupported, match="another user made this symbolic link") as raised:
        follow(shared / "x")
    assert raised.value.subject == str(shared / "x")


def test_a_directory_of_another_user_is_his_to_write_to(tmp_path: Path) -> None:
    found = os.stat_result((stat.S_IFDIR | 0o755, 1, 1, 2, os.geteuid() + 1, 0, 0, 0, 0, 0))
    assert others_may_write(found)
