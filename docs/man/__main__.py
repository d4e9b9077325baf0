"""`make man`: writes the man pages, snapchain(1) and one for each verb, from the command line itself.

Names, summaries, options and examples come from the parser that typer builds; exit codes, variables and files from the
tables of docs/guide/scripting.md. Each fact is written once. click-man does not work here: typer has its own copy of
click under another name. Its pages would also lack examples, exit codes and files.

    python -m docs.man            writes docs/man/man1/
    python -m docs.man FOLDER     writes them there
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from rich.text import Text

from snapchain.cli import verbs
from snapchain.cli.app import command

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "man" / "man1"

# What else a reader of a verb's page may want.
RELATED: Mapping[str, Sequence[str]] = {
    "init": ("ship", "log"),
    "snapshot": ("ship", "merge", "doctor"),
    "ship": ("snapshot", "log", "restore", "send"),
    "send": ("receive", "sync", "ship"),
    "receive": ("send",),
    "sync": ("migrate", "send"),
    "migrate": ("sync", "send"),
    "serve-replica": ("send", "receive"),
    "guests": ("snapshot", "ship", "log", "doctor"),
    "log": ("inspect", "diff", "restore"),
    "inspect": ("log", "diff", "merge"),
    "diff": ("log", "inspect"),
    "restore": ("log", "verify"),
    "merge": ("gc", "hold", "doctor", "inspect"),
    "gc": ("merge", "verify"),
    "hold": ("release", "merge"),
    "release": ("hold", "merge"),
    "verify": ("gc", "restore"),
    "nightly": ("ship", "merge", "gc", "verify"),
    "watch": ("ship", "nightly", "merge", "sync"),
    "doctor": ("merge", "snapshot", "restore"),
}

DESCRIPTION = """\
A virtual machine's disk is a stack of qcow2 overlays. snapchain seals, ships, merges and restores the layers of that
stack. A destination keeps points of a disk: a repository (a directory or an S3 bucket, deduplicated, compressed and
encrypted), or a replica (a plain qcow2 chain on another host, which stock QEMU boots).

Every command that changes something takes --dry-run, and every command takes --json. Progress, notes and errors go to
stderr. Ctrl-C, SIGTERM and SIGHUP leave everything as good as before the command."""
EXAMPLES = (
    "snapchain init /backup",
    "snapchain snapshot /images/web1.qcow2",
    "snapchain ship /images/web1.qcow2 /backup::web1/vda",
    "snapchain log /backup",
    "snapchain restore /backup::web1/vda@yesterday old.qcow2",
    "snapchain merge /images/web1.qcow2 --dry-run",
)


# ---- roff


def plain(markup: str | None) -> str:
    """A help text without rich's markup."""
    return Text.from_markup(markup or "").plain


def literal(text: str) -> str:
    """Text that roff shows as it is, and that can be copied."""
    for character, name in {"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti"}.items():
        text = text.replace(character, name)
    return "\\&" + text if text.startswith((".", "\\(aq")) else text


def prose(text: str) -> str:
    """A paragraph on a line: options and what stands in backticks in bold."""
    parts = re.split(r"(`[^`]+`|(?<![\w-])--?[A-Za-z][\w-]*)", " ".join(text.split()))
    line = "".join(
        f"\\fB{literal(part.strip('`'))}\\fR" if at % 2 else literal_prose(part) for at, part in enumerate(parts)
    )
    return "\\&" + line if line.startswith((".", "'")) else line


def literal_prose(text: str) -> str:
    """As `literal`, with hyphens that remain hyphens."""
    return literal(text).removeprefix("\\&").replace("\\-", "-")


def tagged(tag: str, text: str) -> str:
    return f".TP\n{tag}\n{prose(text)}\n"


# ---- what the pages are made of


def version() -> str:
    project: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return project


def table(title: str) -> list[list[str]]:
    """The rows of a table of scripting.md."""
    text = (ROOT / "docs" / "guide" / "scripting.md").read_text().split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)] for line in lines[2:]]


def metavar(param: Any) -> str:
    """What stands for a parameter's value; '' for a flag."""
    if getattr(param, "is_flag", False):
        return ""
    if param.metavar:
        return str(param.metavar)
    kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(each.value) for each in kind)
    return "N" if kind in {int, float} else str(param.name).upper()


