"""A watch in Prometheus' text format: how far behind each destination is, in seconds and in bytes.

A watch that died leaves its last file, in which the times of its last round and of what destinations hold grow old.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from snapchain.ops import exposition
from snapchain.ops.exposition import Family, Labels
from snapchain.ops.watch.run import RoundReport


def encode(report: RoundReport) -> bytes:
    """The exposition of the state after a round. Every series has the guest's name as label `guest`."""
    return exposition.encode(_families(report))


def _families(report: RoundReport) -> Iterator[Family]:
    own = {"guest": report.guest}
    yield Family("watch_round_timestamp_seconds", "When the last round began.", [(own, report.time.timestamp())])
    yield Family("watch_faults", "What failed in the last round, beside destinations.", [(own, len(report.faults))])
    held_back = float(report.held_back is not None)
    yield Family("watch_held_back", "1 while the space limit allows no snapshot.", [(own, held_back)])
    lengths = [({**own, "disk": disk}, float(count)) for disk, count in sorted(report.chain_lengths.items())]
    yield Family("watch_chain_length", "Files of the local chain of a disk, root and top included.", lengths)
    sizes = {"waiting": report.waiting_bytes, "active": report.active_bytes}
    rows = [({**own, "layers": name}, float(count)) for name, count in sizes.items() if count is not None]
    yield Family("watch_local_bytes", "Bytes of sealed layers that no destination holds, and of active ones.", rows)
    if report.last_frozen_seconds is not None:
        frozen = [(own, report.last_frozen_seconds)]
        yield Family("watch_frozen_seconds", "How long the guest was frozen for the last snapshot.", frozen)
    yield from _of_destinations(report, own)


def _of_destinations(report: RoundReport, own: Labels) -> Iterator[Family]:
    lag = Family("watch_rpo_lag_seconds", "How old the newest guest point at the destination is.")
    captured = Family("watch_captured_timestamp_seconds", "When what the destination holds was taken; 0: never.")
    behind = Family("watch_behind_bytes", "Bytes of local layers that the destination lacks, active ones too.")
    failures = Family("watch_failures", "Failed attempts with the destination since the last good one.")
    point = Family("watch_guest_point", "Number of the newest guest point at the destination.")
    for each in report.destinations:
        labels = {**own, "destination": each.destination}
        lag.rows.append((labels, math.inf if each.lag_seconds is None else each.lag_seconds))
        captured.rows.append((labels, 0.0 if each.captured is None else each.captured.timestamp()))
        if each.behind_bytes is not None:
            behind.rows.append((labels, float(each.behind_bytes)))
        failures.rows.append((labels, float(each.failures)))
        if each.guest_point is not None:
            point.rows.append((labels, float(each.guest_point)))
    yield from (lag, captured, behind, failures, point)
