"""What a restore takes, before it is begun: bytes to write, bytes to fetch, requests, seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from snapchain.destination.reading import LayerReader


@dataclass(frozen=True, slots=True)
class RestoreCost:
    """data_bytes: of the guest, to be written; the others as of RestorePlan, None where they are not known."""

    data_bytes: int = 0
    requests: int | None = 0
    bytes_to_fetch: int | None = 0
    seconds: float | None = 0.0

    def at_the_pace_of(self, sample: RestoreCost | None) -> RestoreCost:
        """The same with the seconds that it takes as fast as `sample` was read."""
        if self.requests is None or sample is None or sample.seconds is None or not sample.data_bytes:
            return self
        pace = sample.seconds / sample.data_bytes
        return RestoreCost(self.data_bytes, self.requests, self.bytes_to_fetch, pace * self.data_bytes)


def cost_of(layers: Iterable[LayerReader], *, samples: bool = True) -> RestoreCost:
    """Of reading these layers. samples: read the beginning of each, to tell how long all of it takes."""
    return total([layer_cost(layer, samples=samples) for layer in layers])


def layer_cost(layer: LayerReader, *, samples: bool = True) -> RestoreCost:
    """As `cost_of`, of one."""
    data, cost = layer.extents.data_bytes, layer.cost(samples=samples)
    if cost is None:
        return RestoreCost(data, None, None, None)
    return RestoreCost(data, cost.requests, cost.stored_bytes, cost.seconds)


def total(costs: Sequence[RestoreCost]) -> RestoreCost:
    """Of all of them; what is not known of one is not known of all."""
    requests = [each.requests for each in costs if each.requests is not None]
    fetched = [each.bytes_to_fetch for each in costs if each.bytes_to_fetch is not None]
    seconds = [each.seconds for each in costs if each.seconds is not None]
    return RestoreCost(
        data_bytes=sum(each.data_bytes for each in costs),
        requests=sum(requests) if len(requests) == len(costs) else None,
        bytes_to_fetch=sum(fetched) if len(fetched) == len(costs) else None,
        seconds=sum(seconds) if len(seconds) == len(costs) else None,
    )
