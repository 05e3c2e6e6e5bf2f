"""Arguments of transformers that are not taken: accepted where they ask for nothing, else refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from openllama import OpenLlamaForCausalLM
from openllama.dropin import GENERATING, LOADING, SAVING, Foreign
from openllama.errors import InputError
from tests.checkpoints import assert_same_tensors
from tests.generating import count_forwards
from tests.tiny import tiny_ids, tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "dropin.md"
#: values for those of which "something" says nothing
ASKS = dict.fromkeys(
    ("weights_only", "save_peft_format", "save_original_format", "safe_serialization", "save_config"), False
)


def cases(table: dict[str, Foreign]) -> list[Any]:
    return [pytest.param(name, of, id=name) for name, of in table.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "of"), cases(LOADING))
def test_an_argument_of_loading_that_asks_for_something_is_refused_by_name(
    folder: Path, name: str, of: Foreign
) -> None:
    with pytest.raises(InputError, match=f"from_pretrained does not take {name}") as caught:
        OpenLlamaForCausalLM.from_pretrained(folder, **{name: ASKS.get(name, "something")})
    assert str(caught.value).endswith(of.instead)
    for value in of.neutral:
        loaded = OpenLlamaForCausalLM.from_pretrained(folder, **{name: value})
        assert_same_tensors(loaded.state_dict(), tiny_model().state_dict())


@pytest.mark.parametrize(("name", "of"), cases(SAVING))
def test_an_argument_of_saving_that_asks_for_something_is_refused_by_name(
    tmp_path: Path, name: str, of: Foreign
) -> None:
    with pytest.raises(InputError, match=f"save_pretrained does not take {name}") as caught:
        tiny_model().save_pretrained(tmp_path / "x", **{name: ASKS.get(name, "something")})
    assert str(caught.value).endswith(of.instead)
    assert not (tmp_path / "x").exists()
    tiny_model().save_pretrained(tmp_path / "x", **{name: of.neutral[-1]})
    assert (tmp_path / "x" / "model.safetensors").is_file()


@pytest.mark.parametrize(("name", "of"), cases(GENERATING))
def test_an_argument_of_generate_that_asks_for_something_is_refused_by_name(name: str, of: Foreign) -> None:
    model, calls = tiny_model(), []
    count_forwards(model, calls)
    with pytest.raises(InputError, match=f"generate does not take {name}") as caught:
        model.generate(tiny_ids(), max_new_tokens=2, **{name: "something"})
    assert str(caught.value).endswith(of.instead)
    assert calls == []
    for value in of.neutral:
        ids = model.generate(tiny_ids(), max_new_tokens=2, **{name: value})
        assert torch.equal(ids, model.generate(tiny_ids(), max_new_tokens=2))


def test_a_value_is_shown_if_it_is_short_and_0_is_not_false(folder: Path) -> None:
    for value, shown in ((0, "revision=0"), (False, "revision=False"), (torch.ones(2), r"revision \(Tensor\)")):
        with pytest.raises(InputError, match=f"does not take {shown}: nothing is downloaded"):
            OpenLlamaForCausalLM.from_pretrained(folder, revision=value)
    with pytest.raises(InputError, match="load_in_8bit=0"):
        OpenLlamaForCausalLM.from_pretrained(folder, load_in_8bit=0)


def test_a_method_that_the_page_lists_is_refused_by_name() -> None:
    """And none has come to be since; of a config only those that no config.json brings."""
    tables = re.split(r"^\| of a (model|config) \|", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert tables[1::2] == ["model", "config"]
    listed = [
        [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)]
        for table in tables[2::2]
    ]
    assert len(listed[0]) > 25
    assert len(listed[1]) > 15
    for names, one in zip(listed, (tiny_model(), tiny_model().config), strict=True):
        for name in names:
            with pytest.raises(AttributeError, match=name):
                getattr(one, name)


def test_the_page_lists_what_is_not_taken() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in (*LOADING, *SAVING, *GENERATING) if f"`{name}`" not in page] == []
