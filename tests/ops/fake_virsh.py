"""A virsh for tests: a script on PATH that answers from files, as libvirt's own does for domains and pools."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest

from snapchain.host import virsh

SCRIPT = """#!/bin/sh
cd {folder}
while [ "$1" != "--quiet" ]; do shift; done
shift
case "$1" in
  list) case "$*" in *--all*) cat all;; *) cat running;; esac;;
  dumpxml) case "$*" in *--inactive*) cat "inactive/$3";; *) cat "domains/$3";; esac;;
  pool-list) cat pools;;
  pool-dumpxml) cat "pool/$3";;
  vol-list) cat "volumes/$3";;
  *) exit 1;;
esac
"""


def domain(name: str, source: Path, *below: Path, target: str = "vda") -> str:
    """XML of a domain with one disk; below: the backing chain that the definition records, uppermost first."""
    chain = "<backingStore/>"
    for path in reversed(below):
        source_of_it = f"<format type='qcow2'/><source file={quoteattr(str(path))}/>"
        chain = f"<backingStore type='file'>{source_of_it}{chain}</backingStore>"
    return (
        f"<domain type='kvm'><name>{name}</name><devices><disk type='file' device='disk'>"
        f"<source file={quoteattr(str(source))}/>{chain}<target dev='{target}' bus='virtio'/></disk></devices></domain>"
    )


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    domains: Mapping[str, str] | None = None,
    running: Mapping[str, str] | None = None,
    pools: Mapping[str, tuple[str, Sequence[Path]]] | None = None,
) -> None:
    """domains: inactive XML by name; running: active XML of those that run; pools: (XML, volumes) by name."""
    domains, running, pools = domains or {}, running or {}, pools or {}
    for name in ("domains", "inactive", "pool", "volumes", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "all").write_text("".join(f"{name}\n" for name in domains) + "\n")
    (folder / "running").write_text("".join(f"{name}\n" for name in running) + "\n")
    (folder / "pools").write_text("".join(f"{name}\n" for name in pools) + "\n")
    for name, xml in domains.items():
        (folder / "inactive" / name).write_text(xml)
        (folder / "domains" / name).write_text(running.get(name, xml))
    for name, (xml, volumes) in pools.items():
        (folder / "pool" / name).write_text(xml)
        rows = "".join(f" {path.name}   {path}\n" for path in volumes)
        (folder / "volumes" / name).write_text(f" Name   Path\n-------------\n{rows}\n")
    script(folder, SCRIPT.format(folder=folder), monkeypatch)


def script(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any program under the name of virsh, first on PATH, and a socket as of a daemon."""
    program = folder / "bin" / "virsh"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (folder / "libvirt-sock").touch()
    monkeypatch.setattr(virsh, "_SOCKETS", (str(folder / "libvirt-sock"),))
