"""A nightly run that kills itself: python -m tests.guest.dying_night FOLDER NIGHT MODULE NAME before|after

MODULE has NAME as the night calls it.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from snapchain.ops.nightly import run as runner
from snapchain.ops.nightly.document import parse
from tests.guest.nights import EVENING
from tests.ops.nightly.night import Clock


def main(folder: Path, night: int, module: str, name: str, when: str) -> None:
    """Ends by SIGKILL at the first call."""
    holder = import_module(module)
    real = getattr(holder, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(holder, name, dying)
    path = folder / "nightly.toml"
    runner.run(parse(path.read_text(), path=path), path, clock=Clock(EVENING + timedelta(days=night)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
