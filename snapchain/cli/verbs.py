"""All verbs in the groups of --help, the words that people come with instead, and the page that --help prints.

The table is all that `snapchain --help` and the completion of verbs need: a verb's file is loaded when it runs.
"""

from __future__ import annotations

from typing import NamedTuple

from snapchain.errors import InvalidInput

__all__ = ["ADDRESSES", "ALIASES", "GROUPS", "SUMMARY", "VERBS", "Verb", "check_verb", "help_page"]


class Verb(NamedTuple):
    """One verb. module: its file in snapchain.cli; summary: a sentence, the same as in the module's docstring."""

    module: str
    group: str
    summary: str


GROUPS: dict[str, dict[str, str]] = {
    "Protect": {
        "snapshot": "Seal the top of a chain, or all disks of a guest, and put fresh overlays on.",
        "ship": "Send what a destination lacks, and publish a point.",
        "nightly": "Snapshot, ship, merge, collect and verify all that a configuration names.",
        "watch": "Keep destinations close behind a running guest.",
    },
    "Get back": {
        "restore": "Write a point to a new file, a device or stdout, or as a whole chain.",
        "serve": "Serve points as read-only block devices, over NBD.",
        "files": "List, show, get and find single files of a point or an image.",
        "mount": "Show every point of a destination as a raw file, by FUSE.",
    },
    "Look": {
        "guests": "List the guests of this host, their disks, and what protects them.",
        "status": "Show how disks and guests stand: newest points, their age, what is wrong.",
        "log": "List the points of a destination.",
        "stats": "Show what a destination stores: by kind, by disk, and what each point added.",
        "inspect": "Show what each layer of a chain holds, drawn to scale.",
        "diff": "List the bytes that differ between two points or images.",
        "verify": "Check the records of a destination, and a share of the data.",
    },
    "Move": {
        "sync": "Make a replica ready for a live migration of the guest.",
        "migrate": "Move a guest to another host: while it runs, or its disks when it does not.",
        "failover": "Take guests over whose host is gone.",
        "failback": "Move a guest that was taken over back to its old host.",
        "fence": "Keep a guest from running here that another host has taken over.",
        "retire": "Say that a destination of a guest never comes back.",
    },
    "Keep small": {
        "merge": "Make one layer of several, in a chain of files or at a destination.",
        "forget": "Drop points by number, label or time, by rules, or whole disks and guests.",
        "gc": "Delete data that no point needs.",
        "hold": "Keep a layer's file, or a point, until it is released.",
        "release": "Remove a hold.",
    },
    "Set up, repair": {
        "init": "Make a repository.",
        "key": "List, add, change and remove the passphrases of a repository.",
        "repair": "Store again what a repository has lost, from where it still is.",
        "rename": "Give a disk or a guest of a repository another name.",
        "copy": "Copy the points that another repository lacks.",
        "doctor": "Finish or undo what interrupted commands left, and thaw guests.",
        "send": "Send a chain to a replica, or as a stream to stdout.",
        "receive": "Receive a stream from stdin into a replica.",
    },
    "": {  # not for people, and not in --help
        "serve-replica": "Answer the ssh of a sender on the replica's host.",
    },
}

VERBS = {
    name: Verb({"release": "hold"}.get(name, name).replace("-", "_"), group, summary)
    for group, verbs in GROUPS.items()
    for name, summary in verbs.items()
}

ALIASES = {
    "backup": "ship", "upload": "ship", "push": "ship",
    "seal": "snapshot", "snap": "snapshot", "freeze": "snapshot",
    "list": "log", "ls": "log", "snapshots": "log", "points": "log", "history": "log",
    "domains": "guests", "vms": "guests", "machines": "guests",
    "usage": "stats", "du": "stats", "size": "stats", "space": "stats",
    "info": "inspect", "show": "inspect", "map": "inspect",
    "heal": "repair", "check": "verify", "fsck": "verify", "scrub": "verify",
    "compare": "diff",
    "prune": "forget", "rm": "forget", "remove": "forget", "delete": "forget", "destroy": "forget", "expire": "forget",
    "commit": "merge", "flatten": "merge", "compact": "merge", "rebase": "merge",
    "cleanup": "gc", "clean": "gc", "vacuum": "gc",
    "convert": "restore", "extract": "restore", "export": "restore", "download": "restore", "recover": "restore",
    "pin": "hold", "unpin": "release",
    "nbd": "serve", "fuse": "mount", "browse": "mount",
    "replicate": "send", "mirror": "copy", "cp": "copy", "clone": "copy",
    "passwd": "key", "password": "key", "passphrase": "key", "keys": "key",
    "mv": "rename", "create": "init", "unlock": "doctor", "cron": "nightly", "move": "migrate",
}  # fmt: skip
"""A word that people know from other programs -> the verb that does it here."""

