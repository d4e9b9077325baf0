"""Reads the order in which a process makes things last on a disk off its system calls, as strace prints them."""

from __future__ import annotations

import re
from pathlib import Path

TRACED = "trace=fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"


def file_call(call: str, home: Path) -> str | None:
    """`fsync NAME`, `rename A B`, ... for a call that concerns files of a directory; None for another one, or a failed.

    A call during which another thread made one is told in two lines, of which the first names the file.
    """
    if str(home) not in call or not (" = 0" in call or "<unfinished" in call):
        return None
    verb = re.sub(r"at2?$", "", call.strip().split("(")[0])
    by_directory = re.findall(r'\d+<([^>]*)>, "([^"]+)"', call)
    paths = [f"{directory}/{name}" for directory, name in by_directory]
    paths = paths or re.findall(rf'[<"]({re.escape(str(home))}[^>"]*)[>"]', call)
    return " ".join([verb, *(_plain(path, home) for path in paths)])


def _plain(path: str, home: Path) -> str:
    """The name, without what is random in it."""
    name = "." if path == str(home) else Path(path).name
    if name.startswith("..snapchain-merge-"):
        return "journal-tmp"
    if name.startswith(".snapchain-merge-"):
        return "journal"
    if name.startswith("..snapchain-layer-"):
        return "note-tmp"
    if name.startswith(".snapchain-layer-"):
        return "note"
    return "tmp" if name.startswith(".") and name != "." else name