def arguments(command: Any) -> Iterator[Any]:
    return (param for param in command.params if param.param_type_name == "argument")


def options(command: Any) -> Iterator[Any]:
    return (param for param in command.params if param.param_type_name == "option" and not param.hidden)


# ---- sections


def head(name: str, sentence: str) -> str:
    title = literal(name.upper())
    sentence = sentence[:1].lower() + sentence[1:].removesuffix(".")
    return (
        f'.\\" Made by `make man` from the command line. Change the help texts, not this file.\n'
        f'.TH {title} 1 "" "snapchain {version()}" "snapchain"\n'
        f".SH NAME\n{literal(name)} \\- {literal_prose(sentence)}\n"
    )


def synopsis(name: str, command: Any) -> str:
    words = [metavar(param) for param in arguments(command)]
    line = " ".join(f"\\fI{literal(word)}\\fR" for word in words)
    return f".SH SYNOPSIS\n\\fBsnapchain {literal(name)}\\fR [\\fIoptions\\fR] {line}".rstrip() + "\n"


def description(command: Any) -> str:
    paragraphs = [each for each in plain(command.help).split("\n\n") if each.strip()]
    return ".SH DESCRIPTION\n" + ".PP\n".join(prose(each) + "\n" for each in paragraphs)


def option_list(command: Any) -> str:
    """The arguments, then the options, under the headings that --help has."""
    text = ".SH OPTIONS\n"
    for param in arguments(command):
        text += tagged(f"\\fI{literal(metavar(param))}\\fR", plain(param.help))
    panels: dict[str, list[Any]] = {}
    for param in options(command):
        panels.setdefault(getattr(param, "rich_help_panel", None) or "", []).append(param)
    for panel, params in panels.items():
        text += f".SS {literal(panel)}\n" if panel else ""
        for param in params:
            names = ", ".join(f"\\fB{literal(name)}\\fR" for name in param.opts)
            value = metavar(param)
            text += tagged(f"{names} \\fI{literal(value)}\\fR" if value else names, plain(param.help))
    return text + tagged("\\fB\\-h\\fR, \\fB\\-\\-help\\fR", "Show a short help and exit.")


