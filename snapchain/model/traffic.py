"""What was asked of an object store over the network, and what that costs by a table of prices."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

GIB = 1 << 30
_PER = 1000
"""Requests that a price is for."""

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Prices(BaseModel):
    """What a provider bills.

    put: for 1000 PUT or LIST requests; get: for 1000 GET or HEAD requests; delete: for 1000 DELETE requests
    storage: for a GiB that is stored for a month; download: for a GiB that is read
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    currency: Annotated[str, Field(min_length=1, max_length=16)]
    put: Price = 0.0
    get: Price = 0.0
    delete: Price = 0.0
    storage: Price = 0.0
    download: Price = 0.0

    def of(self, traffic: Traffic) -> float:
        """What the traffic costs. A request that was refused, and sent again, counts twice."""
        requests = self.put * (traffic.puts + traffic.lists) + self.get * (traffic.gets + traffic.heads)
        return (requests + self.delete * traffic.deletes) / _PER + self.download * traffic.bytes_down / GIB

    def month(self, stored: int) -> float:
        """What so many bytes cost in a month."""
        return self.storage * stored / GIB


class Traffic(BaseModel):
    """Requests that were sent, and bytes of objects and other bodies. Requests that were repeated are in all counts.

    retries: of all requests, those that repeat another one; refused: of all requests, those that the server answered
    with SlowDown or the like
    bytes_up, bytes_down: sent and received, without headers
    """

    model_config = ConfigDict(frozen=True)

    puts: int = 0
    lists: int = 0
    gets: int = 0
    heads: int = 0
    deletes: int = 0
    retries: int = 0
    refused: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def requests(self) -> int:
        """All of them."""
        return self.puts + self.lists + self.gets + self.heads + self.deletes


class Bill(Traffic):
    """The traffic of one destination in one command. cost: in `currency`; both are None without a table of prices."""

    destination: str
    cost: float | None = None
    currency: str | None = None

    @classmethod
    def of(cls, destination: str, traffic: Traffic, prices: Prices | None) -> Self:
        """From what was counted."""
        cost = None if prices is None else round(prices.of(traffic), 9)
        currency = None if prices is None else prices.currency
        return cls(destination=destination, cost=cost, currency=currency, **traffic.model_dump())
