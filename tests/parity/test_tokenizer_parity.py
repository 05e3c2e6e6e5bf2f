"""Ids and text are those of transformers 4.31's ``LlamaTokenizer.from_pretrained`` of the same folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openllama.tokenizer import AddedToken, OpenLlamaTokenizer, StreamDecoder
from tests.oracle import compared, transformers
from tests.sentencepieces import (
    CORPORA,
    REAL,
    TINY_CHECKPOINT,
    TRAINED,
    corpus,
    model_bytes,
    texts,
    write_folder,
)

LlamaTokenizer = transformers.LlamaTokenizer
Pair = tuple[Any, OpenLlamaTokenizer]
EXAMPLES = settings().max_examples  # of the profile; each of the many pairs gets a part of them


def token(content: str, **flags: bool) -> dict[str, Any]:
    """An AddedToken as HF's files hold it."""
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, **flags}


def typed(content: str) -> dict[str, Any]:
    """The same in tokenizer_config.json."""
    return {"__type": "AddedToken", **token(content)}


#: the JSON files beside tokenizer.model; sizes of added ids count from the number of pieces
VARIANTS: dict[str, dict[str, Any]] = {
    "model file only": {},
    "v1 convention": {
        "tokenizer_config": {"add_bos_token": False, "add_eos_token": True, "bos_token": typed("<s>"),
                             "eos_token": typed("</s>"), "unk_token": typed("<unk>"), "pad_token": typed("<pad>"),
                             "model_max_length": 2048, "tokenizer_class": "LlamaTokenizer"},
        "special_tokens_map": {"bos_token": token("<s>"), "eos_token": token("</s>"), "unk_token": token("<unk>"),
                               "pad_token": token("<pad>")},
    },
    "strings that swallow spaces": {
        "tokenizer_config": {"pad_token": "<pad>", "padding_side": "left", "legacy": True},
        "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": token("<unk>"),
                               "pad_token": "<unk>", "additional_special_tokens": ["<|user|>", "\n\n"]},
    },
    "not legacy": {"tokenizer_config": {"legacy": False, "pad_token": "<pad>", "add_eos_token": True}},
    "not legacy, flags": {
        "tokenizer_config": {"legacy": None, "clean_up_tokenization_spaces": True, "cls_token": "to be"},
        "special_tokens_map": {"eos_token": token("</s>", lstrip=True), "mask_token": token("<pad>", rstrip=True),
                               "bos_token": "<s>", "pad_token": token("<s>")},
    },
    "added tokens": {
        "tokenizer_config": {"add_bos_token": False, "truncation_side": "left"},
        "special_tokens_map": {"eos_token": "</s>", "sep_token": "<|user|>", "pad_token": "[PAD]"},
        "added_tokens": {"<|user|>": 0, "[PAD]": 1, "play the": 2, "\n\n\t": 3, " zq": 4, "月光霜": 5},
    },
}  # fmt: skip
PAIRS = [("tiny", "as shipped"), *((model, variant) for model in (*TRAINED, *REAL) for variant in VARIANTS)]
SAMPLES = [("v1", "v1 convention"), ("v2", "not legacy"), ("v2", "model file only"), ("tiny", "as shipped")]


