"""Roll-outs of several policies, weighed together, and what may be asked of them."""

from pirl.pool.demonstrations import (
    check_explained,
    check_lengths,
    check_support,
    check_table,
    check_transitions,
    ratio_of_table,
)
from pirl.pool.samples import Pool
from pirl.pool.tables import Features, checked_features, encode

__all__ = [
    "Features",
    "Pool",
    "check_lengths",
    "check_explained",
    "check_support",
    "check_table",
    "check_transitions",
    "checked_features",
    "encode",
    "ratio_of_table",
]
