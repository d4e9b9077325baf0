"""A guest of 70 bytes: its boot sector counts, and writes each number to one sector of every disk, in order.

    disk   sector 8 + (n mod 1024) holds n      vda before vdb before vdc

So after whatever has happened to it, each disk holds the newest 1024 numbers without a gap, and no disk is more than
one number ahead of the one after it.  A write that was lost, or came twice from two masters, shows.
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.guest.machine import Machine, Monitor
from tests.waiting import kill_process, wait_until

RING, FIRST = 1024, 8
_SECTOR = 512
_COUNTER = 0x8000
_DAP = 0x7C00 + 0x60
_BURST = 8
MIB = 1 << 20


def boot_sector(disks: int, burst: int = _BURST) -> bytes:
    """Real-mode code for a BIOS with INT 13h extensions. burst: numbers between two ticks of the timer, a power of 2"""
    code = bytes.fromhex("fa31c08ed88ec08ed0bc007cfb")  # cli; ds = es = ss = 0; sp = 0x7c00; sti
    loop = len(code)
    code += b"\x66\xff\x06" + struct.pack("<H", _COUNTER)  # inc dword [counter]
    code += b"\x66\xa1" + struct.pack("<H", _COUNTER)  # mov eax, [counter]
    code += b"\x66\x25" + struct.pack("<I", RING - 1)  # and eax, RING - 1
    code += b"\x66\x05" + struct.pack("<I", FIRST)  # add eax, FIRST
    code += b"\x66\xa3" + struct.pack("<H", _DAP + 8)  # mov [dap + 8], eax
    code += b"\xb2\x80"  # mov dl, 0x80: the first disk
    again = len(code)
    code += b"\xbe" + struct.pack("<H", _DAP)  # mov si, dap
    code += b"\xb8\x00\x43\xcd\x13"  # mov ax, 0x4300; int 0x13: write
    code += b"\x72\xfe"  # jc $: an I/O error stops it for ever
    code += b"\xfe\xc2\x80\xfa" + bytes([0x80 + disks])  # inc dl; cmp dl, 0x80 + disks
    code += b"\x75" + struct.pack("<b", again - len(code) - 2)  # jne again
    code += b"\xf6\x06" + struct.pack("<H", _COUNTER) + bytes([burst - 1])  # test byte [counter], burst - 1
    code += b"\x75" + struct.pack("<b", loop - len(code) - 2)  # jnz loop
    code += b"\xf4"  # hlt: until the timer ticks, 18 times a second; else it would take a whole processor
    code += b"\xeb" + struct.pack("<b", loop - len(code) - 2)  # jmp loop
    dap = struct.pack("<BBHHHQ", 16, 0, 1, _COUNTER, 0, 0)
    return (code.ljust(0x60, b"\0") + dap).ljust(510, b"\0") + b"\x55\xaa"


def make_disks(folder: Path, names: Sequence[str] = ("vda", "vdb", "vdc"), *, burst: int = _BURST) -> dict[str, Path]:
    """Its images; the first one boots."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, name in enumerate(names):
        raw = folder / f"{name}.raw"
        with raw.open("wb") as file:
            file.truncate(4 * MIB)
            if number == 0:
                file.write(boot_sector(len(names), burst))
        found[name] = folder / f"{name}.qcow2"
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(found[name])]
        subprocess.run(argv, check=True)
        raw.unlink()
    return found


def numbers_on(image: Path) -> list[int]:
    """The numbers on a disk that nobody has open, ascending."""
    with tempfile.NamedTemporaryFile(dir=image.parent if os.access(image.parent, os.W_OK) else None) as raw:
        argv = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), raw.name]
        subprocess.run(argv, check=True)
        data = Path(raw.name).read_bytes()
    ring = data[FIRST * _SECTOR : (FIRST + RING) * _SECTOR]
    return sorted(struct.unpack_from("<I", ring, at)[0] for at in range(0, len(ring), _SECTOR))


def check_numbers(images: Sequence[Path]) -> int:
    """Assert that no number is missing on any disk; the newest one on the first."""
    newest = []
    for image in images:
        found = [number for number in numbers_on(image) if number]
        assert found, f"{image} holds no number"
        whole = list(range(max(1, found[-1] - RING + 1), found[-1] + 1))
        assert found == whole, f"{image}: {sorted(set(whole) - set(found))[:5]} are missing"
        newest.append(found[-1])
    assert newest == sorted(newest, reverse=True), newest
    assert newest[0] - newest[-1] <= 1, newest
    return newest[0]


def counter(monitor: Monitor) -> int:
    """The number that the guest has come to, in its memory."""
    said: str = monitor.ask("human-monitor-command", **{"command-line": f"xp /1wx {_COUNTER:#x}"})
    return int(said.split(":")[1], 16)


def counts_on(monitor: Monitor) -> bool:
    """Whether the guest runs: it counts further. Raises AssertionError where it never does."""
    before = counter(monitor)
    return wait_until(lambda: counter(monitor) > before + 3)


@contextmanager
def run_directory() -> Iterator[Path]:
    """Set XDG_RUNTIME_DIR to a short path; the QEMUs that were started with sockets in it are ended with it."""
    with tempfile.TemporaryDirectory(prefix="sc") as folder:
        before = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            for pid in arrived(Path(folder)):
                kill_process(pid)
            if before is None:
                del os.environ["XDG_RUNTIME_DIR"]
            else:
                os.environ["XDG_RUNTIME_DIR"] = before


def arrived(folder: Path) -> list[int]:
    """The QEMUs that snapchain has started with sockets below a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if state != "Z" and b"qemu" in words[0] and any(os.fsencode(folder) in word for word in words):
                found.append(int(process.name))
    return found


class Counting:
    """The guest on its first host. folder: of its images and sockets; argv: further arguments of QEMU"""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str] = ("vda", "vdb", "vdc"),
        *,
        burst: int = _BURST,
        argv: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.disks = make_disks(folder / "images", names, burst=burst)
        self.machine = Machine(folder / "m", disks=self.disks, argv=argv)
        wait_until(lambda: counter(self.machine.monitor) > 3)

    @property
    def tops(self) -> list[Path]:
        """The active layers of its disks, in their order: of web1.qcow2, web1.1.qcow2 ... the last."""
        return [
            max(image.parent.glob(f"{image.stem}*.qcow2"), key=lambda path: (len(path.name), path.name))
            for image in self.disks.values()
        ]
