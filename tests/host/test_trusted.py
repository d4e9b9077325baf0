"""Who besides this user and root may write to a file that decides which programs run: then it is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput, NotFound
from snapchain.host.private import read_trusted
from tests.host.others import ALICE, KVM, directory, file, link, open_host, root_only

__all__ = ["open_host"]

OWN = (0, 0, 0o600)
PLACE = (0, 0, 0o755)


@root_only
@pytest.mark.parametrize(
    ("of_file", "of_place", "who"),
    [
        (OWN, PLACE, None),
        ((0, 0, 0o664), (0, 0, 0o775), None),
        ((0, KVM, 0o640), (0, KVM, 0o750), None),
        (OWN, (0, 0, 0o1777), None),
        ((ALICE, 0, 0o600), PLACE, f"user {ALICE}"),
        ((0, KVM, 0o660), PLACE, f"group {KVM}"),
        ((0, 0, 0o666), PLACE, "everybody"),
        (OWN, (ALICE, 0, 0o700), f"user {ALICE}"),
        (OWN, (0, KVM, 0o775), f"group {KVM}"),
        (OWN, (0, 0, 0o777), "everybody"),
        ((ALICE, 0, 0o600), (0, 0, 0o1777), f"user {ALICE}"),
    ],
)
def test_whoever_else_can_write_or_replace_it_is_named(
    open_host: Path, of_file: tuple[int, int, int], of_place: tuple[int, int, int], who: str | None
) -> None:
    place = directory(open_host / "etc")
    made = file(place / "night.toml", uid=of_file[0], gid=of_file[1], mode=of_file[2])
    os.chown(place, of_place[0], of_place[1])
    place.chmod(of_place[2])
    if who is None:
        assert read_trusted(made) == b"x"
        return
    with pytest.raises(InvalidInput, match=f"{who} can write or replace this file") as caught:
        read_trusted(made)
    assert caught.value.subject == str(made)


@root_only
@pytest.mark.parametrize("sticky", [False, True])
def test_a_link_of_somebody_else_chooses_none(open_host: Path, *, sticky: bool) -> None:
    made = file(open_host / "night.toml", mode=0o644)
    place = directory(open_host / "d", uid=0 if sticky else ALICE, mode=0o1777 if sticky else 0o755)
    with pytest.raises(InvalidInput, match=f"user {ALICE} can write or replace this file"):
        read_trusted(link(place / "link.toml", made, uid=ALICE))


@pytest.mark.parametrize(("of_file", "of_place"), [(0o666, 0o755), (0o600, 0o777)])
def test_everybody_is_nobody_to_trust(tmp_path: Path, of_file: int, of_place: int) -> None:
    place = tmp_path / "etc"
    place.mkdir()
    place.chmod(of_place)
    (place / "night.toml").write_text("x")
    (place / "night.toml").chmod(of_file)
    with pytest.raises(InvalidInput, match="everybody can write or replace this file"):
        read_trusted(place / "night.toml")


def test_it_is_read_through_links_and_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("some")
    (tmp_path / "link").symlink_to("a")
    assert read_trusted(tmp_path / "link", cap=4) == b"some"
    with pytest.raises(InvalidInput, match="larger than the 3 bytes"):
        read_trusted(tmp_path / "a", cap=3)
    with pytest.raises(NotFound, match="no such file"):
        read_trusted(tmp_path / "gone")
