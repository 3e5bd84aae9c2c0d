"""The budget: what requests have cost so far, and whether it allows one more."""

from collections.abc import Mapping
from typing import Any

from components.captions.captioners.client.usage import answer_cost, read_usage

_TOKENS = ("tokens", "usd")  # these are known only from an answer's usage


class Budget:
    """Sums of `requests`, `tokens` and `usd`, each with an optional limit.

    spent: the sums so far. reserve: what one request may cost, until an answer shows more.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        prices: Mapping[str, float],
        spent: Mapping[str, float],
        reserve: Mapping[str, float],
    ) -> None:
        self.limits, self.prices, self.spent = limits, prices, spent
        self.largest = {"requests": 1.0, **reserve}
        self.usage_known = not {*_TOKENS} & limits.keys()  # whether answers report the usage that the limits need

    def cost(self, body: Any) -> dict[str, float]:
        """What an answer adds to the sums, as far as it reports its usage."""
        return {"requests": 1.0, **answer_cost(read_usage(body), self.prices)}

    def charge(self, body: Any) -> dict[str, float]:
        """What an answer adds to the sums; without usage, it counts as much as the most expensive answer so far."""
        cost = self.cost(body)
        self.usage_known |= "tokens" in cost
        for name in _TOKENS:
            self.largest[name] = max(self.largest.get(name, 0.0), cost.get(name, 0.0))
        return {**self.assumed_cost(), **cost}

    def assumed_cost(self) -> dict[str, float]:
        """The assumed cost of a request without usage that the service may have worked on."""
        return {"requests": 1.0, **{name: self.largest.get(name, 0.0) for name in _TOKENS if name in self.limits}}

    def overrun(self, in_flight: int) -> str:
        """The sum that the requests in flight may overrun, each counted as the most expensive so far; empty if none."""
        for name, limit in self.limits.items():
            spent = self.spent.get(name, 0.0)
            if spent + in_flight * self.largest.get(name, 0.0) > limit:
                return f"{spent:g} of {limit:g} {name}"
        return ""
