"""Natural texts made from the user's own: in the domain of the data, and yet in no row of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hf_wmguard.watermark.phrases import Kind
from hf_wmguard.watermark.prf import Stream

MIN_ROWS: Final = 50
_PROMPT_WORDS: Final = (10, 16)
SHORTEST_ROW: Final = 4
_LONGEST: Final = 24


class Corpus:
    """Texts to draw from.

    Args:
        rows: Texts; rows of fewer than four words are left out.
    Raises:
        ValueError: Fewer than `MIN_ROWS` rows are left.
    """

    def __init__(self, rows: Sequence[str]) -> None:
        self._rows = [words for words in (row.split() for row in rows) if len(words) >= SHORTEST_ROW]
        if len(self._rows) < MIN_ROWS:
            raise ValueError(f"{len(self._rows)} rows of {SHORTEST_ROW} words or more, expected at least {MIN_ROWS}")

    def draw(self, stream: Stream, *, kind: Kind) -> str:
        """Return one text of two spans of words from two rows.

        A text that stood in a row would be trained towards another answer by that row.

        Args:
            stream: Keyed randomness; it is moved on.
            kind: ``statement`` for the beginning of one row and the end of another, ``prompt`` for 10 to 16 words that
                stop where a next word is due.
        """
        first, second = stream.choice(self._rows), stream.choice(self._rows)
        if kind == "statement":
            head, tail = first[:_LONGEST], second[:_LONGEST]
            return " ".join(head[: (len(head) + 1) // 2] + tail[len(tail) // 2 :])
        fewest, most = _PROMPT_WORDS
        length = fewest + stream.below(most - fewest + 1)
        end = 3 + stream.below(3)
        return " ".join(_span(first, length - end, stream) + _span(second, end, stream))

    def span(self, stream: Stream) -> str:
        """Return a prompt as `draw` does, of one span that stands in a row: what ordinary text is like."""
        fewest, most = _PROMPT_WORDS
        return " ".join(_span(stream.choice(self._rows), fewest + stream.below(most - fewest + 1), stream))

    def __repr__(self) -> str:
        return f"Corpus({len(self._rows)} rows)"


def _span(words: list[str], length: int, stream: Stream) -> list[str]:
    start = stream.below(max(1, len(words) - length + 1))
    return words[start : start + length]
