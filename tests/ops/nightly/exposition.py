"""Reads Prometheus' text format by the parser of prometheus_client."""

from __future__ import annotations

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


def read(text: str) -> dict[str, Metric]:
    """The families by name. Raises ValueError, AssertionError for one that is empty or stands in two places."""
    families = list(text_string_to_metric_families(text))
    assert all(family.samples for family in families)
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """Of the one series with at least these labels."""
    (found,) = [each.value for each in families[f"snapchain_{name}"].samples if labels.items() <= each.labels.items()]
    return float(found)