@pytest.fixture(scope="module", params=PAIRS, ids="/".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return both(variant_folder(tmp_path_factory.mktemp("tokenizer"), *request.param))


def variant_folder(folder: Path, model: str, variant: str) -> Path:
    if model == "tiny":
        if not (TINY_CHECKPOINT / "tokenizer.model").is_file():
            pytest.skip(f"no tokenizer in checkpoints/{TINY_CHECKPOINT.name}")
        return TINY_CHECKPOINT
    files = dict(VARIANTS[variant])
    if "added_tokens" in files:
        pieces = OpenLlamaTokenizer.from_pretrained(write_folder(folder, model_bytes(model))).vocab_size
        files["added_tokens"] = {name: pieces + i for name, i in files["added_tokens"].items()}
    return write_folder(folder, model_bytes(model), **files)


def both(folder: Path) -> Pair:
    return LlamaTokenizer.from_pretrained(str(folder)), OpenLlamaTokenizer.from_pretrained(folder)


def assert_same(pair: Pair, text: str) -> None:
    hf, ours = pair
    try:
        expected = hf(text)
    except IndexError:  # not legacy: HF cannot take a stretch that sentencepiece leaves nothing of
        assert not hf.legacy
        assert ours(text)
        return
    assert ours(text) == dict(expected)
    assert ours.tokenize(text) == hf.tokenize(text)
    assert_same_text(pair, expected["input_ids"])
    compared["tokenizer texts"] += 1


def assert_same_text(pair: Pair, ids: list[int]) -> None:
    hf, ours = pair
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == hf.decode(ids, skip_special_tokens=skip)
    stream = StreamDecoder(ours)
    plain = hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(map(stream.push, ids)) + stream.finish() == plain


def assert_same_settings(hf: Any, ours: OpenLlamaTokenizer) -> None:
    names = ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "padding_side", "truncation_side",
             "model_max_length", "vocab_size", "bos_token", "eos_token", "unk_token", "bos_token_id", "eos_token_id",
             "unk_token_id")  # fmt: skip
    assert {name: getattr(ours, name) for name in names} == {name: getattr(hf, name) for name in names}
    assert len(ours) == len(hf)
    assert ours.all_special_tokens == list(dict.fromkeys(hf.all_special_tokens))
    assert set(ours.all_special_ids) == set(hf.all_special_ids)
    if hf.pad_token is not None:
        assert (ours.pad_token, ours.pad_token_id) == (hf.pad_token, hf.pad_token_id)


