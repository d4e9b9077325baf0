"""The child that reads a file system: it gives up its rights first, then takes commands.

A file system is the guest's, so it may be made to break its reader.  What the libraries raise becomes a message;
whatever else they do happens to a process that can do nothing but answer.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from snapchain.files import messages
from snapchain.files.confinement import NotConfined, confine
from snapchain.files.disk import Disk, Volume
from snapchain.files.libyal import Unix, words_of
from snapchain.files.messages import Hangup, Kind
from snapchain.files.node import Facts, FileSystem, Node
from snapchain.files.sleuthkit import Windows
from snapchain.files.volumes import Content, Described, volumes

_MOST_LINKS = 40
_MOST_DEPTH = 200
_MOST_FILES = 1 << 20
_MOST_SIZE = 1 << 63
_EXT, _XFS = frozenset({Content.EXT}), frozenset({Content.XFS})
_MODULES = {
    "pyfsext": _EXT,
    "pyfsxfs": _XFS,
    "pytsk3": frozenset({Content.NTFS, Content.FAT, Content.EXFAT}),
}


class Failed(Exception):
    """kind: of the error there"""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


def main(fd: int, argument: str) -> None:
    """Serve commands that come through `fd`. argument: the parent's process id and the bytes of the disk."""
    os.closerange(fd + 1, _MOST_FILES)  # what a caller of snapchain left open may be a passphrase
    parent, size = map(int, argument.split())
    modules = {}
    missing = []
    for name in _MODULES:
        try:
            modules[name] = __import__(name)
        except ImportError:
            missing.append(name)
    json.dumps({}, default=str)
    "x".encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # no codec is loaded later
    try:
        try:
            confine(parent)
        except NotConfined as error:
            _fail(fd, "unconfined", str(error))
            return
        messages.send(fd, Kind.READY, json.dumps(missing).encode())
        child = _Child(fd, Disk(fd, size), modules)
        while True:
            kind, payload = messages.receive(fd)
            if kind is not Kind.COMMAND:
                return
            child.do(json.loads(payload))
    except (Hangup, BrokenPipeError, ConnectionResetError):
        return


def _fail(fd: int, kind: str, words: str) -> None:
    messages.send(fd, Kind.FAILED, json.dumps({"kind": kind, "words": words[:2000]}).encode())


