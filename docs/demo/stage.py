"""Shows each command as a user would type it, runs it, and shows what it says."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

console = Console(highlight=False)


class Stage:
    """A directory to stand in and the `snapchain` command of this interpreter's environment."""

    def __init__(self, folder: Path, password: str) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SNAPCHAIN_PASSWORD": password, "COLUMNS": str(console.width)}
        if console.is_terminal:
            self.environment["FORCE_COLOR"] = "1"  # what snapchain says passes through here, not to a terminal
        self._program = Path(sys.executable).with_name("snapchain")

    def tell(self, text: str) -> None:
        """A heading of the story."""
        console.print(f"\n[bold cyan]{text}[/]")

    def snapchain(self, words: str) -> None:
        """Run one command with the words as typed and show what it prints."""
        self._prompt(f"snapchain {words}")
        began = time.monotonic()
        self._run([str(self._program), *shlex.split(words)], capture=False)
        console.print(f"  [dim]{time.monotonic() - began:.1f} s[/]")

    def snapchain_json(self, words: str) -> Any:
        """Run one command, show it, and return the object that --json prints."""
        self._prompt(f"snapchain {words} --json")
        said = self._run([str(self._program), *shlex.split(words), "--json"], capture=True)
        console.print(f"  {said.strip()}", soft_wrap=True, markup=False, style="dim")
        return json.loads(said)

    def prove(self, words: str) -> None:
        """Run a stock tool whose exit status is the proof."""
        self._prompt(words)
        said = self._run(shlex.split(words), capture=True)
        console.print(f"  [green]{said.strip()}[/]")

    def _prompt(self, words: str) -> None:
        console.print(f"[bold]$ {words}[/]", soft_wrap=True)
        sys.stdout.flush()

    def _run(self, argv: list[str], *, capture: bool) -> str:
        done = subprocess.run(
            argv,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE if capture else None,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"demo: {shlex.join(argv)} exited {done.returncode}")
        return done.stdout or ""
