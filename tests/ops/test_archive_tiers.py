"""Objects that somebody moved into an archive tier: every command names one, and none takes it for lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from snapchain.errors import Unavailable
from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Archived, ObjectStore, StoreWrapper
from snapchain.ops.restore.run import Restoration
from snapchain.repository import packs
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.objects.conftest import moto, moto_server  # noqa: F401 - fixtures
from tests.ops.shipping import DISK, MiB, ship
from tests.ops.stacks import Layer, build, write
from tests.ops.test_traffic import run
from tests.repository.synthetic import again, repository
from tests.servers import S3Server, admin_client

KIB = 64 * 1024


class Tier(StoreWrapper):
    """A store in which the objects below `prefix` are archived until they are thawed."""

    def __init__(self, inner: ObjectStore, prefix: str) -> None:
        super().__init__(inner)
        self.prefix: str | None = prefix

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if self.prefix is not None and name.startswith(self.prefix) and self.inner.size(name) is not None:
            raise Archived("the object is in an archive tier; it is not damaged", subject=name)
        return self.inner.get(name, offset=offset, length=length)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    layers = [
        Layer(MiB, [f"write -P {n + 1} {n * 64}k 64k" for n in range(12)]),
        Layer(MiB, ["write -P 20 0 64k", "write -P 21 512k 192k"]),
        Layer(MiB, ["write -P 31 768k 128k"]),
    ]
    return build(tmp_path_factory.mktemp("archived") / "chain", layers)


def collect(repo: Repository) -> object:
    return RepositoryDestination(repo).collecting().run()


def rewrite(repo: Repository, files: list[Path], folder: Path) -> object:
    """Ship an image that was written to since its last point: it is compared with what is stored."""
    copies = [folder / path.name for path in files]
    for path, copy in zip(files, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    write(copies[-1], "write -P 77 128k 64k")
    return ship(copies[-1], repo)


COMMANDS: dict[str, Callable[[Repository, list[Path], Path], object]] = {
    "verify": lambda repo, _, __: verify(repo),
    "verify data": lambda repo, _, __: verify(repo, share=1.0),
    "repair": lambda repo, _, __: RepositoryDestination(repo).repairing(()).run(),
    "repair plan": lambda repo, _, __: RepositoryDestination(repo).repairing(()).plan(),
    "repair data": lambda repo, _, __: RepositoryDestination(repo).repairing((), read_data=True).run(),
    "gc": lambda repo, _, __: collect(repo),
    "gc plan": lambda repo, _, __: RepositoryDestination(repo).collecting().plan(),
    "merge": lambda repo, _, __: RepositoryMerge(repo, DISK, Policy(last=1)).run(),
    "stats": lambda repo, _, __: RepositoryDestination(repo).usage(),
    "ship": rewrite,
    "restore": lambda repo, _, to: Restoration(RepositoryDestination(repo), DISK, to / "out.raw").run(),
    "restore what is left": lambda repo, _, to: Restoration(
        RepositoryDestination(repo), DISK, to / "out.raw", allow_damaged=True
    ).run(),
}
NEEDS_DATA = {"verify data", "repair data", "restore", "restore what is left"}


@pytest.fixture(scope="module")
def stored(files: list[Path]) -> Repository:
    """A repository whose second point was merged, so that gc has something to move."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packs, "PACK_BYTES", 300)
        whole = repository(MemoryStore(), block_size=KIB)
        for path in files[:2]:
            ship(path, whole)
        RepositoryMerge(whole, DISK, Policy(last=1)).run()
        ship(files[2], whole)
    return whole


@pytest.mark.parametrize("prefix", ["packs/", "layers/", "disks/"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_an_archived_object_for_lost(
    files: list[Path], stored: Repository, tmp_path: Path, command: str, prefix: str
) -> None:
    whole = again(stored, MemoryStore())
    for info in stored.store.list(""):
        whole.store.put(info.name, stored.store.get(info.name))
    there = {info.name for info in whole.store.list("")}
    tier = Tier(whole.store, prefix)
    cold = again(whole, tier)
    caught: Archived | None = None
    try:
        done = COMMANDS[command](cold, files, tmp_path)
    except Archived as error:
        caught = error
    if caught is None:
        assert command not in NEEDS_DATA
        assert [getattr(done, part, ()) for part in ("findings", "damaged", "lost")] == [(), (), ()]
    else:
        assert "it is not damaged" in str(caught)
        assert str(caught.subject).startswith(prefix)
    assert not (tmp_path / "out.raw").exists()
    left = {info.name for info in whole.store.list("")}
    assert not [name for name in left if name.startswith("index/damaged")], "nothing is recorded as damage"
    assert command == "gc" or not [name for name in there - left if name.startswith(("packs/", "layers/"))]
    assert cold.blobs.damaged == set()
    tier.prefix = None
    assert verify(again(whole), share=1.0).findings == ()


def test_known_damage_is_not_forgotten_while_its_record_is_archived(files: list[Path]) -> None:
    whole = repository(MemoryStore(), block_size=KIB)
    ship(files[0], whole)
    pack = next(iter(whole.store.list("packs/")))
    whole.store.put(pack.name, bytes(pack.size))
    assert verify(again(whole), share=1.0).findings
    (record,) = [info.name for info in whole.store.list("index/damaged")]
    with pytest.raises(Archived, match="not damaged"):
        collect(again(whole, Tier(whole.store, "index/damaged")))
    assert whole.store.size(record) is not None


@pytest.mark.usefixtures("moto")
def test_a_server_with_a_lifecycle_rule(
    moto_server: S3Server,  # noqa: F811
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = moto_server.new_bucket()
    client = admin_client(moto_server.endpoint)
    run(capsys, "init", f"s3://{bucket}/a b", "--no-encryption", "--quiet")
    run(capsys, "ship", files[-1], f"s3://{bucket}/a b::web1", "--quiet")
    packs_there = client.list_objects_v2(Bucket=bucket, Prefix="a b/packs/")["Contents"]
    bodies = {each["Key"]: client.get_object(Bucket=bucket, Key=each["Key"])["Body"].read() for each in packs_there}

    def move_all(storage_class: Literal["DEEP_ARCHIVE", "STANDARD"]) -> None:
        for key, body in bodies.items():
            client.put_object(Bucket=bucket, Key=key, Body=body, StorageClass=storage_class)

    move_all("DEEP_ARCHIVE")
    for words in (
        ("verify", f"s3://{bucket}/a b", "--read-data"),
        ("restore", f"s3://{bucket}/a b::web1", tmp_path / "out.qcow2"),
        ("repair", f"s3://{bucket}/a b"),
        ("gc", f"s3://{bucket}/a b"),
    ):
        error = json.loads(_failed(capsys, *words))["error"]
        assert error["kind"] == "unavailable", words
        assert error["message"].startswith("the object is in an archive tier; it is not damaged"), words
        key = error["subject"].removeprefix(f"s3://{bucket}/")
        assert key in bodies
        assert f"aws s3api restore-object --bucket {bucket} --key '{key}' --restore-request Days=14" in error["hint"]
    move_all("STANDARD")
    assert run(capsys, "verify", f"s3://{bucket}/a b", "--read-data", "--json")["findings"] == []
    run(capsys, "restore", f"s3://{bucket}/a b::web1", tmp_path / "out.qcow2", "--quiet")


def _failed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    from snapchain.cli import main

    assert main([*map(str, words), "--json"]) == Unavailable.exit_code, words
    return capsys.readouterr().out
