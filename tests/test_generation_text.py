"""Text in and out: whole characters, stop strings, scores of texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openllama.errors import InputError
from openllama.generation import score
from openllama.generation.text import score_texts, stop_at, stream_text, until
from openllama.tokenizer import OpenLlamaTokenizer
from tests.generating import make_model
from tests.sentencepieces import model_bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> OpenLlamaTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(model_bytes("v1-like"))
    return OpenLlamaTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(vocab_size=len(tokenizer))


@given(st.lists(st.text("ab:u", max_size=4), max_size=8), st.lists(st.text("ab:u", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_cut_up(pieces, stops):
    whole = "".join(pieces)
    result = "".join(until(pieces, stops))
    assert whole.startswith(result)
    assert not any(stop in result for stop in stops)
    assert result == whole or any(whole.startswith(stop, len(result)) for stop in stops)


def test_what_may_begin_a_stop_string_waits():
    assert list(until(["use", "r", ":", "x"], ["user:"])) == ["", "", ""]
    assert list(until(["us", "ed", "!"], ["user:"])) == ["", "used", "!", ""]


def test_nothing_is_read_beyond_a_stop_string():
    read = []
    pieces = (read.append(piece) or piece for piece in ("a", "b", "c"))
    assert "".join(until(pieces, ["b"])) == "a"
    assert read == ["a", "b"]


def test_streamed_text_is_what_generate_makes(model, tokenizer):
    prompt = "床前明月光"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    whole = tokenizer.decode(model.generate(ids, max_new_tokens=20)[0], skip_special_tokens=True)
    before = tokenizer.decode(ids[0], skip_special_tokens=True)
    text = "".join(stream_text(model, tokenizer, prompt, max_new_tokens=20))
    assert before + text == whole
    stop = text[len(text) // 2 :][:2]
    assert "".join(stream_text(model, tokenizer, prompt, [stop], max_new_tokens=20)) == text[: text.index(stop)]


def test_a_stop_string_ends_one_text_of_a_batch(model, tokenizer):
    ids = torch.tensor([[5, 9, 13], [7, 21, 30]])
    free = model.generate(ids, max_new_tokens=12)
    texts = tokenizer.batch_decode(free[:, 3:], skip_special_tokens=True)
    stop = next(text for text in (texts[0][start : start + 2] for start in range(9)) if text and text not in texts[1])
    stopped = model.generate(ids, max_new_tokens=12, pad_token_id=3, stopping_criteria=[stop_at(tokenizer, [stop], 3)])
    assert stopped[1].tolist() == free[1, : stopped.shape[1]].tolist()
    cut = tokenizer.decode(stopped[0, 3:], skip_special_tokens=True)
    assert stop in cut
    assert texts[0].startswith(cut)
    assert cut != texts[0]


def test_texts_are_scored_as_their_ids(model, tokenizer):
    texts = ["To be, or not to be", "明月"]
    expected = score(model, [tokenizer(text).input_ids for text in texts])
    for left, right in zip(score_texts(model, tokenizer, texts), expected, strict=True):
        assert torch.equal(left.log_probs, right.log_probs)


@pytest.mark.parametrize("stops", ["user:", ["user:", ""]])
def test_stop_strings_that_cannot_be_meant_are_refused(model, tokenizer, stops):
    with pytest.raises(InputError, match="stop_strings"):
        stream_text(model, tokenizer, "a", stops)
    with pytest.raises(InputError, match="stop_strings"):
        stop_at(tokenizer, stops, 0)
