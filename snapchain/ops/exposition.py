"""Prometheus' text format, for node_exporter's textfile collector: a file is replaced whole, so never half there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from snapchain.host import files
from snapchain.host.temporary_names import NEW
from snapchain.host.terminal import printable

_READABLE = 0o644
Labels = dict[str, str]


@dataclass(slots=True)
class Family:
    """One metric, all of its series; its name in the exposition begins with snapchain_."""

    name: str
    help: str
    rows: list[tuple[Labels, float]] = field(default_factory=list)

    def gauge(self) -> GaugeMetricFamily:
        """As prometheus_client has it. A label may be shown by `cat`: control characters of a name are escaped."""
        names = list(self.rows[0][0])
        made = GaugeMetricFamily(f"snapchain_{self.name}", self.help, labels=names)
        for labels, value in self.rows:
            made.add_metric([printable(labels[name]) for name in names], value)
        return made


@dataclass(frozen=True, eq=False)
class _Collector:
    families: list[Family]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        return (family.gauge() for family in self.families if family.rows)


def encode(families: Iterable[Family]) -> bytes:
    """The text. Families without a series are left out."""
    registry = CollectorRegistry()
    registry.register(_Collector(list(families)))
    return generate_latest(registry)


def write(path: Path, data: bytes) -> None:
    """Replace the file. Raises what the place raises."""
    files.make_directories(path.parent, mode=0o755)
    files.remove_temporaries(path, purpose=NEW)
    # Whatever the umask: the exporter runs as somebody else.
    files.write_atomically(path, data, mode=_READABLE, whatever_the_umask=True)
