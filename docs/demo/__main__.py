"""`make demo`: the main job of snapchain on a real Linux disk image, told as the story of one week.

It stands under docs/ because it is documentation that runs: every command is shown as a user would type it, and the
README's tour is taken from what it prints. No server, no network, no KVM, no root.
"""

from __future__ import annotations

import importlib.util
import random
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from docs.demo.guest import Guest, linux_image
from docs.demo.stage import Stage, console
from snapchain.cli.quantities import duration, size

FOLDER = Path("demo-work")
DISK = "repo::web1/vda"
PASSWORD = "tuba glacier ninety otter"
OLD = 5


@dataclass(frozen=True)
class Day:
    """One generation: what happens to the guest's files."""

    story: str
    write: Mapping[str, Path]
    remove: Sequence[str] = ()


def week(files: Path) -> Iterator[Day]:
    """Each day's files, made when the day comes."""
    yield Day(
        "installs an application: the real files of pydantic and rich",
        sources("pydantic", "/srv/app") | sources("rich", "/srv/app"),
    )
    yield Day(
        "takes its first orders into an SQLite database, and gets a new motd",
        {"/var/lib/app/orders.db": database(files, 1), "/etc/motd": text(files, "motd", "day 3: the shop is open\n")},
    )
    yield Day(
        "has a good day: the database is written anew, twice as large",
        {"/var/lib/app/orders.db": database(files, 2), "/etc/motd": text(files, "motd", "day 4: business as usual\n")},
    )
    yield Day(
        "is upgraded: numpy's files come, rich's go, the database grows",
        sources("numpy", "/srv/app")
        | {"/var/lib/app/orders.db": database(files, 3), "/etc/motd": text(files, "motd", "day 5: new and shiny\n")},
        [f"/srv/app/rich/{name}" for name in sorted(path.name for path in folder_of("rich").glob("*.py"))],
    )
    yield Day(
        "is broken into: the motd says so, the orders are gone",
        {
            "/etc/motd": text(files, "motd", "your files are mine now\n"),
            "/var/lib/app/orders.db": text(files, "gone", "pay 3 bitcoin\n"),
        },
    )


def database(files: Path, day: int) -> Path:
    """A real SQLite database that grows: each day has all the rows of the days before."""
    path = files / f"orders-{day}.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table orders (id integer primary key, day integer, item text, note blob)")
        for past in range(1, day + 1):
            draw = random.Random(past)
            connection.executemany(
                "insert into orders (day, item, note) values (?, ?, ?)",
                ((past, f"item {number * past % 977}", draw.randbytes(200)) for number in range(20_000)),
            )
    connection.close()
    return path


def folder_of(package: str) -> Path:
    """Where an installed Python package lies."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"demo: the Python package {package} is not installed")
    return Path(spec.origin).parent


def sources(package: str, target: str) -> dict[str, Path]:
    """The real files of an installed Python package, as files of the guest."""
    folder = folder_of(package)
    wanted = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in {".py", ".so", ".json"})
    return {f"{target}/{package}/{path.relative_to(folder)}": path for path in wanted}


def text(files: Path, name: str, words: str) -> Path:
    """A small file with these words."""
    path = files / name
    path.write_text(words)
    return path


def main() -> None:
    """The whole story."""
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in ("images", "files", "truth"):
        (FOLDER / name).mkdir(parents=True)
    stage = Stage(FOLDER, PASSWORD)
    image, truth = FOLDER / "images" / "web1.qcow2", FOLDER / "truth"

    stage.tell("A disk: " + linux_image(image))
    guest = Guest(image, truth / "now.raw")

    stage.tell("A repository in a directory, encrypted with the passphrase in SNAPCHAIN_PASSWORD")
    stage.snapchain("init repo")
    stage.snapchain(f"ship images/web1.qcow2 {DISK} --label installed")
    guest.copy_to(truth / "1.raw")

    rows: list[tuple[str, int, int, int, float]] = []
    for number, day in enumerate(week(FOLDER / "files"), start=2):
        stage.tell(f"Day {number}: the guest {day.story}")
        stage.snapchain("snapshot images/web1.qcow2")
        changed = guest.change(write=day.write, remove=day.remove)
        started = time.monotonic()
        report = stage.snapchain_json(f"ship images/web1.qcow2 {DISK} --label day-{number}")
        rows.append((day.story, changed, report["bytes_read"], report["bytes_stored"], time.monotonic() - started))
        guest.copy_to(truth / f"{number}.raw")
    last = len(rows) + 1
    generations(rows)

    stage.tell("What the repository holds, and what the chain on this disk looks like")
    stage.snapchain("log repo")
    stage.snapchain("inspect images/web1.qcow2")

    stage.tell("Merge the chain here: what was overwritten is dropped, the root stays")
    stage.snapchain("merge images/web1.qcow2 --dry-run")
    stage.snapchain("merge images/web1.qcow2")
    stage.snapchain("inspect images/web1.qcow2")
    stage.prove("qemu-img compare -f qcow2 -F raw images/web1.qcow2 truth/now.raw")

    stage.tell("What did the intruder touch? Then get the day before back, and the newest")
    stage.snapchain(f"diff {DISK}@{last - 1} {DISK}@{last}")
    stage.snapchain(f"restore {DISK}@{OLD} old.qcow2")
    stage.prove(f"qemu-img compare -f qcow2 -F raw old.qcow2 truth/{OLD}.raw")
    stage.snapchain(f"restore {DISK}@latest newest.raw")
    stage.prove(f"qemu-img compare -f raw -F raw newest.raw truth/{last}.raw")

    stage.tell("Merge in the repository: keep the first point and the last two; records change, no data moves")
    stage.snapchain(f"merge {DISK} --keep-last 2 --keep-label installed")
    stage.snapchain("gc repo")
    stage.snapchain("log repo")
    stage.snapchain("verify repo --read-data")
    stage.snapchain(f"restore {DISK}@day-{OLD} again.raw")
    stage.prove(f"qemu-img compare -f raw -F raw again.raw truth/{OLD}.raw")
    console.print(f"  the motd of that day: [green]{guest.read('/etc/motd', disk=FOLDER / 'again.raw').strip()}[/]")

    spent = time.monotonic() - began
    console.print(
        f"\n[bold green]done in {duration(spent)}[/]; everything it made is in {FOLDER}/ (make clean removes it)"
    )


def generations(rows: Sequence[tuple[str, int, int, int, float]]) -> None:
    """What each day changed, and what that cost."""
    table = Table(title="\nEach day's change and what it cost to ship", title_style="bold", box=None)
    table.add_column("the guest")
    for heading in ("changed", "read", "stored", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for story, changed, read, stored, seconds in rows:
        table.add_row(story, size(changed), size(read), size(stored), duration(seconds))
    console.print(table)


if __name__ == "__main__":
    main()
