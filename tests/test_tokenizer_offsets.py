"""Each token has a place in the text: ``return_offsets_mapping``."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from openllama.tokenizer import AddedToken, OpenLlamaTokenizer
from openllama.tokenizer.offsets import spans
from tests.sentencepieces import REAL, TINY_CHECKPOINT, TRAINED, model_bytes, texts, trained, write_folder

Folder = pytest.TempPathFactory


@pytest.fixture(scope="module", params=[*TRAINED, *REAL])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: Folder) -> OpenLlamaTokenizer:
    path = write_folder(tmp_path_factory.mktemp("offsets"), model_bytes(request.param))
    tokenizer = OpenLlamaTokenizer.from_pretrained(path, add_bos_token=True, add_eos_token=True)
    tokenizer.add_tokens(["<|user|>", "\n\n\t", " zq"])
    tokenizer.add_special_tokens({"sep_token": AddedToken("[PAD]", lstrip=True)})
    return tokenizer


@pytest.mark.parametrize("legacy", [True, False])
@given(text=texts, plain=st.booleans())
def test_the_characters_of_a_token_are_those_it_was_made_of(
    tokenizer: OpenLlamaTokenizer, legacy: bool, text: str, plain: bool
) -> None:
    tokenizer.legacy = legacy
    options = {"add_special_tokens": False, "split_special_tokens": plain}
    encoding = tokenizer(text, return_offsets_mapping=True, **options)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    assert ids == tokenizer(text, **options)["input_ids"]
    assert len(offsets) == len(ids)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert offsets == sorted(offsets)
    pieces = tokenizer.tokenize(text, split_special_tokens=plain)
    for place, group in groupby(zip(pieces, offsets, strict=True), key=lambda pair: pair[1]):
        assert_made_of(tokenizer, text[slice(*place)], [piece for piece, _ in group])


def assert_made_of(tokenizer: OpenLlamaTokenizer, characters: str, pieces: list[str]) -> None:
    """The pieces of one place are what sentencepiece makes of its characters, or a part where places overlap."""
    if not tokenizer.legacy:
        characters = characters.replace("▁", " ")
    if pieces == [characters] or "<unk>" in pieces:
        return  # a token that is cut out, or characters without a piece
    normal = tokenizer.sp.normalize(characters).replace("▁", "")
    is_byte = tokenizer.sp.is_byte
    parts = [
        bytes([int(piece[3:5], 16)]) if is_byte(tokenizer.sp.piece_to_id(piece)) else piece.encode() for piece in pieces
    ]
    assert b"".join(parts).decode().replace("▁", "") in normal


@pytest.mark.parametrize("legacy", [True, False])
@given(text=texts)
@example(text="▁<|user|>")
def test_places_that_do_not_overlap_give_back_the_whole_text(
    tokenizer: OpenLlamaTokenizer, legacy: bool, text: str
) -> None:
    tokenizer.legacy = legacy
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    covered = {i for start, end in offsets for i in range(start, end)}
    is_space = [character.isspace() or character == "▁" for character in text]  # sentencepiece writes a space so
    lost = "".join(character for i, character in enumerate(text) if i not in covered and not is_space[i])
    assert not tokenizer.sp.normalize(lost), "only space, and what is normalised away, has no token"


def test_bos_eos_and_padding_have_no_place(tokenizer: OpenLlamaTokenizer) -> None:
    tokenizer.legacy, tokenizer.pad_token = True, tokenizer.eos_token
    batch = tokenizer(["to be", "to be or not to be"], padding=True, return_offsets_mapping=True)
    short, long = batch["offset_mapping"]
    assert short[0] == short[-1] == long[0] == long[-1] == (0, 0)
    assert [end for _, end in short if end][-1] == 5
    assert len(short) == len(long) == len(batch["input_ids"][0])
    for kind in ("pt", "np"):
        options = {"padding": True, "return_tensors": kind, "return_offsets_mapping": True}
        tensors = tokenizer(["to be", "to be or not to be"], **options)
        assert tensors.offset_mapping.tolist() == [[[*place] for place in row] for row in (short, long)]


def test_plain_text_that_is_spelt_like_a_control_token_is_unknown_with_or_without_places(tmp_path: Path) -> None:
    path = write_folder(tmp_path, trained("no bytes", bos_piece="@#"))
    tokenizer = OpenLlamaTokenizer.from_pretrained(path, add_bos_token=False)
    plain = tokenizer("a @#", split_special_tokens=True, return_offsets_mapping=True)
    assert plain.input_ids == tokenizer.encode("a @#", split_special_tokens=True)
    assert (plain.input_ids[-1], plain.offset_mapping[-1]) == (tokenizer.unk_token_id, (2, 4))


def test_places_are_characters_of_the_text_as_it_was_given() -> None:
    tokenizer = OpenLlamaTokenizer.from_pretrained(TINY_CHECKPOINT)
    text = "To be龘</s>x ﬁ e\u0301"
    encoding = tokenizer(text, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoding.input_ids)
    shown = [(token, text[start:end]) for token, (start, end) in zip(tokens, encoding.offset_mapping, strict=True)]
    assert shown[:7] == [("To", "To"), ("▁be", " be"), *[(f"<0x{byte:02X}>", "龘") for byte in "龘".encode()],
                         ("</s>", "</s>"), ("x", "x")]  # fmt: skip
    assert ("".join(token for token, part in shown if "ﬁ" in part), shown[-1][1]) == ("▁fi", "e\u0301")


def test_the_second_text_of_a_pair_has_places_of_its_own_and_what_is_cut_loses_them() -> None:
    tokenizer = OpenLlamaTokenizer.from_pretrained(TINY_CHECKPOINT, add_eos_token=True)
    pair = tokenizer("to be", "or not", return_offsets_mapping=True).offset_mapping
    first, second = (tokenizer(text, return_offsets_mapping=True).offset_mapping for text in ("to be", "or not"))
    assert pair == first + second
    for side in ("left", "right"):
        tokenizer.truncation_side = side
        short = tokenizer("to be or not", max_length=3, return_offsets_mapping=True)
        whole = tokenizer("to be or not", add_special_tokens=False, return_offsets_mapping=True)
        kept = slice(None, 2) if side == "right" else slice(-2, None)
        assert short.offset_mapping == [*whole.offset_mapping[kept], (0, 0)]
        assert short.input_ids[:2] == whole.input_ids[kept]


@pytest.mark.parametrize(
    ("pieces", "normal", "origin", "expected"),
    [
        (["▁f", "i", "▁n"], "▁fi▁n", [0, 0, 0, 1, 2, 3], [(0, 1), (0, 1), (1, 3)]),
        (["▁", "<0xC3>", "<0xA9>", "a"], "▁éa", [0, 0, 2, 3], [(0, 0), (0, 2), (0, 2), (2, 3)]),
        (["f", "i"], "▁fi", [0, 0, 1, 2], [(0, 1), (1, 2)]),  # the space in front was taken away
        (["▁a", "▁b"], "▁a▁b", [2, 2, 3, 6, 7], [(2, 3), (3, 7)]),  # squeezed spaces
        ([], "", [0], []),
    ],
)
def test_spans_by_worked_example(pieces: list[str], normal: str, origin: list[int], expected: Any) -> None:
    assert spans(pieces, [piece.startswith("<0x") for piece in pieces], normal, origin, True) == expected


def test_a_models_saliency_lands_on_the_words() -> None:
    tokenizer = OpenLlamaTokenizer.from_pretrained(TINY_CHECKPOINT)
    text = "Good morrow, neighbour"
    encoding = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    word = torch.tensor([start < 11 and end > 5 for start, end in encoding.offset_mapping[0].tolist()])
    assert tokenizer.decode(encoding.input_ids[0, word]) == " morrow"
