"""One verb under swaps: the names that it looks up, every attack on them, and what each attack did.

names = campaign.record()           # a run without a swap
for attack in campaign.attacks():   # every name, every kind, there to stay and back at once
    for finding in campaign.attack(attack): ...
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import pkgutil
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import snapchain.cli
from snapchain.host.openers import OpenFiles
from tests.swaps.attacks import OF_NAMES, OF_PARENTS, Attack, Kind, Swap, may_swap
from tests.swaps.supervisor import Call, Ended, destination, names_on_the_way, supervise
from tests.swaps.verbs import Scene, Verb, environment
from tests.swaps.world import World

_libc = ctypes.CDLL(None)
_NO_CHANGE = -1
_SHOW_STACK = signal.SIGUSR2
_RANDOM = re.compile(r"[0-9a-f]{8,}|(?<=-)[0-9]{5,}(?=[.]json)")


@dataclass(frozen=True, slots=True)
class Name:
    """One name that one call looks up in a directory of the user's."""

    number: int
    step: int
    call: str
    directory: str
    name: str
    is_last: bool
    looks: bool

    @property
    def label(self) -> str:
        """The same in each run: random digits are left out."""
        return _RANDOM.sub("#", f"{self.call} {self.directory}/{self.name}{'' if self.is_last else '/...'}")


@dataclass(frozen=True, slots=True)
class Finding:
    """harm: what the user could not have done alone; without it, what deserves a look."""

    verb: str
    attack: str
    where: str
    harm: bool
    what: str

    def __str__(self) -> str:
        return f"{'HARM' if self.harm else 'look'} {self.verb} [{self.attack}] at {self.where}: {self.what}"


def preload() -> None:
    """Import everything that a verb would: each run is forked."""
    for module in pkgutil.walk_packages(snapchain.__path__, "snapchain."):
        if not module.name.startswith(("snapchain.testing", "snapchain.__main__")):
            importlib.import_module(module.name)
    for name in ("sh", "rich.progress", "rich.table", "rich.console", "zstandard", "cryptography"):
        importlib.import_module(name)


class Campaign:
    def __init__(self, verb: Verb, place: Path) -> None:
        self.verb = verb
        self.world = World(place, verb.access)
        self.scene = Scene(self.world, self._plain)
        verb.make(self.scene)
        self.world.keep()
        self.world.make_outside([path.name for path in self.world.images.iterdir() if not path.name.startswith(".")])
        self.names: list[Name] = []
        self._below = str(self.world.user)

    def close(self) -> None:
        self.world.close()

    def record(self) -> Sequence[Finding]:
        """A run without a swap; what was found is wrong with the verb or with this test."""
        return list(self._run(None, self._observe))

    def attacks(self) -> Iterator[Attack]:
        """Every name that is looked up is attacked in its turn, and the same name in the same call in every way.

        A call that only looks, made 20 times of one name, has its share of the ways each time; any other call has all
        of them every time.
        """
        often = Counter(name.label for name in self.names)
        turn: Counter[str] = Counter()
        for name in self.names:
            kinds = OF_NAMES if name.is_last else OF_PARENTS
            ways = [(kind, back) for kind in kinds for back in (False, True)]
            if name.looks:
                share = max(2, -(-len(ways) // often[name.label]))
                first = turn[name.label] * share
                ways = [ways[number % len(ways)] for number in range(first, first + min(share, len(ways)))]
            turn[name.label] += 1
            for kind, back in ways:
                yield Attack(name.number, name.step, kind, back)

    def attack(self, attack: Attack, *, trace: bool = False) -> Iterator[Finding]:
        """What this attack did. trace: the first call that it leads outside is shown with its Python stack."""
        yield from self._run(attack, _Attacker(self, attack, trace=trace))

    def where(self, attack: Attack) -> str:
        place = str(self.world.place)
        for name in self.names:
            if (name.number, name.step) == (attack.number, attack.step):
                return name.label.replace(place + "/", "")
        return "?"

    def candidates(self, call: Call) -> list[tuple[str, str, bool]]:
        """The names that this call looks up and that the user may swap."""
        return [
            found
            for path in call.paths
            for found in names_on_the_way(path, below=self._below)
            if may_swap(found[0], found[1])
        ]

    def _observe(self, call: Call) -> None:
        found = self.candidates(call)
        if found:
            number = self.names[-1].number + 1 if self.names else 0
            self.names += [Name(number, step, call.name, *each, call.looks) for step, each in enumerate(found)]

    def _run(self, attack: Attack | None, on_call: Callable[[Call], None]) -> Iterator[Finding]:
        self.world.reset()
        for words in self.verb.first:
            ended = self._plain(self.verb.line(self.world, words))
            assert ended.status == 0, (words, (self.world.logs / "stderr").read_text())
        if self.verb.killed is not None:
            self._die()
        self.world.drain()
        ended = supervise(lambda: self._job(self.verb.line(self.world), self.verb.stdin), on_call)
        undone = on_call.finish() if isinstance(on_call, _Attacker) else True
        facts = [(fact.harm, fact.what) for fact in self.world.judge(by_hard_link=_is_hard(attack))]
        facts += self._judge_end(ended, undone=undone, attack=attack)
        name = "none" if attack is None else str(attack)
        where = "no call" if attack is None else self.where(attack)
        for harm, what in facts:
            yield Finding(self.verb.name, name, where, harm, what.replace(str(self.world.place) + "/", ""))

    def _judge_end(self, ended: Ended, *, undone: bool, attack: Attack | None) -> Iterator[tuple[bool, str]]:
        said = (self.world.logs / "stderr").read_text(errors="replace")
        out = (self.world.logs / "stdout").read_text(errors="replace")
        if ended.stuck is not None:
            yield True, f"hangs in {ended.stuck}"
            return
        # The user may let root read what they can read themselves.
        is_theirs = attack is not None and attack.kind is Kind.LINK_TO_READABLE
        if attack is None and ended.status not in self.verb.ends:
            yield True, f"ends with {ended.status} without a swap: {said.strip()}"
        if ended.status < 0 or ended.status == 1 or "Traceback" in said or "bug in snapchain" in said + out:
            last = said.strip().splitlines()[-1:] or [""]
            yield True, f"ends with {ended.status}: {last[0]}"
        elif ended.status and "error: " not in said and "error" not in out and ended.status not in (5, 10):
            yield True, f"no error is said with exit {ended.status}"
        elif ended.status and "hint: " not in said and ended.status not in (5, 10):
            yield False, f"no remedy is said with exit {ended.status}: {said.strip()}"
        wrong = self.world.problem(self.world.disk, self.scene.truth)
        if wrong is not None:
            yield undone and "planted" not in wrong and not is_theirs, f"exit {ended.status}, {wrong}"
        if ended.status == 0 and self.verb.check is not None:
            for each in self.verb.check(self.scene):
                yield "planted" not in each and not is_theirs, f"exit 0, {each}"

    def _die(self) -> None:
        assert self.verb.killed is not None
        dies_at = self.verb.dies_at(self.world)

        def kill(call: Call) -> None:
            if dies_at(call):
                os.kill(call.thread, 9)

        ended = supervise(lambda: self._job(self.verb.line(self.world, self.verb.killed[0]), None), kill)  # type: ignore[index]
        assert ended.status == -9, f"{self.verb.killed} was not killed: {ended}"

    def _plain(self, words: list[str], *, stdout: Path | None = None) -> Ended:
        """A command that nobody disturbs."""
        pid = os.fork()
        if pid == 0:
            status = 125
            try:
                status = self._job(words, None, stdout=stdout)
            finally:
                os._exit(status)
        return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), None)

    def _job(self, words: list[str], stdin: str | None, *, stdout: Path | None = None) -> int:
        """In a child: the command, with streams of its own."""
        try:
            faulthandler.register(_SHOW_STACK, file=2, all_threads=False)
            self._redirect(self.world.root / stdin if stdin else Path(os.devnull), stdout or self.world.logs / "stdout")
            os.environ.clear()
            os.environ.update(environment(self.world))
            os.chdir(self.world.root)
            _watch_looks_at_processes()
            status = self._command(words)
            sys.stdout.flush()
            sys.stderr.flush()
        except SystemExit as error:
            sys.stderr.flush()
            return error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001 - the judge looks for it
            traceback.print_exc()
            sys.stderr.flush()
            return 1
        return status

    def _command(self, words: list[str]) -> int:
        if self.verb.function is not None:
            self.verb.function(self.world)
            return 0
        return snapchain.cli.main(words)

    def _redirect(self, stdin: Path, stdout: Path) -> None:
        new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        for number, (path, flags) in enumerate(
            ((stdin, os.O_RDONLY), (stdout, new), (self.world.logs / "stderr", new))
        ):
            opened = os.open(path, flags, 0o600)
            os.dup2(opened, number)
            os.close(opened)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")


