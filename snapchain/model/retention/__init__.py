"""Which points stay: one pure function a rule, and a decision with its reasons for every point.

policy.py     the rules, and the decision: a point goes only when every rule lets it go
clocks.py     which times count: points of the future, and those after a jump, take no place of others
duration.py   1y5m7d2h
tally.py      decisions in a few words
named.py      points that go by their number: what was decided for all disks of a guest
"""

from snapchain.model.retention.clocks import TOLERANCE, Doubt, is_future
from snapchain.model.retention.duration import Duration, parse_duration
from snapchain.model.retention.named import DropAll, DropPoints, GuestRules, Rules, decide_by
from snapchain.model.retention.policy import UNLIMITED, Decision, Period, Policy, RetentionPoint, decide
from snapchain.model.retention.tally import kept_by_rule

__all__ = [
    "TOLERANCE",
    "UNLIMITED",
    "Decision",
    "Doubt",
    "DropAll",
    "DropPoints",
    "Duration",
    "GuestRules",
    "Period",
    "Policy",
    "RetentionPoint",
    "Rules",
    "decide",
    "decide_by",
    "is_future",
    "kept_by_rule",
    "parse_duration",
]
