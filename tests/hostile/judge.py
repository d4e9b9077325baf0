"""What may come of a case: an error of ours with its exit code, or exit 0 and the right bytes. The rest is told."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.child import LARGEST_RSS, LONGEST_OUTPUT, MiB, Outcome, Shell, Step
from tests.hostile.world import EXPECTED, Standing, World, standing

CLEAN = frozenset({0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11})
"""Exit codes of docs/guide/scripting.md that a command may end with; 1 is a bug."""


@dataclass(frozen=True)
class Plan:
    """A case that is set up. run: in the child; judge: in the parent, faults that only it can see"""

    run: Callable[[Shell], None]
    judge: Callable[[Outcome], Iterator[str]]


def faults(outcome: Outcome, world: World, outside: Standing) -> Iterator[str]:
    """What is wrong with any case. outside: how what nobody should touch stood before."""
    if outcome.hung:
        yield f"hung:\n{outcome.stacks}"
    elif outcome.signal:
        yield f"ended by signal {outcome.signal} after {outcome.cpu_seconds:.0f} s of work:\n{outcome.stacks}"
    if outcome.failure:
        yield f"broke:\n{outcome.failure}"
    if outcome.rss > LARGEST_RSS:
        yield f"took {outcome.rss // MiB} MiB of memory"
    for step in outcome.steps:
        yield from _faults_of(step, outcome)
    yield from outcome.found
    now = standing(world.case / "outside")
    if now != outside:
        changed = sorted(key for key in {*now, *outside} if now.get(key) != outside.get(key))
        yield f"what lies outside was changed: {changed}"
    if strange := {path.name for path in world.case.iterdir()} - EXPECTED:
        yield f"made beside everything: {sorted(strange)}"


def _faults_of(step: Step, outcome: Outcome) -> Iterator[str]:
    words = " ".join(step.words)
    if step.code is None:
        if not (outcome.hung or outcome.signal or outcome.failure):
            yield f"{words}: never ended"
        return
    if step.code not in CLEAN or "Traceback (most recent call last)" in step.err or "this is a bug" in step.err:
        yield f"{words}: exit {step.code}: {step.err[-3000:]}{step.out[-1000:]}"
    elif step.code and not step.err.strip() and "--json" not in step.words:
        yield f"{words}: exit {step.code} without a word"
    if len(step.out) + len(step.err) >= LONGEST_OUTPUT:
        yield f"{words}: printed without end"
    shown = step.err if step.words[0] == "serve-replica" else step.out + step.err  # the one's output is a stream
    if hostile := {character for character in shown if not character.isprintable() and character not in "\n\t\r"}:
        yield f"{words}: control characters were printed: {sorted(map(ascii, hostile))}"
    if "--json" in step.words:
        try:
            for line in step.out.splitlines():
                json.loads(line, parse_constant=_no_constant)
        except ValueError as error:
            yield f"{words}: what it printed is no JSON: {error}: {step.out[:500]!r}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def unlike(output: Path, truths: Collection[Path], image_format: str) -> bool:
    """Whether a restored file shows none of these raw files."""
    if image_format == "raw":
        shown = output.read_bytes()
        return all(shown != truth.read_bytes() for truth in truths)
    return not any(same(output, truth, image_format) for truth in truths)


def same(image: Path, truth: Path, image_format: str = "qcow2") -> bool:
    """By qemu-img compare, sizes too."""
    argv = ["qemu-img", "compare", "-f", image_format, "-F", "raw", str(image), str(truth)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    return done.returncode == 0 and "mismatch" not in done.stdout + done.stderr
