"""The command line as a user meets it: real images, a real repository in a directory, one process or many."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snapchain.cli import main

MiB = 1 << 20


@dataclass(frozen=True)
class Said:
    """What one command ended with."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command in this process, standing in an empty directory, with a passphrase in the environment."""
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "secret")
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> Said:
        capsys.readouterr()
        status = main(words)
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return command


@contextmanager
def spawned(words: Sequence[str], folder: Path, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """The same command as a process of its own, for signals and pipes; it is gone when the block ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "snapchain", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=more.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        **more,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def write(image: Path, *commands: str, image_format: str = "qcow2") -> None:
    """Change an image as a guest would: qemu-io commands such as 'write -P 7 64k 1M'."""
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", image_format, *words, str(image)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return made_disk(tmp_path)


def made_disk(directory: Path) -> Path:
    """A qcow2 of 16 MiB with 3 MiB of data in it."""
    image = directory / "web1.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    write(image, "write -P 1 0 2M", "write -P 2 8M 1M")
    return image
