"""Hostile peers, stores, records and images, from a seed: each case in a process of its own, judged by how it ends.

    python -m tests.hostile --seed 1 --count 10000            all kinds in turn
    python -m tests.hostile --kind peers --seed 7 --count 1   one case again
    python -m tests.hostile --corpus --count 0                those that once found something (corpus.toml)

A case must end with an error of ours and its exit code, or with exit 0 and the right bytes; in 400 MiB of memory; and
with nothing changed that it was not about. Exit code 1 when any did not.
"""

from __future__ import annotations

from tests.hostile import clock

clock.install()  # before snapchain is imported

import argparse  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import pkgutil  # noqa: E402
import random  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import tomllib  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

from tests.hostile import child, images, peers, records, stores  # noqa: E402
from tests.hostile.judge import Plan, faults  # noqa: E402
from tests.hostile.world import World, build, standing  # noqa: E402

KINDS: dict[str, Callable[[World, random.Random], Plan]] = {
    "peers": peers.plan,
    "stores": stores.plan,
    "s3": stores.plan_s3,
    "records": records.plan,
    "images": images.plan,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description="Cases of hostile input, by seed.")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS))
    parser.add_argument("--seed", type=int, default=1, help="of the first case; each next one has the next number")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--corpus", action="store_true", help="first the cases of corpus.toml")
    parser.add_argument("--keep", type=Path, help="a directory for the world; stays afterwards, and is used again")
    parser.add_argument("--verbose", action="store_true")
    asked = parser.parse_args(arguments)
    kinds = asked.kind or list(KINDS)
    root = asked.keep or Path(tempfile.mkdtemp(prefix="snapchain-hostile-"))
    try:
        load()
        cases = [*_corpus(kinds)] if asked.corpus else []
        cases += [(kinds[number % len(kinds)], number) for number in range(asked.seed, asked.seed + asked.count)]
        return _run(_world(root.absolute(), again=bool(asked.keep)), cases, verbose=asked.verbose)
    finally:
        if not asked.keep:
            shutil.rmtree(root)


def _world(root: Path, *, again: bool) -> World:
    if again and (root / "made").exists():
        return World(root)
    world = build(root)
    peers.record(world)
    (root / "made").touch()
    return world


def _corpus(kinds: Sequence[str]) -> Iterator[tuple[str, int]]:
    for case in tomllib.loads((Path(__file__).parent / "corpus.toml").read_text()).get("case", []):
        if case["kind"] in kinds:
            yield case["kind"], case["seed"]


def _run(world: World, cases: Sequence[tuple[str, int]], *, verbose: bool) -> int:
    begun = child.now()
    largest, bad = 0, 0
    ends: Counter[str] = Counter()
    for done, (kind, number) in enumerate(cases):
        if done and done % 250 == 0:
            print(f"{done} of {len(cases)}, {child.now() - begun:.0f} s", file=sys.stderr, flush=True)
        outcome, found = one(world, kind, number)
        largest = max(largest, outcome.rss)
        ends.update(f"{kind} {'done' if step.code == 0 else step.code}" for step in outcome.steps[:1])
        if verbose:
            for step in outcome.steps:
                print(f"{kind} {number}: {' '.join(step.words)}: {step.code} {step.err[:300]!r}")
        if found:
            bad += 1
            print(f"FAULT in {kind} {number}: python -m tests.hostile --kind {kind} --seed {number} --count 1")
            for each in found:
                print("    " + each.strip().replace("\n", "\n    "))
            sys.stdout.flush()
    print(f"{len(cases)} cases, {bad} faults, {child.now() - begun:.0f} s, {largest // child.MiB} MiB at most")
    print("first commands ended: " + ", ".join(f"{end} {times}" for end, times in sorted(ends.items())))
    return 1 if bad else 0


def one(world: World, kind: str, number: int) -> tuple[child.Outcome, list[str]]:
    """One case, and what was wrong with its end."""
    draw = random.Random(f"{kind} {number}")
    plan = KINDS[kind](world, draw)
    outside = standing(world.case / "outside")
    notes = world.root / "notes"
    if notes.exists():
        shutil.rmtree(notes)
    outcome = child.run(plan.run, notes)
    return outcome, [*faults(outcome, world, outside), *plan.judge(outcome)]


def load() -> None:
    """Import and build what commands import and build, so that children need not."""
    import rich
    import typer.main
    from pydantic import BaseModel

    import snapchain

    for package in (snapchain, rich):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__") and not re.search(r"testing|_windows|_win32|jupyter", module.name):
                importlib.import_module(module.name)
    for name in ("boto3.session", "botocore.httpsession", "s3transfer.manager", "email.parser"):
        importlib.import_module(name)
    waiting = [BaseModel]
    while waiting:
        model = waiting.pop()
        waiting += model.__subclasses__()
        if model.__module__.startswith("snapchain"):
            model.model_rebuild()
    build = typer.main.get_command
    known: dict[int, object] = {}

    def kept(made: typer.Typer) -> object:
        # A child has the whole command line at once, whatever part of it a command would build for itself.
        if id(made) not in known:
            known[id(made)] = build(made)
        return known[id(made)]

    typer.main.get_command = kept  # type: ignore[assignment]
    program = importlib.import_module("snapchain.cli.app")
    kept(program.app)
    for name in importlib.import_module("snapchain.cli.verbs").VERBS:
        program.command(name)
    gc.collect()


if __name__ == "__main__":
    sys.exit(main())
