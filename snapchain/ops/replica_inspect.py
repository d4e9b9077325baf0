"""inspect of a replica: the maps of a point's layers come over the wire, no data."""

from __future__ import annotations

from snapchain.errors import Unsupported
from snapchain.model.extents import Extents
from snapchain.model.strip import strips
from snapchain.ops.inspect import STRIP_CELLS, InspectReport, LayerReport, usage
from snapchain.ops.points import in_full
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.fetch_client import fetch

MOST_RUNS = 1 << 23
"""Of all maps together, 16 bytes each: beyond it somebody means harm, or has a disk that no picture can show."""


def inspect_replica(endpoint: Endpoint, disk: str, *, point: str | None = None) -> InspectReport:
    """The chain of a point as it lies there. Raises NotFound, Unsupported, and what keeps it from answering."""
    maps: list[Extents] = []
    names: list[str] = []
    clusters: list[int] = []
    with fetch(endpoint, disk, in_full(point), chain=True, look=True) as answer:
        for layer in answer.layers():
            for _ in layer.batches():
                raise AssertionError("nobody sends data to one who only looks")
            maps.append(layer.extents)
            names.append(layer.offer.name)
            clusters.append(layer.offer.cluster_size)
            if sum(len(extents.at) for extents in maps) > MOST_RUNS:
                raise Unsupported("its layers are cut into too many extents to be shown", subject=endpoint.url)
        found = answer.point
    layers = tuple(
        LayerReport(
            path=name,
            format="qcow2",
            virtual_size=extents.size,
            cluster_size=cluster_size,
            file_bytes=None,
            data_bytes=use.data_bytes,
            zero_bytes=use.zero_bytes,
            shadowed_bytes=use.shadowed_bytes,
            shadowed_zero_bytes=use.shadowed_zero_bytes,
            snapshots=0,
            bitmaps=(),
            strip=strip,
        )
        for name, cluster_size, extents, use, strip in zip(
            names, clusters, maps, usage(maps), strips(maps, STRIP_CELLS), strict=True
        )
    )
    return InspectReport(
        address=f"{endpoint.url}::{disk}@{found.point}",
        virtual_size=found.size,
        content_id=found.content_id,
        layers=layers,
        findings=(),
    )
