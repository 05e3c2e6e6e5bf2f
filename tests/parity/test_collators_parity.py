"""The collators of transformers 4.31.0 make the same batches with our tokenizer as with ``LlamaTokenizer``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openllama.tokenizer import OpenLlamaTokenizer
from tests.oracle import transformers
from tests.sentencepieces import trained, write_folder

TEXTS = ["To be, or not to be", "明月", "", "the players play"]


@pytest.fixture(params=["left", "right"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, OpenLlamaTokenizer]:
    settings = {"padding_side": request.param, "add_eos_token": True, "model_max_length": 64}
    map_ = {"pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<unk>"}
    folder = write_folder(tmp_path, trained("v1-like"), tokenizer_config=settings, special_tokens_map=map_)
    return transformers.LlamaTokenizer.from_pretrained(str(folder)), OpenLlamaTokenizer.from_pretrained(folder)


def examples(tokenizer: Any, **columns: list[Any]) -> list[dict[str, Any]]:
    rows = [dict(tokenizer(text)) for text in TEXTS]
    return [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)]


def assert_same_batches(pair: tuple[Any, OpenLlamaTokenizer], make: Any, **columns: list[Any]) -> None:
    hf, ours = (make(one)(copy.deepcopy(examples(one, **columns))) for one in pair)
    assert set(ours) == set(hf)
    for name, expected in hf.items():
        assert type(ours[name]) is type(expected)
        assert ours[name].dtype == expected.dtype
        assert np.array_equal(ours[name], expected)


@pytest.mark.parametrize("kind", ["pt", "np"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_a_classifiers_collator(pair: Any, kind: str, multiple: int | None) -> None:
    def make(tokenizer: Any) -> Any:
        return transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple, return_tensors=kind)

    assert_same_batches(pair, make, label=[0, 1, 1, 0])
    assert_same_batches(pair, make, label_ids=[[0.5, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize("kind", ["pt", "np"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_a_language_models_collator(pair: Any, kind: str, multiple: int | None) -> None:
    def make(tokenizer: Any) -> Any:
        return transformers.DataCollatorForLanguageModeling(
            tokenizer, mlm=False, pad_to_multiple_of=multiple, return_tensors=kind
        )

    assert_same_batches(pair, make)


def test_a_language_models_collator_on_bare_ids(pair: Any) -> None:
    hf, ours = (
        transformers.DataCollatorForLanguageModeling(one, mlm=False)([one.encode(text) for text in TEXTS])
        for one in pair
    )
    assert torch.equal(ours["input_ids"], hf["input_ids"])
    assert torch.equal(ours["labels"], hf["labels"])


def test_a_masked_language_models_collator(pair: Any) -> None:
    batches = []
    for one in pair:
        torch.manual_seed(0)
        batches.append(transformers.DataCollatorForLanguageModeling(one, mlm=True)(examples(one)))
    assert all(torch.equal(batches[1][name], expected) for name, expected in batches[0].items())


@pytest.mark.parametrize("multiple", [None, 8])
def test_a_collator_that_pads_labels(pair: Any, multiple: int | None) -> None:
    def make(tokenizer: Any) -> Any:
        return transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)

    assert_same_batches(pair, make, labels=[[5, 6, 7], [8], [], [9, 9]])
    assert_same_batches(pair, make, labels=[[5], [8], [9], [-100]], special_tokens_mask=pair[1](
        TEXTS, return_special_tokens_mask=True)["special_tokens_mask"])  # fmt: skip


def test_a_dataloader_with_a_collator(pair: Any) -> None:
    ours = pair[1]
    loader = torch.utils.data.DataLoader(
        examples(ours), batch_size=2, collate_fn=transformers.DataCollatorWithPadding(ours), num_workers=1
    )
    assert [tuple(batch["input_ids"].shape) for batch in loader] == [
        tuple(ours(TEXTS[i : i + 2], padding=True, return_tensors="pt").input_ids.shape) for i in (0, 2)
    ]
