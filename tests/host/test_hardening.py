"""What a process that holds keys keeps from others. Each case in a process of its own: it cannot be undone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_LOOK = """
import ctypes, json, os, resource, sys
from pathlib import Path
from snapchain.host.process_limits import harden
os.umask({umask})
os.chdir(sys.argv[1])
if {user}:
    os.setgroups([])
    os.setresgid({user}, {user}, {user})
    os.setresuid({user}, {user}, {user})
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as after an exec
harden()
Path("new").write_text("")
print(json.dumps({{
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
    "umask": os.umask(0),
    "own": sorted(os.listdir("/proc/self/fd"))[:3],
    "readlink": os.readlink("/proc/self/fd/1") != "",
    "mounts": len(Path("/proc/self/mountinfo").read_bytes()) > 0,
}}))
"""


def hardened(place: Path, *, umask: int = 0o022, user: int = 0) -> Any:
    """What a process of this user finds about itself, which makes the file `new` in the directory."""
    argv = ["prlimit", "--core=unlimited", "--", sys.executable, "-c", _LOOK.format(umask=umask, user=user), str(place)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.root
def test_no_core_file_and_no_dump_of_root(tmp_path: Path) -> None:
    found = hardened(tmp_path)
    assert (found["core"], found["dumpable"]) == ([0, 0], 0)
    assert (found["own"], found["readlink"], found["mounts"]) == (["0", "1", "2"], True, True)


@pytest.mark.root
def test_other_users_leave_no_core_file_and_stay_visible_to_themselves(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    found = hardened(tmp_path, user=65534)
    assert (found["core"], found["dumpable"]) == ([0, 0], 1)


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o664), (0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_is_never_writable_for_everybody(tmp_path: Path, umask: int, mode: int) -> None:
    found = hardened(tmp_path, umask=umask)
    assert (found["umask"], (tmp_path / "new").stat().st_mode & 0o777) == (umask | 0o002, mode)


def test_the_command_is_hardened_before_it_asks_for_a_passphrase(tmp_path: Path) -> None:
    look = f"grep -i 'core file' /proc/$PPID/limits >{tmp_path}/limits; umask >{tmp_path}/umask; echo secret"
    words = ["init", str(tmp_path / "repo"), "--password-command", f'sh -c "{look}"']
    argv = ["prlimit", "--core=unlimited", "--", sys.executable, "-m", "snapchain", *words]
    subprocess.run(argv, check=True, capture_output=True, umask=0)
    assert (tmp_path / "limits").read_text().split()[4:6] == ["0", "0"]
    assert (tmp_path / "umask").read_text() == "0002\n"
