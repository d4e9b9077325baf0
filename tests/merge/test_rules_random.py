"""Random chains of all kinds of files, merged by random rules: what stays reads as before, and is known if shipped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from snapchain.merge import plan as planning, run as merge_run
from snapchain.merge.request import At, MergeRequest
from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.ops import hold
from snapchain.ops.merge import held_at
from snapchain.repository.destination import RepositoryDestination
from tests.ops.shipping import DISK, random_stack, restore, same_bytes, ship
from tests.ops.stacks import clean, flat, names
from tests.repository.synthetic import again, content_id_of, repository


@pytest.mark.parametrize("seed", range(300, 316))
def test_random_chains_by_random_rules(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    stack = random_stack(tmp_path / "vm", seed, layers=draw.randrange(4, 9))
    shown = {path.name: content_id_of(raw.read_bytes()) for path, raw in zip(stack.files, stack.shown, strict=True)}
    for raw in stack.shown:
        raw.rename(tmp_path / raw.name)
    repo = repository(MemoryStore(), block_size=256 * 1024)
    shipped = draw.randrange(len(stack.files))
    at: tuple[At, ...] = ()
    if draw.random() < 0.7:
        ship(stack.files[shipped], repo)
        at = (held_at("repo::disk", RepositoryDestination(again(repo)), DISK),)
    held = {path: path.read_bytes() for path in stack.files[1:] if draw.random() < 0.2}
    for path in held:
        hold.hold_image(path, "test")
    choices: list[dict[str, object]] = [
        {"policy": Policy(last=draw.randrange(1, 4))},
        {"max_layers": draw.randrange(1, len(stack.files))},
        {"budget_bytes": draw.randrange(8 << 20)},
        {"policy": Policy(last=1), "max_layers": 3, "budget_bytes": draw.randrange(8 << 20)},
    ]
    limits = draw.choice(choices)
    request = MergeRequest(image=stack.files[-1], flatten=draw.random() < 0.3, at=at, **limits)  # type: ignore[arg-type]
    planned = planning.plan(request)
    merge_run.run(planned)
    left = names(tmp_path / "vm")
    assert len(left) == planned.layers_after
    assert stack.files[-1].name in left
    for name in left:
        image = tmp_path / "vm" / name
        image_format = "raw" if image.suffix == ".raw" else "qcow2"
        assert content_id_of(flat(image, tmp_path / "out", image_format).read_bytes()) == shown[name], name
        assert image_format == "raw" or clean(image)
    assert {path: path.read_bytes() for path in held} == held
    assert planning.plan(request).layers_after == planned.layers_after or "budget_bytes" in limits
    if at:
        report = ship(stack.files[-1], repo)
        assert report.content_id == shown[stack.files[-1].name]
        assert report.layers_present > 0
        restore(repo, tmp_path / "restored.raw")
        assert same_bytes(tmp_path / "restored.raw", tmp_path / f"{len(stack.files) - 1}.shown")
