"""intervals.py: how sure a share is, and the difference of two shares of the same prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


@dataclass(frozen=True)
class Share:
    count: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.total


def wilson(count: int, total: int) -> Share:
    """Wilson's 95 % score interval (1927), without continuity correction."""
    p, shrink = count / total, 1 + Z95**2 / total
    centre = (p + Z95**2 / (2 * total)) / shrink
    half = Z95 * math.sqrt(p * (1 - p) / total + Z95**2 / (4 * total**2)) / shrink
    # At the ends the bound is 0 or 1 exactly; rounding would leave 1e-17.
    low = 0.0 if count == 0 else centre - half
    return Share(count, total, low, 1.0 if count == total else centre + half)


@dataclass(frozen=True)
class Difference:
    """Of two models over the same prompts: share of b minus share of a."""

    value: float
    low: float
    high: float
    only_a: int
    only_b: int
    p_value: float


def paired_difference(a: list[bool], b: list[bool]) -> Difference:
    """Newcombe's 95 % hybrid score interval for paired proportions (Stat. Med. 17:2635, 1998,
    method 10), and McNemar's exact test.
    """
    both = sum(x and y for x, y in zip(a, b, strict=True))
    only_a, only_b = sum(a) - both, sum(b) - both
    neither = len(a) - both - only_a - only_b
    share_a, share_b = wilson(sum(a), len(a)), wilson(sum(b), len(b))
    phi = _correlation(both, only_a, only_b, neither)
    difference = share_b.value - share_a.value
    below_a, above_a = share_a.value - share_a.low, share_a.high - share_a.value
    below_b, above_b = share_b.value - share_b.low, share_b.high - share_b.value
    low = math.sqrt(max(0, below_b**2 - 2 * phi * below_b * above_a + above_a**2))
    high = math.sqrt(max(0, above_b**2 - 2 * phi * above_b * below_a + below_a**2))
    return Difference(difference, difference - low, difference + high, only_a, only_b,
                      mcnemar(only_a, only_b))


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Newcombe's phi: zero where a margin is empty, with a correction of n / 2 where positive."""
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    product = both * neither - only_a * only_b
    total = both + only_a + only_b + neither
    return (max(product - total / 2, 0) if product > 0 else product) / math.sqrt(margins)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p: the prompts on which the models differ are fair coin tosses."""
    tosses = only_a + only_b
    tail = sum(math.comb(tosses, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**tosses)