@settings(max_examples=EXAMPLES * 3 // 10)
@given(text=texts)
def test_any_text_has_the_same_ids_and_comes_back_the_same(pair: Pair, text: str) -> None:
    assert_same(pair, text)


@settings(max_examples=EXAMPLES * 3 // 10)
@given(data=st.data())
def test_any_ids_give_the_same_text(pair: Pair, data: st.DataObject) -> None:
    hf, ours = pair
    last = len(ours) - 1
    often = st.sampled_from([*ours.all_special_ids, *range(last - 5, last + 1)]) | st.integers(0, min(270, last))
    ids = data.draw(st.lists(st.integers(0, last) | often, max_size=20))
    assert_same_text(pair, ids)
    for clean in (False, True):
        options = {"clean_up_tokenization_spaces": clean}
        assert ours.decode(ids, **options) == hf.decode(ids, **options)
    tokens = hf.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens(ids) == tokens
    assert ours.convert_tokens_to_ids(tokens) == hf.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_string(tokens) == hf.convert_tokens_to_string(tokens)
    compared["tokenizer texts"] += 1


@settings(max_examples=EXAMPLES // 10)
@given(tokens=st.lists(texts, max_size=5))
def test_any_strings_convert_as_tokens_the_same(pair: Pair, tokens: list[str]) -> None:
    hf, ours = pair
    assert ours.convert_tokens_to_ids(tokens) == hf.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_string(tokens) == hf.convert_tokens_to_string(tokens)


def test_settings_vocabulary_and_special_tokens_are_the_same(pair: Pair) -> None:
    hf, ours = pair
    assert_same_settings(hf, ours)
    assert ours.get_vocab() == hf.get_vocab()


def draw_settings(data: st.DataObject, *tokenizers: Any) -> None:
    """Give tokenizers the same drawn sides, and bos and eos or not."""
    choices = dict.fromkeys(("padding_side", "truncation_side"), st.sampled_from(["left", "right"]))
    choices |= dict.fromkeys(("add_bos_token", "add_eos_token"), st.booleans())
    for name, values in choices.items():
        value = data.draw(values, name)
        for tokenizer in tokenizers:
            setattr(tokenizer, name, value)


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
@pytest.mark.parametrize("model", ["v1-like", "llama-like", "tiny"])
@settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_batches_are_padded_and_cut_the_same(
    tmp_path_factory: pytest.TempPathFactory, model: str, data: st.DataObject
) -> None:
    hf, ours = both(variant_folder(tmp_path_factory.mktemp("batch"), model, "v1 convention"))
    assume(hf.pad_token is not None)
    draw_settings(data, hf, ours)
    padding = data.draw(st.sampled_from([False, True, "longest", "max_length", "do_not_pad"]), "padding")
    options = {
        "padding": padding,
        "truncation": data.draw(st.sampled_from([None, True, False, "only_first"]), "truncation"),
        "max_length": data.draw(st.integers(3, 12) if padding == "max_length" else st.none() | st.integers(3, 12)),
        "add_special_tokens": data.draw(st.booleans(), "add_special_tokens"),
    }
    batch = data.draw(st.lists(texts, min_size=1, max_size=4))
    assert ours(batch, **options) == dict(hf(batch, **options))
    assert ours(batch[0], **options) == dict(hf(batch[0], **options))
    assert ours.encode(batch[0], **options) == hf.encode(batch[0], **options)
    if padding in (True, "longest") and any(ours(batch)["input_ids"]):
        expected, got = hf(batch, **options, return_tensors="pt"), ours(batch, **options, return_tensors="pt")
        if expected["input_ids"].numel():
            assert all(got[name].equal(expected[name]) for name in ("input_ids", "attention_mask"))
    compared["tokenizer texts"] += len(batch)


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
@pytest.mark.parametrize("model", ["v1-like", "llama-like"])
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_pairs_and_their_masks_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, model: str, data: st.DataObject
) -> None:
    hf, ours = both(variant_folder(tmp_path_factory.mktemp("pairs"), model, "v1 convention"))
    draw_settings(data, hf, ours)
    flags = ("return_token_type_ids", "return_special_tokens_mask", "return_attention_mask", "add_special_tokens")
    options = {name: data.draw(st.booleans(), name) for name in flags}
    assume(options["add_special_tokens"] or not options["return_token_type_ids"])  # which HF refuses
    truncation = data.draw(st.sampled_from([None, True, False, "only_first", "only_second", "longest_first"]))
    options |= {
        "truncation": truncation,
        "padding": data.draw(st.sampled_from([False, True, "max_length"]), "padding"),
        "max_length": data.draw(st.sampled_from([None, 4, 8, 12, 16]), "max_length"),
        "pad_to_multiple_of": data.draw(st.sampled_from([None, 4]), "pad_to_multiple_of"),
    }
    columns = [data.draw(st.lists(texts, min_size=2, max_size=2)) for _ in range(data.draw(st.integers(1, 2)))]
    assume(len(columns) == 2 or truncation != "only_second")  # which HF ignores
    expected = [dict(hf(*columns, **options)), dict(hf(*(column[0] for column in columns), **options))]
    cuts = truncation or (truncation is None and options["max_length"] and not options["padding"])
    room = (options["max_length"] or ours.model_max_length) if cuts else 10**9
    # where one text alone is too long HF logs an error and does not cut
    assume(all(len(row) <= room for row in (*expected[0]["input_ids"], expected[1]["input_ids"])))
    got = [ours(*columns, **options), ours(*(column[0] for column in columns), **options)]
    assert got == expected
    compared["tokenizer texts"] += 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("truncation", [True, "only_first", "only_second"])
def test_pairs_are_cut_the_same_at_every_length(tmp_path: Path, side: str, truncation: bool | str) -> None:
    hf, ours = both(variant_folder(tmp_path, "v1-like", "v1 convention"))
    hf.truncation_side = ours.truncation_side = side
    long, short = "to be or not to be", "明月"
    for pair in ((long, short), (short, long), (long, long), (short, short)):
        lengths = [len(ours.encode(text, add_special_tokens=False)) for text in pair]
        other = 0 if truncation is True else lengths[truncation == "only_first"]
        for max_length in range(2 + other + 1, 2 + sum(lengths) + 2):
            options = {"truncation": truncation, "max_length": max_length, "return_token_type_ids": True}
            assert ours(*pair, **options) == dict(hf(*pair, **options))


def test_unknown_text_that_becomes_the_name_of_an_added_token_is_that_token(tmp_path: Path) -> None:
    hf, ours = both(variant_folder(tmp_path, "no bytes", "model file only"))
    for tokenizer in (hf, ours):
        tokenizer.add_tokens(["@#"])
    assert ours.encode("a ＠＃ b") == hf.encode("a ＠＃ b")
    assert len(ours) - 1 in ours.encode("a ＠＃ b")


@pytest.mark.parametrize("model", ["v1-like", "llama-like"])
def test_what_is_built_of_ids_is_the_same(tmp_path: Path, model: str) -> None:
    hf, ours = both(variant_folder(tmp_path, model, "v1 convention"))
    for add_bos, add_eos in [(False, True), (True, True), (True, False)]:
        hf.add_bos_token = ours.add_bos_token = add_bos
        hf.add_eos_token = ours.add_eos_token = add_eos
        for ids in ([[5, 6, 7]], [[5, 6], [7]], [[], [8]]):
            assert ours.build_inputs_with_special_tokens(*ids) == hf.build_inputs_with_special_tokens(*ids)
            assert ours.get_special_tokens_mask(*ids) == hf.get_special_tokens_mask(*ids)
        for pair in (False, True):
            assert ours.num_special_tokens_to_add(pair) == hf.num_special_tokens_to_add(pair)
    marked = {"already_has_special_tokens": True}
    assert ours.get_special_tokens_mask([1, 5, 2, 0, 3], **marked) == hf.get_special_tokens_mask(
        [1, 5, 2, 0, 3], **marked
    )
    assert ours.special_tokens_map == hf.special_tokens_map
    for length in (5, 8):
        single = {"input_ids": [5, 6, 2]}
        for kind in ("pt", "np"):
            options = {"padding": "max_length", "max_length": length, "pad_to_multiple_of": 4, "return_tensors": kind}
            expected, got = hf.pad(single, **options), ours.pad(single, **options)
            assert {name: row.tolist() for name, row in got.items()} == {
                name: row.tolist() for name, row in expected.items()}  # fmt: skip


def test_hf_reads_what_we_save_and_we_read_what_hf_saves(pair: Pair, tmp_path: Path) -> None:
    hf, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    hf.save_pretrained(str(tmp_path / "hf"))
    for folder in ("ours", "hf"):
        again = (
            LlamaTokenizer.from_pretrained(str(tmp_path / folder)),
            OpenLlamaTokenizer.from_pretrained(tmp_path / folder),
        )
        assert_same_settings(again[0], ours)
        assert_same_settings(again[0], again[1])
        for text in ("a  </s> b<pad>\n\n<|user|> the x", " <unk>play the 月光霜 [PAD] .<s>"):
            assert again[0](text) == hf(text)
            assert_same(again, text)


def test_added_tokens_are_the_same(tmp_path: Path) -> None:
    hf, ours = both(variant_folder(tmp_path, "v1-like", "not legacy, flags"))
    hf_token = transformers.AddedToken
    assert ours.add_tokens(["<a>", "e", "<a>", "<b>"]) == hf.add_tokens(["<a>", "e", "<a>", "<b>"]) == 2
    assert ours.add_tokens("<c>") == hf.add_tokens("<c>") == 1
    ours.add_special_tokens({"pad_token": AddedToken("<p>", rstrip=True), "additional_special_tokens": ["<a>", "<d>"]})
    hf.add_special_tokens({"pad_token": hf_token("<p>", rstrip=True), "additional_special_tokens": ["<a>", "<d>"]})
    keep = {"replace_additional_special_tokens": False}
    assert ours.add_special_tokens({"additional_special_tokens": ["<d>", "e"]}, **keep) == 0
    assert hf.add_special_tokens({"additional_special_tokens": ["<d>", "e"]}, **keep) == 0
    ours.eos_token = hf.eos_token = "<b>"
    ours.bos_token_id = hf.bos_token_id = 5
    assert_same_settings(hf, ours)
    for text in ("x <a> y <b> the <c> <d> z <p> </s>", "<p> <p>the<a><a> "):
        assert_same((hf, ours), text)


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("pair", SAMPLES, ids="/".join, indirect=True)
def test_lines_of_the_corpora_have_the_same_ids_and_text(pair: Pair, name: str) -> None:
    lines = corpus(name)
    for line in random.Random(0).sample(lines, 150):
        assert_same(pair, line)