def configuration() -> str:
    """What a file for `nightly` holds: the example and the table of fields of the guide."""
    text = (ROOT / "docs" / "guide" / "nightly.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    lines = "".join(f"{literal(line) or '.sp'}\n" for line in example.splitlines())
    fields = re.findall(r"^\| (\S+) \| (.*) \|$", text.split("\n## Fields\n", 1)[1].split("\n## ", 1)[0], re.MULTILINE)
    rows = [
        tagged(f"\\fB{literal(where.strip('`'))}\\fR", names)
        for where, names in fields
        if where not in {"where", "---"}
    ]
    return f".SH CONFIGURATION\n{prose('A TOML file, such as:')}\n.PP\n.EX\n{lines}.EE\n.PP\n" + (
        prose("Every field, with its default in parentheses:") + "\n" + "".join(rows)
    )


def exit_status(name: str) -> str:
    text = ".SH EXIT STATUS\n"
    for code, kind, meaning in table("Exit codes"):
        if code == "10" and name not in {"nightly", "doctor", "merge", "restore", ""}:
            continue
        text += tagged(f"\\fB{code}\\fR", f"{kind}: {meaning}" if kind else meaning)
    return text


def examples(command: Any) -> str:
    lines = [line.strip() for line in plain(command.epilog).splitlines()[1:] if line.strip()]
    return ".SH EXAMPLES\n.EX\n" + "".join(f"{literal(line)}\n" for line in lines) + ".EE\n"


def concerns(row: str, name: str, command: Any) -> bool:
    """Whether a variable or a file concerns a verb."""
    words = " ".join([*(metavar(param) for param in arguments(command))])
    opts = {each for param in options(command) for each in param.opts}
    at_destination = "DEST" in words or "ADDRESS" in words or name in {"nightly", "guests"}
    wanted = {
        "SNAPCHAIN_PASSWORD": "--password-file" in opts or name == "nightly",
        "SNAPCHAIN_IMAGE_DIRS": "--image-dir" in opts,
        "SNAPCHAIN_PACK_SIZE": "--pack-size" in opts or (name == "merge"),
        "SNAPCHAIN_COMPRESSION": "--compression" in opts or name == "watch",
        "SNAPCHAIN_SSH": at_destination and name not in {"init", "gc"},
        "SNAPCHAIN_REMOTE": at_destination and name not in {"init", "gc"},
        "AWS_": at_destination and name not in {"send", "sync", "migrate"},
        "LIBVIRT_": name in {"snapshot", "merge", "restore", "doctor", "nightly"}
        or "--domain" in opts
        or name == "guests",
        ".snapchain-layer": "IMAGE" in words or name in {"merge", "hold", "release", "nightly", "watch", "doctor"},
        ".snapchain-merge": name in {"merge", "doctor", "nightly", "watch"},
        "records.key": name in {"merge", "doctor", "nightly", "snapshot", "watch"},
        "/repositories/": at_destination and name not in {"send", "sync", "migrate"},
        "/sent/": name in {"ship", "send", "sync", "migrate", "nightly", "watch", "verify"},
        "/.cache/": at_destination and name not in {"send", "sync", "migrate"},
        "/nightly/": name == "nightly",
    }
    return next((wanted[key] for key in wanted if key in row), True)


def described(heading: str, rows: Sequence[Sequence[str]]) -> str:
    """ENVIRONMENT or FILES."""
    entries = [
        tagged(f"\\fB{literal(name.replace('`', ''))}\\fR", meaning[:1].upper() + meaning[1:]) for name, meaning in rows
    ]
    return f".SH {heading}\n" + "".join(entries) if entries else ""


def see_also(names: Sequence[str]) -> str:
    pages = ["snapchain", *(f"snapchain-{name}" for name in names)]
    return ".SH SEE ALSO\n" + ",\n".join(f"\\fB{literal(page)}\\fR(1)" for page in [*pages, "qemu-img"]) + "\n"


# ---- pages


def verb_page(name: str) -> str:
    found: Any = command(name)
    variables, files = (
        [row for row in table(title) if concerns(row[0], name, found)] for title in ("Environment", "Files")
    )
    return (
        head(f"snapchain-{name}", verbs.VERBS[name].summary)
        + synopsis(name, found)
        + description(found)
        + option_list(found)
        + (configuration() if name == "nightly" else "")
        + exit_status(name)
        + examples(found)
        + described("ENVIRONMENT", variables)
        + described("FILES", files)
        + see_also(RELATED.get(name, ()))
    )


def main_page() -> str:
    text = head("snapchain", "ship, merge and restore the snapshot chains of QEMU disks")
    text += ".SH SYNOPSIS\n\\fBsnapchain\\fR \\fIverb\\fR [\\fIoptions\\fR] \\fIarguments\\fR\n.SH DESCRIPTION\n"
    text += ".PP\n".join(f"{prose(each)}\n" for each in DESCRIPTION.split("\n\n"))
    text += ".SH VERBS\n"
    for group, summaries in verbs.GROUPS.items():
        if group:
            text += f".SS {literal(group)}\n"
            text += "".join(tagged(f"\\fB{literal(name)}\\fR", sentence) for name, sentence in summaries.items())
    text += ".SH ADDRESSES\n" + ".PP\n".join(f"{prose(line)}\n" for line in verbs.ADDRESSES.split("\n"))
    text += ".SH OPTIONS\n"
    for names, sentence in verbs._OPTIONS.items():
        text += tagged(", ".join(f"\\fB{literal(name)}\\fR" for name in names.split(", ")), sentence)
    text += exit_status("") + ".SH EXAMPLES\n.EX\n" + "".join(f"{literal(line)}\n" for line in EXAMPLES) + ".EE\n"
    text += described("ENVIRONMENT", table("Environment")) + described("FILES", table("Files"))
    return text + see_also(list(verbs.VERBS))


def pages() -> dict[str, str]:
    """File name -> text."""
    return {"snapchain.1": main_page()} | {f"snapchain-{name}.1": verb_page(name) for name in verbs.VERBS}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for path in folder.glob("*.1"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