class _Child:
    def __init__(self, fd: int, disk: Disk, modules: dict[str, Any]) -> None:
        self._fd, self._disk, self._modules = fd, disk, modules
        self._volumes: list[Described] | None = None
        self._system: FileSystem | None = None

    def do(self, command: dict[str, Any]) -> None:
        """Carry out one command. A failure is sent to the parent."""
        try:
            commands: dict[str, Callable[..., Any]] = {"volumes": self._list, "open": self._open, "walk": self._walk}
            done = commands[command.pop("do")](**command)
            messages.send(self._fd, Kind.DONE, json.dumps(done).encode())
        except (Hangup, BrokenPipeError, ConnectionResetError):
            raise
        except Failed as failed:
            _fail(self._fd, failed.kind, str(failed))
        except MemoryError:
            _fail(self._fd, "corrupt", "reading it takes more memory than a sound file system would need")
        except Exception as error:  # noqa: BLE001 - whatever a library raises for hostile bytes
            _fail(self._fd, "corrupt", f"it cannot be read: {words_of(error)}")

    def _found(self) -> list[Described]:
        if self._volumes is None:
            self._volumes = volumes(self._disk)
        return self._volumes

    def _list(self) -> Any:
        return [
            {"name": each.name, "size": each.size, "content": each.content.value, "trouble": each.trouble}
            for each in self._found()
        ]

    def _open(self, name: str) -> Any:
        described = next(each for each in self._found() if each.name == name)
        module = next(each for each, contents in _MODULES.items() if described.content in contents)
        if module not in self._modules:
            raise Failed("missing", module)
        volume = Volume(self._disk, described.pieces)
        if module == "pytsk3":
            self._system = Windows(self._modules[module], described.content, volume)
        else:
            self._system = Unix(self._modules[module], volume)
        return {"dirty": described.is_dirty}

    def _walk(
        self, path: list[str], *, depth: int, contents: bool, attributes: bool, links: bool, match: str | None
    ) -> Any:
        """Tell of the node at a path, and of those below it. depth: levels below; match: of names, others are silent

        links: a file that was told of already is told of as another name of it
        """
        assert self._system is not None
        where = _resolved(self._system, path)
        node = _at(self._system, where)
        told: dict[int, list[str]] = {}
        entered: set[int] = set()

        def tell(names: list[str], node: Node, facts: Facts) -> None:
            entry: dict[str, Any] = {"path": names, **facts.__dict__}
            if facts.kind == "symlink":
                entry["target"] = node.target()
            if links and facts.kind == "file" and facts.links > 1:
                if facts.id in told:
                    entry["same_as"] = told[facts.id]
                else:
                    told[facts.id] = names
            if attributes and "same_as" not in entry:
                entry["attributes"] = {name: value.hex() for name, value in node.attributes().items()}
            messages.send(self._fd, Kind.ENTRY, json.dumps(entry).encode())
            if not contents or facts.kind != "file" or "same_as" in entry:
                return
            try:
                for piece in node.content():
                    if isinstance(piece, int):
                        messages.send(self._fd, Kind.HOLE, messages.HOLE.pack(piece))
                    else:
                        messages.send(self._fd, Kind.DATA, piece)
            except (Hangup, BrokenPipeError, ConnectionResetError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001 - as in `do`
                messages.send(self._fd, Kind.END, words_of(error).encode("utf-8", "replace"))
            else:
                messages.send(self._fd, Kind.END)

        def visit(names: list[str], node: Node, depth: int) -> None:
            try:
                facts = node.facts()
                if not 0 <= facts.size < _MOST_SIZE:
                    self._problem(names, "its size is impossible")
                    return
                if match is None or (names and fnmatch.fnmatchcase(names[-1], match)):
                    tell(names, node, facts)
                else:
                    messages.send(self._fd, Kind.ALIVE)
                if facts.kind != "directory" or not depth:
                    return
                if facts.id in entered:
                    self._problem(names, "this directory was met before, under another name")
                    return
                if len(names) >= _MOST_DEPTH:
                    self._problem(names, f"there are more than {_MOST_DEPTH} directories inside of each other")
                    return
                entered.add(facts.id)
                for child in node.children():
                    if isinstance(child, str):
                        self._problem(names, child)
                    elif not _is_text(child[0]):
                        self._problem(names, f"the name of {child[0]!a}, which it holds, is not UTF-8")
                    else:
                        visit([*names, child[0]], child[1], depth - 1)
            except (Hangup, BrokenPipeError, ConnectionResetError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001 - as in `do`
                self._problem(names, words_of(error))

        visit([], node, depth)
        return {"path": where}

    def _problem(self, names: list[str], words: str) -> None:
        messages.send(self._fd, Kind.PROBLEM, json.dumps({"path": names, "words": words[:1000]}).encode())


def _is_text(name: str) -> bool:
    """Whether JSON can hold it."""
    return not any("\ud800" <= each <= "\udfff" for each in name)


def _at(system: FileSystem, where: list[str]) -> Node:
    node = system.root()
    for name in where:
        node = next(each[1] for each in node.children() if not isinstance(each, str) and each[0] == name)
    return node


def _resolved(system: FileSystem, path: list[str]) -> list[str]:
    """The real names of a path: links are followed within the file system. Raises Failed."""
    rest = [*reversed(path)]
    real: list[str] = []
    nodes = [system.root()]
    links = 0
    while rest:
        name = rest.pop()
        if name in {"", "."}:
            continue
        if name == "..":
            if real:
                real.pop()
                nodes.pop()
            continue
        shown = "/" + "/".join([*real, name])
        if nodes[-1].facts().kind != "directory":
            raise Failed("not-found", f"{shown}: what should be a directory is none")
        found = _child(system, nodes[-1], name)
        if found is None:
            raise Failed("not-found", f"{shown}: there is no such file")
        if found[1].facts().kind == "symlink":
            links += 1
            target = found[1].target()
            if links > _MOST_LINKS:
                raise Failed("not-found", f"{shown}: too many links lead to each other")
            if target.startswith("/"):
                real, nodes = [], nodes[:1]
            rest += reversed(target.split("/"))
            continue
        real.append(found[0])
        nodes.append(found[1])
    return real


def _child(system: FileSystem, node: Node, name: str) -> tuple[str, Node] | None:
    """By its exact name, else by one that differs in case, where the file system takes them for one."""

    def named() -> Iterator[tuple[str, Node]]:
        return (each for each in node.children() if not isinstance(each, str))

    for each in named():
        if each[0] == name:
            return each
    if system.ignores_case:
        return next((each for each in named() if each[0].casefold() == name.casefold()), None)
    return None
