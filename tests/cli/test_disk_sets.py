"""sync and migrate of several disks, as a user meets them."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import MiB, Run
from tests.ops.stacks import Layer, build


def test_the_disks_of_one_guest(run: Run, tmp_path: Path) -> None:
    images = [
        build(tmp_path / "a", [Layer(4 * MiB, ["write -P 1 0 2M"]), Layer(4 * MiB, ["write -P 2 1M 256k"])])[-1],
        build(tmp_path / "b", [Layer(MiB, ["write -P 3 0 512k"])], names=["data.qcow2"])[-1],
    ]
    dest = f"dir:{tmp_path}/replica"
    words = ("sync", str(images[0]), f"{dest}::web1/vda", str(images[1]), f"{dest}::web1/vdb")
    uri = ("--dest-uri", "qemu+ssh://kvm2/system")
    assert run(*words, "--check").status == 4
    said = run(*words, "--rounds", "1", "--json", *uri)
    assert said.status == 0
    assert [disk["ready"] for disk in said.json["disks"]] == [True, True]
    assert "--migrate-disks vda,vdb" in said.json["virsh_command"]
    plainly = run(*words, *uri)
    assert plainly.status == 0
    assert plainly.out.count("virsh migrate --live") == 1
    assert "2 disks are ready" in plainly.out
    assert run(*words, "--check").status == 0
    assert run(*words[:-1]).status == 2
    assert "stands alone" in run(*words[:-1]).err
    assert run(*words[:-1], f"dir:{tmp_path}/other::web1/vdb").status == 2
    assert run(*words, "--guest-disk", "vda").status == 2
    migrated = run("migrate", *words[1:], "--offline", "--json")
    assert migrated.status == 0
    assert [disk["epoch"] for disk in migrated.json["disks"]] == [2, 2]
    refused = run("snapshot", str(images[1]))
    assert refused.status == 4
    assert "was given to" in refused.err
    assert run("migrate", *words[1:], "--take-back").status == 0
    assert run("snapshot", str(images[1])).status == 0
