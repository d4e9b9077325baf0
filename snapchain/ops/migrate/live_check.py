"""What keeps a running guest from moving, before anything is sent or started: devices, disks, and the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from snapchain.errors import Busy, Conflict, Unsupported
from snapchain.guest.machine_view import differences
from snapchain.guest.protocol import Definition, Guest, GuestDisk, State
from snapchain.host.service_unit import Service
from snapchain.model.convergence import Rules, Verdict, judge
from snapchain.ops.lease_notes import note_of
from snapchain.replica.stream.guest_messages import Moving

_MEMORY_RULES = Rules(rounds=40, stalled=10, growth=4.0, grace=3)
"""Rounds over the memory without --auto-converge; with it, QEMU throttles the guest a little more each round."""
_THROTTLED_RULES = Rules(rounds=120, stalled=120, growth=1000.0)
_MIRROR_PATIENCE = 20
"""Rounds in which a mirror may become level before a small rest is enough."""
_MIRROR_RULES = Rules(rounds=200, stalled=5, growth=4.0, grace=3)
_FIRST_PAUSE = 0.1
"""Seconds."""
_SHRINKS, _MARGIN = 0.7, 1.2
"""A round that leaves more than this share of the one before brings little; what is allowed then, beside the need."""
SMALL_REST = 1 << 20
"""Bytes, whatever the rate: that of a few pages of memory, or of a few clusters, says little."""
_OFFLINE = "shut the guest down, and migrate it with --offline"
_HARMLESS = ("empty", "CD-ROM", "firmware")
_QCOW2 = b"QFI\xfb"


def check_guest(guest: Guest, disks: Sequence[GuestDisk]) -> Definition:
    """Its definition. Raises Unsupported for what cannot move, Busy for what others do in it, Conflict when paused."""
    if guest.state() is not State.RUNNING:
        raise Conflict(
            f"the guest is not running: it is {guest.state().value}",
            subject=guest.name,
            hint="let it run; or migrate its disks with --offline or --paused",
        )
    if (note := note_of(guest.process())) is not None:
        raise Busy(
            note.describe(),
            subject=guest.name,
            hint="end that watch, which ends the lease; after the move the new host can take one of its own",
        )
    moves = {disk.name for disk in disks}
    for disk in guest.disks():
        if disk.name in moves and disk.obstacle is not None:
            raise Unsupported(f"the disk cannot move: {disk.obstacle}", subject=f"{guest.name}/{disk.name}")
        if disk.name not in moves and not disk.read_only and disk.left_out not in _HARMLESS:
            raise Unsupported(
                f"the guest can write to it, and it cannot be mirrored ({disk.left_out})",
                subject=f"{guest.name}/{disk.name}",
                hint=f"detach it; or {_OFFLINE}",
            )
    for activity in guest.activities():
        raise Busy(activity.says, subject=guest.name, hint="wait until it has ended, or end it")
    definition = guest.definition(with_secrets=True)
    if definition.immovable:
        raise Unsupported("; ".join(definition.immovable), subject=guest.name, hint=f"detach it; or {_OFFLINE}")
    return definition


def check_files(guest: Guest, definition: Definition) -> None:
    """Raises Unsupported for files besides the disks that cannot be taken along while the guest runs.

    QEMU sends firmware variables with the memory, to a file of the same size that is mapped as it is.
    """
    if any(file.role == "tpm" for file in definition.files):
        raise Unsupported(
            "it has a TPM, whose state a live migration does not take along", subject=guest.name, hint=_OFFLINE
        )
    for file in definition.files:
        if file.data.startswith(_QCOW2):
            raise Unsupported(
                "its firmware variables are in a qcow2 file, and only a raw one is taken along",
                subject=f"{guest.name}/{file.name}",
                hint=f"convert it: qemu-img convert -O raw; or {_OFFLINE}",
            )
    if lost := [words for words in definition.unreadable if words.startswith("firmware variables")]:
        raise Unsupported("; ".join(lost), subject=guest.name, hint=_OFFLINE)
    names = [file.name for file in definition.files]
    if len(set(names)) < len(names):
        raise Unsupported("two files of firmware variables have one name", subject=guest.name, hint=_OFFLINE)


def check_service(service: Service | None, *, subject: str) -> str | None:
    """What the user should know of the service that QEMU runs in. Raises Conflict where systemd would start it again.

    The files that stay here are read-only, but for root, as whom such a QEMU may run.
    """
    if service is None or service.restart == "no":
        return None
    if not service.restart:
        return (
            f"its QEMU runs in {service.name}, and systemd does not say whether it starts that again: see that it does "
            "not (Restart=no), or two hosts run the guest after the move"
        )
    raise Conflict(
        f"its QEMU runs in {service.name}, which systemd may start again when it ends (Restart={service.restart}): "
        "then two hosts would run the guest",
        subject=subject,
        hint=f"say Restart=no under [Service] in `systemctl edit --runtime {service.name}`, and run the migration "
        "again; `systemctl disable` it when the guest has moved",
    )


def check_destination(
    there: Moving,
    definition: Definition,
    *,
    version: tuple[int, int],
    view: Mapping[str, str],
    cpu: str,
    bytes_left: int,
    subject: str,
) -> None:
    """Raises Unsupported or Conflict for a host on which this guest would not find the machine that it has here.

    there: once the QEMU there has been started
    view: of the machine here (guest/machine_view.py); cpu: digest of the processor here
    """
    if there.machine != definition.machine:
        raise Unsupported(
            f"the machine type there is {there.machine}, and here {definition.machine}",
            subject=subject,
            hint="start the guest with a versioned machine type that both hosts have, such as -machine pc-q35-7.2",
        )
    their = tuple(int(part) for part in (there.version or "0.0").split(".")[:2])
    if their < version:
        raise Unsupported(
            f"QEMU there is {there.version}, older than here ({version[0]}.{version[1]})",
            subject=subject,
            hint="a guest moves to the same version or a newer one: upgrade QEMU there",
        )
    if found := differences(view, there.view):
        raise Unsupported(
            "the guest would find another machine: " + "; ".join(found),
            subject=subject,
            hint="plug or change it back here; or give --start-command, which starts the machine as it is now; or "
            + _OFFLINE,
        )
    check_cpu(there, cpu, is_hosts=uses_host_cpu(definition.argv or ()), subject=subject)
    check_room(there, bytes_left, subject=subject)


def check_cpu(there: Moving, cpu: str, *, is_hosts: bool, subject: str) -> None:
    """Raises Unsupported where the guest has the processor of its host, and the other host has another one."""
    if is_hosts and there.cpu != cpu:
        raise Unsupported(
            "the guest has the processor of this host (-cpu host), and the other host has another one",
            subject=subject,
            hint="start the guest with a CPU model that both hosts have, such as -cpu x86-64-v2",
        )


def check_room(there: Moving, bytes_left: int, *, subject: str) -> None:
    """Raises Conflict where the active layers have no room there."""
    if there.free < bytes_left:
        raise Conflict(
            f"{there.free} bytes are free there, and the guest's active layers have {bytes_left}",
            subject=subject,
            hint="make room there",
        )


def uses_host_cpu(argv: Sequence[str]) -> bool:
    """Whether the guest sees the processor that it runs on."""
    given = [value for word, value in pairwise(argv) if word in ("-cpu", "--cpu")]
    return any(value.split(",")[0] in ("host", "max") for value in given) and any("kvm" in word for word in argv)


def check_pause(
    *,
    max_downtime: float,
    switch: float,
    round_trip: float,
    dirty_rate: float | None,
    link_rate: float | None,
    auto_converge: bool,
    subject: str,
) -> float:
    """Seconds of a pause that are left for the last of the memory. Raises Conflict where the bound cannot be met.

    switch: seconds that the pause takes without that; round_trip: of a question to the destination
    dirty_rate: bytes of memory a second that the guest dirties; link_rate: bytes a second; None: not known
    """
    if switch >= max_downtime:
        raise Conflict(
            f"the switch alone takes about {switch:.3f} s ({round_trip:.3f} s for a question to the "
            f"destination), more than --max-downtime {max_downtime:g}",
            subject=subject,
            hint=f"allow more: --max-downtime {max(0.1, 2 * switch):.1f}",
        )
    if dirty_rate and link_rate and dirty_rate >= link_rate and not auto_converge:
        raise Conflict(
            f"the guest dirties {per_second(dirty_rate)} of memory, and the link carries {per_second(link_rate)}: "
            f"it would never be done within --max-downtime {max_downtime:g}",
            subject=subject,
            hint="--auto-converge slows the guest down until it is; or wait for a quieter hour, or give it more "
            "--bandwidth",
        )
    return max_downtime - switch


class MemoryWatch:
    """Whether rounds over the memory bring the pause nearer, and how long it may be now.

    QEMU pauses the guest as soon as the rest fits into what it may take.  So it may take little at first, and more
    only when another round has left hardly less: the pause is as short as the guest allows, and never over the limit.

    limit: seconds that are left for the last of the memory; allow: told how many of them QEMU may take, once it is more
    """

    def __init__(
        self, *, limit: float, max_downtime: float, auto_converge: bool, subject: str, allow: Callable[[float], None]
    ) -> None:
        self._limit, self._max_downtime, self._subject, self._allow = limit, max_downtime, subject, allow
        self._rules = _THROTTLED_RULES if auto_converge else _MEMORY_RULES
        self._left: list[int] = []
        self._seen = 0
        self.allowed = first_pause(limit)

    def look(self, *, round: int, left: int, dirty_rate: float, rate: float) -> None:
        """Take the bytes that a round has left; the rates are bytes a second. Raises Conflict, with the figures."""
        if round == self._seen or round < 2:
            return
        self._seen = round
        self._left.append(left)
        if self.allowed < self._limit and len(self._left) > 1 and left > _SHRINKS * self._left[-2]:
            needed = left / rate if rate else 0.0
            self.allowed = min(self._limit, max(2 * self.allowed, _MARGIN * needed))
            self._allow(self.allowed)
        verdict = judge(self._left, int(self._limit * rate), self._rules)
        if verdict.ends and left > self._limit * rate:
            raise Conflict(
                f"after {round} rounds {left} bytes of memory are left, the guest dirties "
                f"{per_second(dirty_rate)}, and the link carries {per_second(rate)}: a pause within "
                f"--max-downtime {self._max_downtime:g} is not in reach ({verdict.value})",
                subject=self._subject,
                hint="--auto-converge slows the guest down until it is; or allow a longer pause",
            )


def first_pause(limit: float) -> float:
    """Seconds that the last of the memory may take at first, of those that it may take at most."""
    return min(limit, _FIRST_PAUSE)


class MirrorWatch:
    """Whether the mirrors come to an end: each of them should once be level with the guest, which goes on writing.

    A round is over when as much was copied as was left at its beginning.  With a link that takes 80 ms for an answer
    and a guest that writes a little all the time, a mirror is never level.  The rest is small then, and is sent in a
    moment once the guest is paused.  libvirt cannot do that: it waits until all mirrors are level (`must_be_level`).
    """

    def __init__(self, *, subject: str, must_be_level: bool = False) -> None:
        self._subject, self._must_be_level = subject, must_be_level
        self._left: list[int] = []
        self._until = 0

    def look(self, done: int, total: int) -> bool:
        """Take the bytes that were copied, and of how many; whether that is near enough.

        Raises Conflict, with the figures, where it will never be.
        """
        if done < self._until:
            return False
        left = max(0, total - done)
        self._left.append(left)
        self._until = done + max(1, left)
        verdict = judge(self._left, 0, _MIRROR_RULES)
        if left <= SMALL_REST and not (self._must_be_level and verdict is Verdict.ROUNDS_USED):
            return len(self._left) >= _MIRROR_PATIENCE
        if verdict.ends:
            raise Conflict(
                f"the guest writes to its disks as fast as the link carries that: {left} bytes are left after "
                f"{len(self._left)} rounds of mirroring ({verdict.value})",
                subject=self._subject,
                hint="wait for a quieter hour, or raise --bandwidth",
            )
        return False


def per_second(rate: float) -> str:
    """A rate, for messages."""
    return f"{rate / (1 << 20):.1f} MiB/s"