_NOTES = {
    "prune": "`snapchain forget DEST --keep-last 7` drops points; `snapchain gc DEST` then frees their space",
    "convert": "`snapchain restore` writes a point as qcow2 or raw; to convert an image file, use `qemu-img convert`",
    "rm": "`snapchain forget DEST::DISK@3` drops a point, `snapchain forget DEST::DISK --all-points` a whole disk",
}
_NOTES |= dict.fromkeys(("expire",), _NOTES["prune"])
_NOTES |= dict.fromkeys(("remove", "delete", "destroy"), _NOTES["rm"])

_OPTIONS = {
    "--version": "Print the version.",
    "--install-completion": "Install completion for the current shell.",
    "--show-completion": "Print the completion for the current shell, to copy or to change it.",
    "-h, --help": "Print this page; after a verb, the verb's.",
}
ADDRESSES = """\
An ADDRESS is the path of an image, or DEST::DISK[@POINT].
DEST is a repository (a directory, or s3://bucket/prefix) or a replica (ssh://[user@]host/path or dir:/path).
DISK is a name such as web1/vda.
POINT is latest, a number, a label, or a time: RFC 3339, or a local date and time. A date such as 2026-11-30, today or \
yesterday means the end of that day. A time means the newest point not after it.
The path of an existing file is that image, even with '::' in it; ./a::b is always a path."""
SUMMARY = "Ship, merge and restore the snapshot chains of QEMU disks."
_EXIT_CODES = """\
0 done, 2 wrong request, 3 not found, 4 conflict, 5 corrupt, 6 unsupported, 7 unavailable, 8 a program failed, 9 busy, \
10 partly failed, 11 the output could not be written, 129 and 130 interrupted."""
_WIDEST = 100
"""Columns: longer lines are hard to read."""


def check_verb(word: str) -> None:
    """Raises InvalidInput for a word that is no verb, with the verb that is probably meant."""
    if word in VERBS:
        return
    meant = ALIASES.get(word.lower())
    if meant is None:
        from difflib import get_close_matches

        names = [*(name for name, verb in VERBS.items() if verb.group), *ALIASES]
        near = get_close_matches(word.lower(), names, n=1)
        meant = ALIASES.get(near[0], near[0]) if near else None
    if meant is None:
        raise InvalidInput("there is no such verb", subject=word, hint="`snapchain --help` lists all verbs")
    raise InvalidInput(
        f"did you mean `snapchain {meant}`? {VERBS[meant].summary}",
        subject=word,
        hint=_NOTES.get(word.lower(), f"snapchain {meant} --help"),
    )


def help_page(*, width: int, bold: bool) -> str:
    """The page of `snapchain --help`, in lines of `width` columns at most. bold: titles stand out on a terminal."""
    import textwrap

    width = max(40, min(width, _WIDEST))

    def title(text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if bold else text

    def rows(entries: dict[str, str]) -> list[str]:
        longest = max(map(len, _OPTIONS if entries is _OPTIONS else (n for n, verb in VERBS.items() if verb.group)))
        return [
            textwrap.fill(text, width, initial_indent=f"  {name:<{longest}}  ", subsequent_indent=" " * (longest + 4))
            for name, text in entries.items()
        ]

    def prose(text: str) -> list[str]:
        return [
            textwrap.fill(line, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
            for line in text.split("\n")
        ]

    lines = [f"{title('Usage:')} snapchain [OPTIONS] VERB [ARGUMENTS]...", ""]
    lines += [f"  {SUMMARY}", ""]
    for group, verbs in GROUPS.items():
        if group:
            lines += [title(group), *rows(verbs), ""]
    lines += [title("Options"), *rows(_OPTIONS), ""]
    lines += [title("Addresses"), *prose(ADDRESSES), ""]
    lines += [title("Exit codes"), *prose(_EXIT_CODES)]
    return "\n".join(lines) + "\n"
