"""The tokenizer by itself: conventions, batches, files, streaming, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openllama.errors import TokenizerError
from openllama.tokenizer import AddedToken, Encoding, OpenLlamaTokenizer, StreamDecoder
from openllama.tokenizer.template import DEFAULT_TEMPLATE, ChatTemplate
from tests.sentencepieces import REAL, TINY_CHECKPOINT, TRAINED, model_bytes, texts, trained, write_folder

V1_FILES: dict[str, Any] = {
    "tokenizer_config": {"add_bos_token": False, "add_eos_token": True, "model_max_length": 2048, "note": "kept"},
    "special_tokens_map": {"pad_token": {"content": "<pad>", "lstrip": False, "special": True}, "eos_token": "</s>"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "v1", trained("v1-like"), **V1_FILES)


@pytest.fixture
def tokenizer(folder: Path) -> OpenLlamaTokenizer:
    return OpenLlamaTokenizer.from_pretrained(folder)


def bare(tmp_path: Path, model: str, **options: Any) -> OpenLlamaTokenizer:
    """A tokenizer of a model file alone."""
    return OpenLlamaTokenizer.from_pretrained(write_folder(tmp_path / model, model_bytes(model)), **options)


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> OpenLlamaTokenizer:
    """Identity normalisation and byte fallback: every text comes back."""
    return bare(tmp_path_factory.mktemp("llama-like"), "llama-like")


# ---------------------------------------------------------------------- conventions


def test_v1_appends_eos_and_puts_no_bos(tokenizer: OpenLlamaTokenizer) -> None:
    ids = tokenizer("To be")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.bos_token_id == 1 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "To be"
    assert tokenizer("To be", add_special_tokens=False)["input_ids"] == ids[:-1]


def test_special_ids_come_from_the_model_file_where_no_json_names_them(tmp_path: Path) -> None:
    named = {"bos_piece": "[B]", "eos_piece": "[E]", "pad_piece": "[P]", "unk_piece": "[U]"}
    path = write_folder(tmp_path, trained("v1-like", **named)) / "tokenizer.model"
    for tokenizer in (OpenLlamaTokenizer(path), OpenLlamaTokenizer.from_pretrained(tmp_path)):
        assert [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [
            "[U]", "[B]", "[E]", "[P]"]  # fmt: skip
        ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert ids == (0, 1, 2, 3)
        assert len(tokenizer) == tokenizer.vocab_size


def test_a_model_file_without_pad_has_none_and_says_so(tmp_path: Path) -> None:
    tokenizer = bare(tmp_path, "llama-like")
    assert tokenizer.pad_token is None
    assert tokenizer.pad_token_id is None
    with pytest.raises(TokenizerError, match="needs a pad token"):
        tokenizer(["a", "b c"], padding=True)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["", "the"], padding=True)["input_ids"][0][-1] == 2


@pytest.mark.parametrize(("model", "pad", "size"), [("v1", 3, 100000), ("v2", 32000, 68762)])
def test_the_real_models_pad_with_their_own_pad(tmp_path: Path, model: str, pad: int, size: int) -> None:
    tokenizer = bare(tmp_path, model)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<pad>", pad, size)


def test_the_constructor_and_from_pretrained_agree(folder: Path, tokenizer: OpenLlamaTokenizer) -> None:
    direct = OpenLlamaTokenizer(folder / "tokenizer.model", pad_token="<pad>", add_bos_token=False, add_eos_token=True)
    assert direct("To be<pad></s>")["input_ids"] == tokenizer("To be<pad></s>")["input_ids"]


def test_arguments_win_over_the_files(folder: Path) -> None:
    tokenizer = OpenLlamaTokenizer.from_pretrained(folder, add_bos_token=True, pad_token="<unk>", padding_side="left")
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token, tokenizer.padding_side) == (True, True, "left")
    assert tokenizer.pad_token_id == 0


# ---------------------------------------------------------------------- batches


def test_one_text_gives_a_row_and_several_give_a_batch(tokenizer: OpenLlamaTokenizer) -> None:
    one, batch = tokenizer("to be"), tokenizer(["to be", "not"])
    assert batch["input_ids"][0] == one["input_ids"] == tokenizer.encode("to be")
    assert one["attention_mask"] == [1] * len(one["input_ids"])
    assert [len(row) for row in batch["input_ids"]] == [len(row) for row in batch["attention_mask"]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_fills_one_side_and_is_masked(tokenizer: OpenLlamaTokenizer, side: str) -> None:
    tokenizer.padding_side = side
    batch = tokenizer(["to be or not", "to"], padding=True, return_tensors="pt")
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert torch.equal(batch.input_ids == tokenizer.pad_token_id, batch.attention_mask == 0)
    real = tokenizer("to")["input_ids"]
    short = batch.input_ids[1].tolist()
    assert (short[-len(real) :] if side == "left" else short[: len(real)]) == real


def test_max_length_pads_and_cuts_and_keeps_the_special_tokens(tokenizer: OpenLlamaTokenizer) -> None:
    rows = tokenizer(["to be or not to be", "to"], padding="max_length", truncation=True, max_length=5)["input_ids"]
    assert [len(row) for row in rows] == [5, 5]
    assert rows[0][-1] == tokenizer.eos_token_id
    assert rows[0][:4] == tokenizer("to be or not to be")["input_ids"][:4]
    tokenizer.truncation_side = "left"
    assert tokenizer("to be or not to be", max_length=5)["input_ids"][:4] == tokenizer("to be or not to be")[
        "input_ids"][-5:-1]  # fmt: skip
    assert len(tokenizer("to " * 3000, truncation=True)["input_ids"]) == tokenizer.model_max_length == 2048
    assert tokenizer("to be", max_length=1)["input_ids"] == [tokenizer.eos_token_id]


def test_pad_takes_a_list_of_encodings_or_one_batch(tokenizer: OpenLlamaTokenizer) -> None:
    texts = ["to be or not", "to"]
    expected = tokenizer(texts, padding=True)
    assert tokenizer.pad([tokenizer(text) for text in texts]) == expected
    assert tokenizer.pad(tokenizer(texts)) == expected
    rows = [torch.tensor(tokenizer.encode(text)) for text in texts]
    padded = tokenizer.pad([{"input_ids": row, "label": i} for i, row in enumerate(rows)])
    assert padded == {**expected, "label": [0, 1]}
    single = tokenizer.pad({"input_ids": [1, 2, 3]}, "max_length", 5)
    assert single == {"input_ids": [1, 2, 3, 3, 3], "attention_mask": [1, 1, 1, 0, 0]}
    with pytest.raises(TokenizerError, match="list of lists"):
        tokenizer.pad([])
    with pytest.raises(TokenizerError, match=r"example 1 has input_ids, example 0 input_ids, label; .* the same keys"):
        tokenizer.pad([{"input_ids": [1], "label": 0}, {"input_ids": [1]}])
    with pytest.raises(TokenizerError, match=r"labels of lengths 1 to 2 .* the tokenizer does not pad them"):
        tokenizer.pad({"input_ids": [[1], [2, 3]], "labels": [[1], [2, 3]]}, return_tensors="pt")
    for kind in ("pt", "np"):
        with pytest.raises(TokenizerError, match=r"name holds what no tensor can.*leave that column out"):
            tokenizer.pad({"input_ids": [[1]], "name": ["Romeo"]}, return_tensors=kind)


def test_rows_are_padded_to_a_multiple(tokenizer: OpenLlamaTokenizer) -> None:
    batch = tokenizer(["to be or not", "to"], padding=True, pad_to_multiple_of=8, return_tensors="np")
    assert batch.input_ids.shape == batch.attention_mask.shape == (2, 8)
    assert isinstance(batch.input_ids, np.ndarray)
    assert batch.input_ids.dtype == np.int64
    short = {"padding": True, "truncation": True, "max_length": 12}
    with pytest.raises(TokenizerError, match=r"max_length 12 is not a multiple of pad_to_multiple_of 8.*use 8"):
        tokenizer("to be", **short, pad_to_multiple_of=8)
    with pytest.raises(TokenizerError, match="pad_to_multiple_of must be a positive integer, got 0"):
        tokenizer("to be", padding=True, pad_to_multiple_of=0)


def test_a_pair_is_cut_where_it_is_told(tokenizer: OpenLlamaTokenizer) -> None:
    first, second = (tokenizer(text)["input_ids"] for text in ("to be or not", "明月光"))
    pair = tokenizer("to be or not", "明月光", return_token_type_ids=True)
    assert pair["input_ids"] == first + second == tokenizer.encode("to be or not", "明月光")
    assert pair["token_type_ids"] == [0] * len(first) + [1] * len(second)
    room = len(first) + len(second) - 2
    only = {name: tokenizer("to be or not", "明月光", truncation=name, max_length=room)["input_ids"]
            for name in ("only_first", "only_second")}  # fmt: skip
    assert only["only_first"] == [*first[:-3], 2, *second]
    assert only["only_second"] == [*first, *second[:-3], 2]
    with pytest.raises(TokenizerError, match=r"'only_first': the second text alone has . tokens, with room for 1"):
        tokenizer("to be or not", "明月光", truncation="only_first", max_length=3)
    with pytest.raises(TokenizerError, match="needs a pair of texts"):
        tokenizer("to be or not", truncation="only_second", max_length=3)
    with pytest.raises(TokenizerError, match="2 texts and 1 text_pair; give one for each"):
        tokenizer(["a", "b"], ["c"])
    with pytest.raises(TokenizerError, match="two strings or two lists, got list, str"):
        tokenizer(["a", "b"], "c")
    with pytest.raises(TokenizerError, match=r"got tuple; pairs go in as two lists"):
        tokenizer([("a", "b")])


def test_arguments_that_are_not_taken_are_named(tokenizer: OpenLlamaTokenizer) -> None:
    off = {"stride": 0, "is_split_into_words": False, "return_overflowing_tokens": False, "return_length": None}
    assert tokenizer("to be", **off, verbose=False) == tokenizer("to be")
    for name in off:
        with pytest.raises(TokenizerError, match=f"{name} is not an argument of this call: .*; got True"):
            tokenizer("to be", **{name: True})
    with pytest.raises(TokenizerError, match="max_lenght is not an argument of this call; got 5"):
        tokenizer("to be", max_lenght=5)
    with pytest.raises(TokenizerError, match="paddding is not an argument"):
        tokenizer.pad({"input_ids": [[1]]}, paddding=True)


def test_older_names_of_hf_encode_as_well(tokenizer: OpenLlamaTokenizer) -> None:
    assert tokenizer.encode_plus("to be", "or not", max_length=4) == tokenizer("to be", "or not", max_length=4)
    assert tokenizer.batch_encode_plus(["to be", "or"], padding=True) == tokenizer(["to be", "or"], padding=True)
    assert (tokenizer.mask_token, tokenizer.sep_token_id) == (None, None)
    assert tokenizer.special_tokens_map["eos_token"] == "</s>"


def test_it_shows_itself_in_one_line(tokenizer: OpenLlamaTokenizer) -> None:
    shown = repr(tokenizer)
    assert shown.startswith("OpenLlamaTokenizer(420 tokens, bos='<s>', eos='</s>', unk='<unk>', pad='<pad>', add_bos")
    assert "model_max_length=2048" in shown
    assert "\n" not in shown
    assert tokenizer.is_fast is False


# ---------------------------------------------------------------------- conversations

CHAT = [
    {"role": "user", "content": "Who is there?"},
    {"role": "assistant", "content": "The king."},
    {"role": "user", "content": "Play"},
]


def test_a_conversation_is_written_as_the_model_was_trained(tokenizer: OpenLlamaTokenizer) -> None:
    text = "user:Who is there?\nsystem:The king.</s>user:Play\nsystem:"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == text
    assert text == DEFAULT_TEMPLATE.format(prompt="Who is there?", answer="The king.") + ChatTemplate().question("Play")
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    tensors = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tensors.input_ids.tolist() == [ids]
    batch = tokenizer.apply_chat_template([CHAT, CHAT[:1]], padding=True, return_tensors="pt")
    assert batch.shape == (2, len(tokenizer.apply_chat_template(CHAT)))
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text.removesuffix("system:")
    begun = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, continue_final_message=True)
    assert begun == "user:Who is there?\nsystem:The king."


def test_any_plain_template_is_the_same_in_jinja(tokenizer: OpenLlamaTokenizer) -> None:
    for text in ("{prompt}{answer}", "Q: '{prompt}'\n\nA: \"{answer}\"\n", "«{prompt}» \\ {answer}\t"):
        template = ChatTemplate(text)
        written = tokenizer.apply_chat_template(CHAT, template.jinja(), True, tokenize=False)
        assert written == template.question("Who is there?") + "The king." + template.end + template.question("Play")


def test_a_folders_own_template_is_used(tokenizer: OpenLlamaTokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "own")
    again = OpenLlamaTokenizer.from_pretrained(tmp_path / "own")
    assert again.apply_chat_template(CHAT[:2], tokenize=False) == "<s>[user] Who is there?<s>[assistant] The king."
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    again = OpenLlamaTokenizer.from_pretrained(tmp_path / "own")
    assert again.apply_chat_template(CHAT, tokenize=False) == "Who is there?"
    again.save_pretrained(tmp_path / "own")
    assert OpenLlamaTokenizer.from_pretrained(tmp_path / "own").chat_template == "{{ messages[0].content }}"
    assert "user:Play" in again.apply_chat_template(CHAT, ChatTemplate().jinja(), tokenize=False)


@pytest.mark.parametrize(
    ("chat", "options", "message"),
    [
        ([{"role": "system", "content": "Be kind."}], {}, "the roles of this format are user and assistant"),
        ([{"role": "user"}], {}, "message 0 must be a dict with role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "message 0: content must be a str, got list"),
        (CHAT, {"chat_template": "{{ 1 +"}, "the chat template: "),
        (CHAT, {"chat_template": "{{ messages.__class__.__mro__ }}"}, "the chat template: .*unsafe"),
        (CHAT, {"tokenize": False, "return_tensors": "pt"}, "return_tensors shapes ids"),
        (CHAT, {"tools": [print]}, "tools is not an argument of this call: write them into a message"),
        (CHAT, {"chat_template": "x", "continue_final_message": True}, "does not show the last message"),
    ],
)
def test_conversations_that_cannot_be_written_are_refused(
    tokenizer: OpenLlamaTokenizer, chat: Any, options: Any, message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer.apply_chat_template(chat, **options)


def test_an_encoding_unpacks_reads_as_attributes_and_moves(tokenizer: OpenLlamaTokenizer) -> None:
    encoding = tokenizer("to be", return_tensors="pt")
    assert encoding.input_ids.dtype == torch.int64
    assert encoding.input_ids.shape == (1, len(tokenizer.encode("to be")))
    assert dict(**encoding).keys() == {"input_ids", "attention_mask"}
    assert isinstance(encoding.to("meta"), Encoding)
    assert encoding["input_ids"].device.type == encoding.attention_mask.device.type == "meta"
    with pytest.raises(AttributeError, match="no token_type_ids"):
        _ = encoding.token_type_ids
    with pytest.raises(TokenizerError, match="return_tensors"):
        tokenizer("to be").to("cpu")
    assert copy.deepcopy(tokenizer("to be")) == pickle.loads(pickle.dumps(tokenizer("to be"))) == tokenizer("to be")


def test_the_empty_text_is_an_int64_tensor_without_columns(tokenizer: OpenLlamaTokenizer) -> None:
    ids = tokenizer("", add_special_tokens=False, return_tensors="pt").input_ids
    assert (ids.shape, ids.dtype) == ((1, 0), torch.int64)
    assert tokenizer.decode([]) == ""


# ---------------------------------------------------------------------- untrusted text


@given(text=texts)
def test_plain_text_spells_no_special_token_and_comes_back(llama_like: OpenLlamaTokenizer, text: str) -> None:
    ids = llama_like(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not set(ids) & set(llama_like.all_special_ids)
    assert llama_like.decode(ids) == text.replace("▁", " ")
    assert llama_like.convert_tokens_to_ids(llama_like.tokenize(text, split_special_tokens=True)) == ids


def test_plain_text_spells_no_special_token_that_the_model_file_itself_would_take_for_one(tmp_path: Path) -> None:
    path = write_folder(tmp_path, trained("v1-like", user_defined_symbols="<|user|>")) / "tokenizer.model"
    for legacy in (True, False):
        tokenizer = OpenLlamaTokenizer(path, additional_special_tokens=["<|user|>"], legacy=legacy)
        assert 4 in tokenizer.encode("to <|user|> be")
        ids = tokenizer.encode("to <|user|> be</s>", split_special_tokens=True, add_special_tokens=False)
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids) == "to <|user|> be</s>"


# ---------------------------------------------------------------------- ids and tokens


def test_ids_decode_from_ints_sequences_arrays_and_tensors(tokenizer: OpenLlamaTokenizer) -> None:
    ids = tokenizer.encode("to be 明月")
    for form in (ids, tuple(ids), np.array(ids), torch.tensor(ids), torch.tensor(ids, dtype=torch.int32)):
        assert tokenizer.decode(form, skip_special_tokens=True) == "to be 明月"
    assert tokenizer.decode(2) == tokenizer.decode(torch.tensor(2)) == "</s>"
    batch = tokenizer(["to be", "明月"], padding=True, return_tensors="pt").input_ids
    assert tokenizer.batch_decode(batch, skip_special_tokens=True) == ["to be", "明月"]


def test_added_tokens_get_the_next_ids_and_are_never_split(tokenizer: OpenLlamaTokenizer) -> None:
    size = tokenizer.vocab_size
    assert tokenizer.add_tokens(["<a>", "<ab>", "<a>", "</s>"]) == 2
    assert tokenizer.add_special_tokens({"sep_token": AddedToken("<|sep|>")}) == 1
    assert len(tokenizer) == len(tokenizer.get_vocab()) == size + 3
    assert tokenizer.convert_tokens_to_ids(["<a>", "<ab>", "<|sep|>"]) == [size, size + 1, size + 2]
    assert tokenizer.convert_ids_to_tokens([size, size + 1, size + 2]) == ["<a>", "<ab>", "<|sep|>"]
    assert tokenizer.tokenize("<ab><a><|sep|>") == ["<ab>", "<a>", "<|sep|>"]
    tokenizer.add_tokens(["<x", "<xyz", "<xy"])
    assert tokenizer.tokenize("<xyz<xy<x") == ["<xyz", "<xy", "<x"]
    assert size + 2 in tokenizer.all_special_ids


def test_a_special_token_can_be_reassigned_by_name_or_id(tokenizer: OpenLlamaTokenizer) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == 2
    tokenizer.pad_token_id = 0
    assert tokenizer.pad_token == "<unk>"
    tokenizer.bos_token = None
    assert tokenizer.bos_token_id is None
    tokenizer.add_bos_token = True
    with pytest.raises(TokenizerError, match="add_bos_token is on, but the tokenizer has no bos_token"):
        tokenizer("to be")
    with pytest.raises(TokenizerError, match="'<nothing>' is not in the vocabulary; use add_special_tokens"):
        tokenizer.eos_token = "<nothing>"


# ---------------------------------------------------------------------- streaming


@pytest.fixture(scope="module", params=[*TRAINED, *REAL])
def streamed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenLlamaTokenizer:
    tokenizer = bare(tmp_path_factory.mktemp("stream"), request.param)
    tokenizer.add_tokens(["<|user|>", "\n\n\t"])
    return tokenizer


@given(data=st.data())
def test_streamed_pieces_put_together_are_the_decoded_whole(streamed: OpenLlamaTokenizer, data: st.DataObject) -> None:
    last = len(streamed) - 1
    some = st.integers(0, last) | st.integers(0, 140) | st.integers(last - 3, last)
    ids = data.draw(st.lists(some, max_size=30) | texts.map(streamed.encode))
    stream = StreamDecoder(streamed)
    for _ in range(2):  # a finished decoder starts anew
        assert "".join(map(stream.push, ids)) + stream.finish() == streamed.decode(ids, skip_special_tokens=True)


@given(text=texts)
def test_a_stream_never_shows_half_a_character(llama_like: OpenLlamaTokenizer, text: str) -> None:
    stream = StreamDecoder(llama_like)
    pieces = [stream.push(n) for n in llama_like.encode(text, split_special_tokens=True)]
    assert stream.finish() == ""
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_characters_of_several_bytes_come_whole_with_their_last_byte(llama_like: OpenLlamaTokenizer) -> None:
    ids = llama_like.encode("龘😀", add_special_tokens=False)
    stream = StreamDecoder(llama_like)
    assert [stream.push(n) for n in ids][-7:] == ["", "", "龘", "", "", "", "😀"]
    assert [stream.push(n) for n in ids[-4:-1]] == ["", "", ""]
    assert stream.finish() == "\ufffd" * 3


def test_half_a_character_is_given_up_as_soon_as_a_letter_follows(llama_like: OpenLlamaTokenizer) -> None:
    first, letter, second = llama_like.convert_tokens_to_ids(["<0xE9>", "e", "<0xBE>"])
    stream = StreamDecoder(llama_like)
    assert [stream.push(n) for n in (first, letter, second)] == ["", "\ufffde", "\ufffd"]


# ---------------------------------------------------------------------- files


def test_a_saved_tokenizer_reads_back_the_same(folder: Path, tokenizer: OpenLlamaTokenizer, tmp_path: Path) -> None:
    tokenizer.add_tokens(["<a>", "明月光霜"])
    tokenizer.save_pretrained(tmp_path / "deep" / "copy")
    again = OpenLlamaTokenizer.from_pretrained(tmp_path / "deep" / "copy")
    text = "a </s> b<a>明月光霜<pad> 1234"
    assert again(text) == tokenizer(text)
    assert again.extra["note"] == "kept"
    assert (tmp_path / "deep" / "copy" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    OpenLlamaTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "deep" / "copy")
    assert not (tmp_path / "deep" / "copy" / "added_tokens.json").exists()


def test_paths_of_another_machine_are_not_carried_on(folder: Path, tmp_path: Path) -> None:
    write_folder(folder, trained("v1-like"), tokenizer_config={"name_or_path": "elsewhere", "vocab_file": "elsewhere"})
    OpenLlamaTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert "elsewhere" not in (tmp_path / "copy" / "tokenizer_config.json").read_text()


def test_a_tokenizer_can_be_pickled_and_copied(tokenizer: OpenLlamaTokenizer) -> None:
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other("to be</s>") == tokenizer("to be</s>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", None, "tokenizer.model: no such file"),
        ("tokenizer.model", "", "is empty"),
        ("tokenizer.model", "hello", "not a sentencepiece model"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "holds a list, not a JSON object"),
        ("tokenizer_config.json", '{"padding_side": "up"}', "padding_side must be one of 'left', 'right', got 'up'"),
        ("special_tokens_map.json", '{"pad_token": 3}', "pad_token must be a non-empty string"),
        ("special_tokens_map.json", '{"pad_token": ""}', "pad_token must be a non-empty string"),
        ("special_tokens_map.json", '{"additional_special_tokens": "x"}', "must be a list of tokens"),
        ("added_tokens.json", '{"<a>": 500}', "gives '<a>' the id 500; in this vocabulary it would be 420"),
        ("added_tokens.json", '{"</s>": 420}', "gives '</s>' the id 420; in this vocabulary it is 2"),
        ("added_tokens.json", '{"<a>": "x"}', "'<a>' has the id 'x', which is not an integer"),
    ],
)
def test_broken_files_are_named(folder: Path, name: str, content: str | None, message: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=message) as raised:
        OpenLlamaTokenizer.from_pretrained(folder)
    assert str(folder) in str(raised.value)


def test_a_truncated_model_file_is_named(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(trained("v1-like")[:1000])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is not a sentencepiece model"):
        OpenLlamaTokenizer.from_pretrained(folder)


def test_an_added_token_that_the_model_file_has_under_the_same_id_is_accepted(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 3, "<a>": 420}))
    assert OpenLlamaTokenizer.from_pretrained(folder).convert_tokens_to_ids(["<pad>", "<a>"]) == [3, 420]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("ab\ud800c", {}, r"lone surrogate U\+D800 at position 2"),
        (["fine", "\udfff"], {}, r"text 1: lone surrogate U\+DFFF at position 0"),
        ([], {}, "non-empty list"),
        (None, {}, "must be a str or a non-empty list"),
        (b"bytes", {}, "text 0: text must be a str, got int"),
        (["a", 3], {}, "text 1: text must be a str, got int"),
        ("a", {"padding": "most"}, "padding must be one of"),
        ("a", {"truncation": "only_third"}, "truncation must be one of"),
        ("a", {"return_tensors": "tf"}, "return_tensors must be one of None, 'pt', 'np', got 'tf'"),
        ("a", {"max_length": 0}, "max_length must be a positive integer, got 0"),
        (["a", "a b c"], {"return_tensors": "pt"}, "input_ids of lengths . to . cannot be stacked; pass padding=True"),
    ],
)
def test_bad_calls_are_refused(tokenizer: OpenLlamaTokenizer, text: Any, options: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer(text, **options)


def test_lengths_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    tokenizer = bare(tmp_path, "v1-like", add_eos_token=True)
    with pytest.raises(TokenizerError, match="max_length 1 leaves no room for the 2 special tokens"):
        tokenizer("to be", truncation=True, max_length=1)
    with pytest.raises(TokenizerError, match="padding='max_length' needs max_length"):
        tokenizer("to be", padding="max_length")


@pytest.mark.parametrize("bad", [420, 100000, -1, -100])
def test_an_id_outside_the_vocabulary_is_named_with_its_size(tokenizer: OpenLlamaTokenizer, bad: int) -> None:
    with pytest.raises(TokenizerError, match=f"token id {bad} at position 1 is outside the vocabulary of 420 tokens"):
        tokenizer.decode([5, bad])
    for refuse in (tokenizer.decode, tokenizer.convert_ids_to_tokens, StreamDecoder(tokenizer).push):
        with pytest.raises(TokenizerError, match=f"token id {bad}.* is outside the vocabulary of 420 tokens"):
            refuse(bad)


@pytest.mark.parametrize("ids", [[[1, 2]], torch.ones(1, 2, dtype=torch.int64), [1.5], "12", None, {3}])
def test_what_is_no_sequence_of_ids_is_refused(tokenizer: OpenLlamaTokenizer, ids: Any) -> None:
    with pytest.raises(TokenizerError, match="one sequence of integers; batch_decode takes several"):
        tokenizer.decode(ids)


def test_what_is_no_token_is_refused(folder: Path, tokenizer: OpenLlamaTokenizer) -> None:
    with pytest.raises(TokenizerError, match="non-empty string or an AddedToken, got 3"):
        tokenizer.add_tokens([3])  # type: ignore[list-item]
    with pytest.raises(TokenizerError, match="king_token is neither an argument"):
        tokenizer.add_special_tokens({"king_token": "<k>"})
    with pytest.raises(TokenizerError, match="padding_sdie is neither an argument"):
        OpenLlamaTokenizer.from_pretrained(folder, padding_sdie="left")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.convert_tokens_to_ids("\ud800")


def test_a_model_whose_pieces_are_not_utf_8_is_refused(tmp_path):
    content = (TINY_CHECKPOINT / "tokenizer.model").read_bytes()
    place = content.index("▁the".encode())
    write = tmp_path / "tokenizer.model"
    write.write_bytes(content[: place + 1] + b"\xff" + content[place + 2 :])
    with pytest.raises(TokenizerError, match="is not a sentencepiece model"):
        OpenLlamaTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_a_side_that_is_assigned_is_checked(side):
    tokenizer = OpenLlamaTokenizer.from_pretrained(TINY_CHECKPOINT)
    setattr(tokenizer, side, "left")
    with pytest.raises(TokenizerError, match=f"{side} must be one of 'left', 'right', got 'lft'"):
        setattr(tokenizer, side, "lft")
    assert getattr(tokenizer, side) == "left"


@pytest.mark.parametrize("content", ["system", "s", "", "user:Hello"])
def test_an_answer_that_is_continued_stays_open_whatever_it_says(content):
    tokenizer = OpenLlamaTokenizer.from_pretrained(TINY_CHECKPOINT)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": content}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert text == f"user:Hello\nsystem:{content}"
    with pytest.raises(TokenizerError, match="exclude each other"):
        tokenizer.apply_chat_template(chat, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(TokenizerError, match="needs a message"):
        tokenizer.apply_chat_template([], continue_final_message=True)


def test_a_template_that_is_not_utf_8_is_refused(tmp_path):
    shutil.copy(TINY_CHECKPOINT / "tokenizer.model", tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"user\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not UTF-8"):
        OpenLlamaTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_that_cannot_be_written_leaves_the_folder_as_it_was(tmp_path):
    tokenizer = OpenLlamaTokenizer.from_pretrained(TINY_CHECKPOINT)
    tokenizer.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokenizer.extra["key"] = object()
    with pytest.raises(TypeError):
        tokenizer.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
