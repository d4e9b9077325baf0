"""`make demo`: the main job of snapchain on a real Linux disk image, told as a story of one week.

It stands under docs/ because it is documentation that runs: every command is shown as a user would type it, and the
README's tour is taken from what it prints. No server, no network, no KVM, no root.
"""

from __future__ import annotations

import importlib.util
import sqlite3
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("demo-work")
DISK = "repo::web1/vda"
PASSWORD = "correct horse battery staple"


@dataclass
class Day:
    """One generation: what happened to the guest, what that changed, what the repository took of it."""

    name: str
    story: str
    changed: int = 0
    shipped: int = 0
    seconds: float = 0.0
    point: int = 0


def database(folder: Path, day: int) -> Path:
    """A real SQLite database that grows: each day has all the rows of the day before."""
    path = folder / "orders.db"
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute("create table orders (id integer primary key, day integer, item text, note blob)")
        for past in range(1, day + 1):
            rows = ((past, f"item {n * past % 977}", bytes((n * past + k) % 251 for k in range(200))) for n in range(4000))
            connection.executemany("insert into orders (day, item, note) values (?, ?, ?)", rows)
    connection.close()
    return path


def sources(package: str, target: str) -> dict[str, Path]:
    """The real files of an installed Python package, as files of the guest."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"demo: the Python package {package} is not installed")
    folder = Path(spec.origin).parent
    wanted = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in {".py", ".so", ".json"})
    return {f"{target}/{package}/{path.relative_to(folder)}": path for path in wanted}


def text(folder: Path, name: str, words: str) -> Path:
    path = folder / name
    path.write_text(words)
    return path