def _watch_looks_at_processes() -> None:
    """In a child: a look at /proc with the rights of somebody else would see no process but theirs."""
    look = OpenFiles.__init__

    def checked(self: OpenFiles) -> None:
        identity = (_libc.setfsuid(_NO_CHANGE), _libc.setfsgid(_NO_CHANGE))
        assert identity == (0, 0), f"looks at processes as {identity}"
        look(self)

    OpenFiles.__init__ = checked  # type: ignore[method-assign]


def _is_hard(attack: Attack | None) -> bool:
    return attack is not None and attack.kind in (Kind.HARD_LINK_SECRET, Kind.HARD_LINK_SHARED)


class _Attacker:
    """Does the swap before the call it is meant for, and undoes it before the next one where it is to."""

    def __init__(self, campaign: Campaign, attack: Attack, *, trace: bool) -> None:
        self._campaign = campaign
        self._trace = trace
        self._attack = attack
        self._number = -1
        self._swap: Swap | None = None
        self._undone: bool | None = None

    def __call__(self, call: Call) -> None:
        self._act(call)
        if self._trace and self._swap is not None and not call.looks:
            outside = f"{self._campaign.world.out}/"
            leads = [*(destination(path, follow=call.follows) for path in call.paths), *call.files]
            if any(path.startswith(outside) for path in leads):
                self._trace = False
                with suppress(OSError):
                    if Path(f"/proc/{call.thread}/comm").read_text().startswith("python"):
                        os.kill(call.thread, _SHOW_STACK)

    def _act(self, call: Call) -> None:
        if self._swap is not None and not (self._attack.back and self._undone is None):
            return
        found = self._campaign.candidates(call)
        if not found:
            return
        self._number += 1
        if self._swap is not None:
            self._undone = self._swap.undo()
        elif self._number == self._attack.number:
            directory, name, _ = found[min(self._attack.step, len(found) - 1)]
            self._swap = Swap(self._campaign.world, self._attack.kind, directory, name)

    def finish(self) -> bool:
        """After the run the old file is put back, where what was planted is still there. Whether that was so."""
        if self._swap is None:
            return True
        return self._swap.undo() if self._undone is None else self._undone
