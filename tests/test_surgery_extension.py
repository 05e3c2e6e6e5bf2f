"""A model gets the vocabulary of another tokenizer: rows follow the text of tokens, whatever their ids are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from openllama import OpenLlamaForCausalLM, OpenLlamaTokenizer
from openllama.errors import InputError
from openllama.surgery import extend_vocabulary
from tests.checkpoints import tiny_config
from tests.sentencepieces import LINES, trained

OLD = {"vocab_size": 330, "pad_id": -1}  # as LLaMA: no padding
NEW = {"vocab_size": 420, "pad_id": 3}  # another order, 90 more pieces and <pad>


def tokenizers(folder: Path) -> tuple[OpenLlamaTokenizer, OpenLlamaTokenizer]:
    for name, options in (("old", OLD), ("new", NEW)):
        (folder / f"{name}.model").write_bytes(trained("v1-like", **options))
    return OpenLlamaTokenizer(folder / "old.model"), OpenLlamaTokenizer(folder / "new.model")


def tables(model: OpenLlamaForCausalLM) -> list[torch.Tensor]:
    head = [model.lm_head.weight] if isinstance(model.lm_head, torch.nn.Linear) else []
    return [model.get_input_embeddings().weight, *head]


def model_of(rows: int, **fields: Any) -> OpenLlamaForCausalLM:
    return OpenLlamaForCausalLM(tiny_config(vocab_size=rows, pad_token_id=None, **fields)).eval()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("spare", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_follow_the_text_of_tokens(tmp_path: Path, shared: bool, spare: int, dtype: torch.dtype) -> None:
    old, new = tokenizers(tmp_path)
    model = model_of(len(old) + spare, shared_input_output_embedding=shared).to(dtype)
    before = [table.detach().clone() for table in tables(model)]
    extend_vocabulary(model, old, new)
    assert model.config.vocab_size == len(new) == 420
    common = old.get_vocab().keys() & new.get_vocab().keys()
    moved = [token for token in common if old.get_vocab()[token] != new.get_vocab()[token]]
    assert len(moved) > 50
    for rows, earlier in zip(tables(model), before, strict=True):
        assert rows.dtype == dtype
        assert len(rows) == 420
        for token in common:
            assert torch.equal(rows[new.get_vocab()[token]], earlier[old.get_vocab()[token]]), token
        assert not rows[new.pad_token_id].any()
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (3, 1, 2)
    assert model.generation_config.pad_token_id == 3
    assert model.get_input_embeddings().padding_idx == 3


def test_a_new_piece_is_the_mean_of_its_parts(tmp_path: Path) -> None:
    old, new = tokenizers(tmp_path)
    model = model_of(len(old))
    before = model.get_input_embeddings().weight.detach().clone()
    extend_vocabulary(model, old, new)
    added = [token for token in new.get_vocab() if token not in old.get_vocab() and token != "<pad>"]
    checked = 0
    for token in added:
        if not token.startswith("▁") or "▁" in token[1:]:
            continue
        parts = old.tokenize(token[1:])  # which puts the space in front
        assert "".join(parts) == token
        mean = before[old.convert_tokens_to_ids(parts)].mean(0)
        assert torch.equal(model.get_input_embeddings().weight[new.get_vocab()[token]], mean), token
        checked += 1
    assert checked > 10


def test_a_piece_without_a_space_does_not_get_one(tmp_path: Path) -> None:
    old, _ = tokenizers(tmp_path)
    new = OpenLlamaTokenizer(tmp_path / "old.model")
    new.add_tokens("龘")  # three bytes to the old one, after the space that it puts in front
    model = model_of(len(old))
    before = model.get_input_embeddings().weight.detach().clone()
    extend_vocabulary(model, old, new)
    parts = old.convert_tokens_to_ids(["<0xE9>", "<0xBE>", "<0x98>"])
    assert torch.equal(model.get_input_embeddings().weight[-1], before[parts].mean(0))


def test_the_old_text_has_the_old_logits_and_the_model_is_saved(tmp_path: Path) -> None:
    old, new = tokenizers(tmp_path)
    model = model_of(len(old))
    tokens = ["<s>", *(token for token in old.tokenize(LINES[0]) if token in new.get_vocab())]
    there, here = (torch.tensor([tok.convert_tokens_to_ids(tokens)]) for tok in (old, new))
    before = model(there).logits
    extend_vocabulary(model, old, new)
    after = model(here).logits
    common = [token for token in old.get_vocab() if token in new.get_vocab()]
    rows, columns = old.convert_tokens_to_ids(common), new.convert_tokens_to_ids(common)
    torch.testing.assert_close(after[..., columns], before[..., rows])
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(OpenLlamaForCausalLM.from_pretrained(tmp_path / "saved")(here).logits, after)


def test_padding_of_the_model_keeps_its_token(tmp_path: Path) -> None:
    old, _ = tokenizers(tmp_path)
    model = model_of(len(old))
    model.config = dataclasses.replace(model.config, pad_token_id=2)
    extend_vocabulary(model, old, old)
    assert model.config.pad_token_id == 2


def test_a_model_of_fewer_rows_than_tokens_is_refused(tmp_path: Path) -> None:
    old, new = tokenizers(tmp_path)
    with pytest.raises(InputError, match="the old tokenizer has 330 tokens, the model only 329 rows"):
        extend_vocabulary(model_of(329), old, new)
