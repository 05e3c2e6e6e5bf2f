"""Text in and out: whole characters, stop strings, scores and embeddings of texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openllama.errors import InputError
from openllama.generation import embed_sequences, score
from openllama.generation.text import (
    continuation_ids,
    embed_texts,
    score_text_continuations,
    score_texts,
    stop_at,
    stream_text,
    until,
)
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


def test_a_book_longer_than_the_context_has_a_perplexity(tokenizer):
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=16)
    text = "To be, or not to be: that is the question. " * 4
    [book] = score_texts(model, tokenizer, [text], stride=8)
    ids = tokenizer(text).input_ids
    assert len(ids) > 32
    assert len(book.log_probs) == len(ids) - 1
    assert book.perplexity == pytest.approx(score(model, [ids], stride=8)[0].perplexity)
    assert score_texts(model, tokenizer, []) == []


def test_a_harness_asks_for_the_likelihood_of_answers(model, tokenizer):
    pairs = [("To be", " or not to be"), ("To be ", "or not to be"), ("", "To be"), ("To be, or no", "t to be")]
    results = score_text_continuations(model, tokenizer, pairs)
    assert results[0].total == results[1].total  # a space at the end of a prompt belongs to what follows
    for (prompt, continuation), result in zip(pairs, results, strict=True):
        before, after = continuation_ids(tokenizer, prompt, continuation)
        assert before + after == [1, *tokenizer.encode(prompt + continuation, add_special_tokens=False)]
        log_probs = model(torch.tensor([before + after])).logits[0].log_softmax(-1)[len(before) - 1 : -1].detach()
        expected = log_probs.gather(1, torch.tensor(after)[:, None]).sum()
        assert result.total == pytest.approx(float(expected), rel=1e-5)
        assert result.is_greedy == torch.equal(log_probs.argmax(-1), torch.tensor(after))
    assert score_text_continuations(model, tokenizer, []) == []


def test_a_prompt_and_its_continuation_are_encoded_together(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "add_bos_token", False)
    monkeypatch.setattr(tokenizer, "add_eos_token", True)
    prompt, continuation = continuation_ids(tokenizer, "To be ", "or not")
    assert prompt == tokenizer.encode("To be", add_special_tokens=False)
    assert prompt + continuation == tokenizer.encode("To be or not", add_special_tokens=False)
    assert continuation_ids(tokenizer, "", "To be") == ([2], prompt)
    assert continuation_ids(tokenizer, " ", "To be")[0] == [2]
    shared, changed = continuation_ids(tokenizer, "To b", "e or")  # ▁To ▁ b, but together ▁To ▁be ▁or
    assert shared + changed == tokenizer.encode("To be or", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(shared) == ["▁To"]
    with pytest.raises(InputError, match="the continuation '' adds no token to its prompt"):
        continuation_ids(tokenizer, "To be", "")
    monkeypatch.setitem(tokenizer._special, "eos_token", None)
    with pytest.raises(InputError, match="no token to begin a text with"):
        continuation_ids(tokenizer, "", "To be")


def test_the_nearest_text_is_found_by_its_embedding(model, tokenizer):
    texts = ["To be, or not to be", "床前明月光", "the players play"]
    for pooling in ("mean", "last"):
        vectors = embed_texts(model, tokenizer, texts, pooling, batch_size=2)
        for row, text in enumerate(texts):
            torch.testing.assert_close(vectors[row], embed_sequences(model, [tokenizer.encode(text)], pooling)[0])
            near = torch.cosine_similarity(embed_texts(model, tokenizer, [text], pooling), vectors)
            assert int(near.argmax()) == row
    assert len(embed_texts(model, tokenizer, [])) == 0


@pytest.mark.parametrize("stops", ["user:", ["user:", ""]])
def test_stop_strings_that_cannot_be_meant_are_refused(model, tokenizer, stops):
    with pytest.raises(InputError, match="stop_strings"):
        stream_text(model, tokenizer, "a", stops)
    with pytest.raises(InputError, match="stop_strings"):
        stop_at(tokenizer, stops, 0)


def test_one_string_in_place_of_a_list_is_refused(model, tokenizer):
    for function in (score_texts, embed_texts):
        with pytest.raises(InputError, match="texts must be a list of strings, got the string 'abc'"):
            function(model, tokenizer, "abc")


def test_a_stop_string_may_begin_with_the_space_that_a_tokenizer_puts_in_front(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_bytes("v1-like"))  # it puts a space in front of every text
    spaced = OpenLlamaTokenizer.from_pretrained(tmp_path)
    prompt, new = spaced.encode("to"), spaced.encode("to be")
    assert spaced.decode(new[len(prompt) :]) == "be"
    assert spaced.decode(new, skip_special_tokens=True) == "to be"
    ended = stop_at(spaced, [" be"], len(prompt))
    assert ended(torch.tensor([new]), torch.zeros(1, 1)).tolist() == [True]
    assert ended(torch.tensor([prompt]), torch.zeros(1, 1)).tolist() == [False]
