"""Cards by name: memory, and what they compute at most, as their makers print it (dense, without sparsity)."""

from typing import NamedTuple

from pipeline.settings import nearest
from shards.errors import UserError


class Card(NamedTuple):
    """A kind of GPU.

    Attributes:
        gigabytes: Of memory, 10^9 bytes.
        low: TFLOP/s of products in bfloat16 or float16, summed in float32.
        full: TFLOP/s in float32.
    """

    gigabytes: int
    low: float
    full: float

    def flops(self, precision: str) -> float:
        """Return the operations a second at most; precision as of the engine's settings."""
        return 1e12 * (self.full if precision == "float32" else self.low)


CARDS = {
    "a10": Card(24, 125, 31.2), "a30": Card(24, 165, 10.3), "a40": Card(48, 149.7, 37.4),
    "a100-40gb": Card(40, 312, 19.5), "a100-80gb": Card(80, 312, 19.5), "l4": Card(24, 121, 30.3),
    "l40s": Card(48, 362, 91.6), "rtx3090": Card(24, 71, 35.6), "rtx4090": Card(24, 165.2, 82.6),
    "h100-pcie": Card(80, 756, 51.2), "h100": Card(80, 989.4, 66.9), "h200": Card(141, 989.4, 66.9),
    "b200": Card(180, 2250, 75),
}  # fmt: skip


def card(name: str) -> Card:
    """Return a card by name; capitals, spaces and dashes do not count.

    Raises:
        UserError: It is not in the table.
    """
    plain = {_plain(each): found for each, found in CARDS.items()}
    if _plain(name) not in plain:
        raise UserError(f"unknown GPU {name!r}{nearest(name, list(CARDS))}; those known are {', '.join(CARDS)}")
    return plain[_plain(name)]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
