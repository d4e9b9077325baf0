"""Decisions in a few words: how many points each rule keeps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

_COUNTED = re.compile(r"(\w+) \d+ of (\w+)(?:: .*)?", re.DOTALL)
_WITHIN = re.compile(r"(within \S+) of the newest")


def rule_of(reason: str) -> str:
    """The rule that a reason to keep a point speaks of: `daily 7` of `daily 2 of 7: 2026-11-29`, `held` of a hold.

    Reasons that are no rule's, such as `newest`, are returned as they are.
    """
    if reason.startswith("held: "):
        return "held"
    if (found := _COUNTED.fullmatch(reason)) is not None:
        return f"{found[1]} {found[2]}"
    if (found := _WITHIN.fullmatch(reason)) is not None:
        return found[1]
    return reason


def kept_by_rule(reasons: Iterable[Iterable[str]]) -> Mapping[str, int]:
    """rule -> how many points it keeps, most first. reasons: of each point that is kept"""
    counts = Counter(rule for each in reasons for rule in {rule_of(reason): None for reason in each})
    return dict(counts.most_common())
