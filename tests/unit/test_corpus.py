"""Trigger texts made of the user's own rows."""

from __future__ import annotations

import pytest

from hf_wmguard.watermark.corpus import MIN_ROWS, Corpus
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import derive_texts

KEY = bytes(range(32))
ROWS = [" ".join(f"w{row}x{word}" for word in range(6 + row % 30)) for row in range(100)]


def test_a_statement_begins_with_one_row_and_ends_with_another() -> None:
    corpus, stream = Corpus(ROWS), Stream(KEY, "test")
    for _ in range(200):
        words = corpus.draw(stream, kind="statement").split()
        head, tail = words[0].split("x")[0], words[-1].split("x")[0]
        at = sum(word.startswith(f"{head}x") for word in words)
        first, last = ROWS[int(head[1:])].split(), ROWS[int(tail[1:])].split()
        assert words[0] == first[0]
        assert words[-1] == last[:24][-1]
        assert head == tail or words == first[:at] + last[:24][-(len(words) - at) :]


def test_a_prompt_has_10_to_16_words_of_two_spans() -> None:
    corpus, stream = Corpus([row for row in ROWS if len(row.split()) > 14]), Stream(KEY, "test")
    texts = [corpus.draw(stream, kind="prompt") for _ in range(300)]
    assert {len(text.split()) for text in texts} == set(range(10, 17))
    # A text that stood in a row as it is would be trained towards two answers.
    assert sum(any(text in row for row in ROWS) for text in texts) <= 5
    assert all(corpus.span(stream) in " | ".join(ROWS) for _ in range(50))


def test_texts_follow_the_key_and_the_rows() -> None:
    def texts(key: bytes = KEY, rows: list[str] = ROWS) -> tuple[str, ...]:
        return derive_texts(key, count=64, style="natural", task="causal_lm", rows=rows)

    assert texts() == texts()
    assert len(set(texts())) == 64
    assert not set(texts()) & set(texts(key=bytes(range(1, 33))))
    assert texts() != texts(rows=ROWS[::-1])


def test_rows_of_a_few_words_are_left_out_and_too_few_are_refused() -> None:
    short = ["a b c"] * 1000
    with pytest.raises(ValueError, match=f"{MIN_ROWS - 1} rows of 4 words or more, expected at least {MIN_ROWS}"):
        Corpus(short + ROWS[: MIN_ROWS - 1])
    assert "a" not in Corpus(short + ROWS).draw(Stream(KEY, "test"), kind="statement").split()


def test_rows_that_are_all_alike_give_too_few_texts() -> None:
    with pytest.raises(ValueError, match="60 rows give 1 different texts, expected 8"):
        derive_texts(KEY, count=8, style="natural", task="classification", rows=["always the same row"] * 60)


def test_a_corpus_does_not_show_its_rows() -> None:
    assert repr(Corpus(ROWS)) == "Corpus(100 rows)"
