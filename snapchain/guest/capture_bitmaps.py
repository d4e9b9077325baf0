"""The dirty bitmaps of a capture: one begins at its instant, gets a name with its point, and replaces the older one.

Those of earlier captures are copied at the instant, for export: they themselves go on recording.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from snapchain.errors import Conflict, SnapchainError, Unavailable
from snapchain.guest.capture import BitmapSet, bitmap_name, parsed_name
from snapchain.guest.capture_record import CaptureInFlight, Monitor
from snapchain.guest.protocol import Bitmap, GuestDisk


def bitmaps_of(monitor: Monitor, nodes: Sequence[str]) -> dict[str, list[Bitmap]]:
    """The dirty bitmaps of some nodes."""
    found: dict[str, list[Bitmap]] = {node: [] for node in nodes}
    for each in monitor.execute("query-named-block-nodes", {"flat": True}):
        if each["node-name"] in found:
            found[each["node-name"]] = [
                Bitmap(
                    name=bitmap["name"],
                    granularity=bitmap["granularity"],
                    recording=bitmap["recording"],
                    persistent=bitmap["persistent"],
                    inconsistent=bitmap.get("inconsistent", False),
                    busy=bitmap["busy"],
                )
                for bitmap in each.get("dirty-bitmaps", ())
                if "name" in bitmap
            ]
    return found


def add_new(monitor: Monitor, plan: CaptureInFlight, disks: Sequence[GuestDisk]) -> None:
    """Begin a bitmap at each disk, all at once."""

    def add(*, persistent: bool) -> None:
        actions = [
            _action(
                "add",
                node=each.active,
                name=plan.new_bitmap,
                persistent=persistent and disk.active.image_format == "qcow2",
            )
            for each, disk in zip(plan.disks, disks, strict=True)
        ]
        monitor.execute("transaction", {"actions": actions})

    try:
        add(persistent=True)
    except Unavailable:
        raise
    except SnapchainError:
        # qcow2 of version 2 cannot store bitmaps: they last as long as this QEMU runs.
        add(persistent=False)


def copied(monitor: Monitor, plan: CaptureInFlight) -> list[BitmapSet]:
    """Copies of our bitmaps that stand still, for export: those themselves go on recording."""
    present = bitmaps_of(monitor, [disk.active for disk in plan.disks])
    actions: list[dict[str, Any]] = []
    found = []
    for disk in plan.disks:
        contexts: dict[str, str] = {}
        faults: dict[str, str] = {}
        for each in present[disk.active]:
            parsed = parsed_name(each.name)
            if parsed is None:
                continue
            fault = _fault(each)
            if fault is not None:
                faults[parsed[1]] = fault
                continue
            copy = f"{plan.copies}{len(contexts)}"
            actions += [
                _action("add", node=disk.active, name=copy, granularity=each.granularity, disabled=True),
                _action("merge", node=disk.active, target=copy, bitmaps=[each.name]),
            ]
            contexts[parsed[1]] = f"qemu:dirty-bitmap:{copy}"
        found.append(BitmapSet(contexts, {key: why for key, why in faults.items() if key not in contexts}))
    if actions:
        monitor.execute("transaction", {"actions": actions})
    return found


def copied_new(monitor: Monitor, plan: CaptureInFlight, number: int) -> str:
    """A copy of the bitmap of a disk that began with this capture, as it is now: its name. Raises Conflict."""
    node, name = plan.disks[number].active, plan.later(number)
    new = next((each for each in bitmaps_of(monitor, [node])[node] if each.name == plan.new_bitmap), None)
    if new is None or not new.recording:
        raise Conflict(
            "the dirty bitmap of the disk was removed or disabled by another program",
            subject=plan.disks[number].name,
            hint="run it again",
        )
    actions = [
        _action("add", node=node, name=name, granularity=new.granularity, disabled=True),
        _action("merge", node=node, target=name, bitmaps=[new.name]),
    ]
    monitor.execute("transaction", {"actions": actions})
    return name


def name_new(monitor: Monitor, plan: CaptureInFlight, names: Mapping[str, tuple[str, str]]) -> None:
    """See `Capture.name_bitmaps`."""
    present = bitmaps_of(monitor, [disk.active for disk in plan.disks])
    actions: list[dict[str, Any]] = []
    for disk in plan.disks:
        if disk.name not in names:
            continue
        new = next((each for each in present[disk.active] if each.name == plan.new_bitmap), None)
        if new is None:
            continue  # somebody removed it: the next time all is compared
        name = bitmap_name(*names[disk.name])
        old = next((each for each in present[disk.active] if each.name == name), None)
        if old is not None and _fault(old) is not None:
            monitor.execute("block-dirty-bitmap-remove", {"node": disk.active, "name": name})
            old = None
        if old is not None:  # the content is the same again
            actions.append(_action("clear", node=disk.active, name=name))
        else:
            how = {"granularity": new.granularity, "persistent": new.persistent}
            actions.append(_action("add", node=disk.active, name=name, **how))
        actions += [
            _action("merge", node=disk.active, target=name, bitmaps=[new.name]),
            _action("remove", node=disk.active, name=new.name),
        ]
    if actions:
        monitor.execute("transaction", {"actions": actions})


def drop_older(monitor: Monitor, plan: CaptureInFlight, names: Mapping[str, tuple[str, str]]) -> None:
    """See `Capture.drop_bitmaps`."""
    present = bitmaps_of(monitor, [disk.active for disk in plan.disks])
    actions = []
    for disk in plan.disks:
        place, content_id = names.get(disk.name, ("", ""))
        for each in present[disk.active]:
            parsed = parsed_name(each.name)
            if parsed is not None and parsed[0] == place and parsed[1] != content_id:
                actions.append(_action("remove", node=disk.active, name=each.name))
    if actions:
        monitor.execute("transaction", {"actions": actions})


def drop_unnamed(monitor: Monitor, plan: CaptureInFlight, nodes: set[str]) -> None:
    """The copies, and the bitmap that got no name: nothing was published that it goes back to."""
    active = [disk.active for disk in plan.disks if disk.active in nodes]
    for node, present in bitmaps_of(monitor, active).items():
        for each in present:
            if each.name == plan.new_bitmap or each.name.startswith(plan.copies):
                monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": each.name})


def _fault(bitmap: Bitmap) -> str | None:
    if bitmap.inconsistent:
        return "its dirty bitmap is inconsistent, since QEMU did not end in good order"
    if not bitmap.recording:
        return "its dirty bitmap was disabled by somebody"
    if bitmap.busy:
        return "its dirty bitmap is in use by somebody"
    return None


def _action(kind: Literal["add", "clear", "merge", "remove"], **data: object) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{kind}", "data": data}
