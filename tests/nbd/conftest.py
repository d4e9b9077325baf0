"""Loaders whose threads end with the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nbd.serving import Loaders, threads
from tests.waiting import wait_until


@pytest.fixture
def loaders() -> Iterator[Loaders]:
    made = Loaders()
    yield made
    for loader in made.made:
        loader.close()
    wait_until(lambda: not threads())
