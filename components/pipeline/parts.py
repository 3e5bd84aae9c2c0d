"""Parts of a step: its shards dealt out to several processes."""

from typing import NamedTuple

from univigu.errors import ConfigError


class Part(NamedTuple):
    """A share of a step's shards: every `of`-th of them, the first part beginning with the first shard."""

    number: int  # from 1
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read ``2/8``, the second of eight parts; raises `ConfigError` for anything else."""
        try:
            part = cls(*(int(number) for number in text.split("/")))
            if not 1 <= part.number <= part.of:
                raise ValueError(text)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"'{text}' is no part of a step; write 2/8 for the second of eight parts.") from error
        return part


class PartEnded(Exception):  # noqa: N818 (it is how a step function is left early, and no error)
    """The shards of a part are there; the step function has nothing more to do."""

    def __init__(self, made: int, kept: int) -> None:
        self.made, self.kept = made, kept
