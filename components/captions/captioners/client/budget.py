"""What answers have cost, and whether one more may be asked for."""

from collections.abc import Mapping
from typing import Any

from components.captions.captioners.client.usage import answer_cost, read_usage

_TOKENS = ("tokens", "usd")  # what is counted from an answer's usage


class Budget:
    """Sums of `requests`, `tokens` and `usd`, below the most that each may reach.

    spent: the sums so far. reserve: what one request may take of each, before the first answer.
    """

    def __init__(
        self,
        most: Mapping[str, float],
        prices: Mapping[str, float],
        spent: Mapping[str, float],
        reserve: Mapping[str, float],
    ) -> None:
        self.most, self.prices, self.spent = most, prices, spent
        self.dearest = {"requests": 1.0, **reserve}
        self.countable = not {*_TOKENS} & most.keys()  # whether answers are known to say what the limits need

    def cost(self, body: Any) -> dict[str, float]:
        """What an answer adds to the sums, as far as it says so."""
        return {"requests": 1.0, **answer_cost(read_usage(body), self.prices)}

    def charge(self, body: Any) -> dict[str, float]:
        """What an answer adds to the sums; one that doesn't say costs a limited sum as much as the dearest so far."""
        cost = self.cost(body)
        self.countable |= "tokens" in cost
        for name in _TOKENS:
            self.dearest[name] = max(self.dearest.get(name, 0.0), cost.get(name, 0.0))
        return {**self.unknown(), **cost}

    def unknown(self) -> dict[str, float]:
        """What a request is taken to cost that the service may have worked for, and that brought no usage."""
        return {"requests": 1.0, **{name: self.dearest.get(name, 0.0) for name in _TOKENS if name in self.most}}

    def overrun(self, under_way: int) -> str:
        """Says which sum may be overrun by what is under way, counted as the dearest seen so far; or is empty."""
        for name, most in self.most.items():
            spent = self.spent.get(name, 0.0)
            if spent + under_way * self.dearest.get(name, 0.0) > most:
                return f"{spent:g} of {most:g} {name}"
        return ""
