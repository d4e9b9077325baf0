"""snapchain: ship, merge and restore the snapshot chains of QEMU disks."""

from __future__ import annotations


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # inside: it loads an e-mail parser

        return version("snapchain")
    raise AttributeError(name)
