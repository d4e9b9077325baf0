"""Holds of layers and points: set once a tag, released by who set them, shown where people look."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapchain.errors import Conflict, InvalidInput, NotFound, Unsupported
from snapchain.image import scan
from snapchain.objects.memory import MemoryStore
from snapchain.ops import hold, inspect, log
from snapchain.repository.destination import RepositoryDestination
from snapchain.source.lineage import check_range, held_layers
from snapchain.source.notes import Notes
from tests.ops.shipping import DISK, ship
from tests.ops.stacks import Layer, build, names
from tests.repository.synthetic import repository


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "vm", [Layer(writes=["write -P 1 0 64k"])] * 4)


def test_a_layer_is_held_under_tags(chain: list[Path]) -> None:
    first = hold.hold_image(chain[1], "audit", reason="until May")
    again = hold.hold_image(chain[1], "audit", reason="until June")
    assert [(each.tag, each.reason) for each in again.holds] == [("audit", "until June")]
    assert again.holds[0].since == first.holds[0].since
    assert [each.tag for each in hold.hold_image(chain[1], "legal").holds] == ["audit", "legal"]
    shown = inspect.inspect_image(chain[-1])
    assert [[each.tag for each in layer.holds] for layer in shown.layers] == [[], ["audit", "legal"], [], []]
    with pytest.raises(NotFound, match="not held under 'nobody'"):
        hold.release_image(chain[1], "nobody")
    assert [each.tag for each in hold.release_image(chain[1], "audit").holds] == ["legal"]
    assert hold.release_image(chain[1], "legal").holds == ()
    assert len(list(chain[0].parent.iterdir())) == len(names(chain[0].parent)) == 4


def test_by_a_link_the_file_itself_is_held(chain: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link.qcow2"
    link.symlink_to(chain[2])
    assert hold.hold_image(link, "audit").address == str(chain[2])
    assert hold.release_image(link, "audit").holds == ()


def test_the_hold_of_a_file_that_is_gone_is_released_by_its_path(chain: list[Path]) -> None:
    hold.hold_image(chain[1], "audit")
    chain[1].unlink()
    assert hold.release_image(chain[1], "audit").holds == ()
    with pytest.raises(NotFound, match="no such file"):
        hold.release_image(chain[1], "audit")


def test_what_cannot_be_held(chain: list[Path]) -> None:
    with pytest.raises(NotFound, match="nothing: no such file"):
        hold.hold_image(chain[0].with_name("nothing"), "audit")
    with pytest.raises(Unsupported, match="a regular file can be held"):
        hold.hold_image(chain[0].parent, "audit")
    with pytest.raises(InvalidInput, match="cannot name a hold"):
        hold.hold_image(chain[0], " audit")


def test_a_range_with_a_held_layer_is_refused(chain: list[Path]) -> None:
    hold.hold_image(chain[1], "audit", reason="until May")
    with scan(chain[-1]) as opened:
        holds = held_layers(opened, Notes())
        check_range(opened, 2, 3, holds)
        for first, last in ((0, 1), (1, 3), (1, 1)):
            with pytest.raises(Conflict, match=r"held under 'audit' since .* \(until May\)") as told:
                check_range(opened, first, last, holds)
            assert "snapchain release" in (told.value.hint or "")


def test_a_point_is_held(chain: list[Path]) -> None:
    repo = repository(MemoryStore(), block_size=256 * 1024)
    place = RepositoryDestination(repo)
    ship(chain[-1], repo, labels=["golden"])
    with pytest.raises(InvalidInput, match="none is named"):
        hold.hold_point(place, DISK, "audit", point=None)
    report = hold.hold_point(place, DISK, "audit", point="golden", reason="until May")
    assert report.address.endswith(f"::{DISK}@1")
    assert [each.tag for each in log.log(place).disks[0].points[0].holds] == ["audit"]
    assert hold.release_point(place, DISK, "audit", point="1").holds == ()
    with pytest.raises(NotFound, match="is not held under 'audit'"):
        hold.release_point(place, DISK, "audit", point="1")
