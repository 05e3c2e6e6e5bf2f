"""The classifier: which token decides, what labels may be, and that nothing is computed before they are checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaForSequenceClassification
from openllama.errors import InputError
from tests.draw import examples
from tests.parity.draws import configs, randomise_norms, seeds
from tests.tiny import tiny_ids, tiny_model

REGRESSION, SINGLE, MULTI = "regression", "single_label_classification", "multi_label_classification"


def classifier(**fields: Any) -> OpenLlamaForSequenceClassification:
    return tiny_model(OpenLlamaForSequenceClassification, **fields)


def scores_of_all_tokens(model: OpenLlamaForSequenceClassification, **arguments: Any) -> Tensor:
    """(B, T, num_labels)"""
    return model.score(model.model(**arguments).last_hidden_state)


# ---- which token decides


@examples(40)
@given(data=st.data(), config=configs(num_labels=3), rows=st.integers(1, 4), length=st.integers(1, 9), seed=seeds)
def test_the_last_token_that_is_not_padding_decides_wherever_padding_is(
    data: st.DataObject, config: Any, rows: int, length: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = randomise_norms(OpenLlamaForSequenceClassification(config, attn_implementation="eager"), seed).eval()
    pad = config.pad_token_id
    tokens = st.integers(0, config.vocab_size - 1)
    drawn = st.lists(tokens if pad is None else tokens | st.just(config.padding_idx), min_size=length, max_size=length)
    ids = torch.tensor([data.draw(drawn.filter(lambda row: set(row) != {pad})) for _ in range(rows)])
    last = [max(t for t, token in enumerate(row) if token != pad) for row in ids.tolist()]
    assert torch.equal(model(ids).logits, scores_of_all_tokens(model, input_ids=ids)[range(rows), last])


@pytest.mark.parametrize(("ids", "last"), [
    ([0, 0, 0, 5, 6], 4), ([5, 0, 0, 6, 0], 3), ([0, 5, 0, 0, 0], 1), ([5, 6, 7, 8, 9], 4), ([5, 0, 0, 0, 0], 0),
])  # fmt: skip
def test_left_right_and_inner_padding(ids: list[int], last: int) -> None:
    model = classifier(pad_token_id=0)
    row = torch.tensor([ids])
    assert torch.equal(model(row).logits, scores_of_all_tokens(model, input_ids=row)[:, last])


def test_left_padding_does_not_change_the_answer() -> None:
    model = classifier(pad_token_id=0)
    alone = model(tiny_ids(1)).logits
    padded = F.pad(tiny_ids(1), (3, 0))
    mask, positions = (padded != 0).long(), (torch.arange(10) - 3).clamp(min=0)
    torch.testing.assert_close(model(padded, attention_mask=mask, position_ids=positions).logits, alone)


def test_the_last_embedding_decides() -> None:
    model = classifier(pad_token_id=0)
    embeds = torch.randn(3, 5, 24)
    assert torch.equal(model(inputs_embeds=embeds).logits, scores_of_all_tokens(model, inputs_embeds=embeds)[:, -1])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gradients_reach_the_deciding_token_and_those_before_it_only(backend: str) -> None:
    model = classifier(pad_token_id=0)
    model.set_attn_implementation(backend)
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output))
    seen: list[Tensor] = []
    logits = model(ids).logits
    seen[0].retain_grad()
    logits.sum().backward()
    assert seen[0].grad[0].any(-1).tolist() == [True, True, True, False, False]


def test_a_cache_serves_several_endings_of_a_text() -> None:
    model = classifier(pad_token_id=0)
    ids = tiny_ids(2, 7)
    whole = model(ids)
    beginning = model(ids[:, :4], use_cache=True)
    ending = model(ids[:, 4:], past_key_values=beginning.past_key_values)
    torch.testing.assert_close(ending.logits, whole.logits)
    assert ending.past_key_values.get_seq_length() == 7


def test_a_tuple_holds_loss_logits_and_cache() -> None:
    model = classifier()
    labels = torch.tensor([0, 1])
    out = model(tiny_ids(), labels=labels)
    loss, logits, past = model(tiny_ids(), labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    assert len(past) == 2
    assert list(model(tiny_ids(), use_cache=False)) == ["logits"]


# ---- losses


@pytest.mark.parametrize(("fields", "labels"), [
    ({"num_labels": 1}, torch.tensor([0.5, -2.0])),
    ({"num_labels": 1}, torch.tensor([[0.5], [-2.0]])),
    ({"num_labels": 1}, torch.tensor([3, 4])),
    ({"num_labels": 3, "problem_type": REGRESSION}, torch.randn(2, 3)),
])  # fmt: skip
def test_regression_is_the_mean_squared_error(fields: dict[str, Any], labels: Tensor) -> None:
    out = classifier(**fields)(tiny_ids(), labels=labels)
    torch.testing.assert_close(out.loss, (out.logits - labels.reshape(out.logits.shape)).square().mean())


def test_an_ignored_class_does_not_count() -> None:
    model = classifier(num_labels=3)
    both, first = (model(tiny_ids(), labels=torch.tensor([2, label])).loss for label in (1, -100))
    assert torch.equal(first, F.cross_entropy(model(tiny_ids()).logits[:1], torch.tensor([2])))
    assert both != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.int64])
def test_a_choice_for_each_label_is_taken_from_numbers_of_any_type(dtype: torch.dtype) -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    model = classifier(num_labels=3, problem_type=MULTI)
    out = model(tiny_ids(), labels=labels.to(dtype))
    assert torch.equal(out.loss, F.binary_cross_entropy_with_logits(out.logits, labels.float()))


def test_a_fixed_problem_type_wins_over_what_the_labels_look_like() -> None:
    labels = torch.tensor([0, 0])
    losses = [classifier(num_labels=1, problem_type=kind)(tiny_ids(), labels=labels).loss for kind in (
        REGRESSION, SINGLE, MULTI)]  # fmt: skip
    assert losses[1] == 0  # there is but one class
    assert len({loss.item() for loss in losses}) == 3


def test_training_brings_the_loss_down() -> None:
    model = classifier(hidden_dropout_prob=0.0, attention_dropout_prob=0.0, num_labels=3).train()
    ids, labels = tiny_ids(6), torch.tensor([0, 1, 2, 2, 1, 0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(model.eval()(ids).logits.argmax(-1), labels)


# ---- what is refused, and when


WRONG_LABELS = [
    ({}, torch.tensor([0, 1, 1]), r"single_label_classification must have shape \(2,\), got \(3,\)"),
    ({}, torch.tensor([[0, 1], [1, 0]]), r"must have shape \(2,\), got \(2, 2\)"),
    ({}, torch.tensor([0, 2]), "label 2 is outside the 2 classes of num_labels"),
    ({}, torch.tensor([0, -1]), "label -1 is outside the 2 classes of num_labels"),
    ({}, torch.tensor([0.0, 1.0]), r"multi_label_classification must have shape \(2, 2\), got \(2,\)"),
    ({"problem_type": SINGLE}, torch.tensor([0.0, 1.0]), "must be integers, got torch.float32"),
    ({"problem_type": SINGLE}, torch.tensor([True, False]), "must be integers, got torch.bool"),
    ({"problem_type": MULTI}, torch.tensor([0, 1]), r"must have shape \(2, 2\), got \(2,\)"),
    ({"problem_type": MULTI, "num_labels": 3}, torch.rand(3, 2), r"must have shape \(2, 3\), got \(3, 2\)"),
    ({"problem_type": REGRESSION, "num_labels": 3}, torch.rand(2), r"must have shape \(2, 3\), got \(2,\)"),
    ({"num_labels": 1}, torch.rand(1, 2), r"regression must have shape \(2,\), got \(1, 2\)"),
]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the modules that compute something, as they do it."""
    names: list[str] = []
    compute = torch.nn.Module.__call__

    def noted(self: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
        if not isinstance(self, OpenLlamaForSequenceClassification):
            names.append(type(self).__name__)
        return compute(self, *arguments, **named)

    monkeypatch.setattr(torch.nn.Module, "__call__", noted)
    return names


@pytest.mark.parametrize(("fields", "labels", "said"), WRONG_LABELS)
@pytest.mark.parametrize("embedded", [False, True])
def test_labels_that_do_not_fit_are_refused_before_anything_is_computed(
    fields: dict[str, Any], labels: Tensor, said: str, embedded: bool, computed: list[str]
) -> None:
    model = classifier(**fields)
    given = {"inputs_embeds": torch.randn(2, 7, 24)} if embedded else {"input_ids": tiny_ids()}
    with pytest.raises(InputError, match=said):
        model(**given, labels=labels)
    assert computed == []


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_row_of_nothing_but_padding_is_refused_before_anything_is_computed(backend: str, computed: list[str]) -> None:
    model = classifier(pad_token_id=4)
    model.set_attn_implementation(backend)
    ids = tiny_ids(3)
    ids[2] = 4
    with pytest.raises(InputError, match=r"row 2 of input_ids is nothing but padding \(id 4\)"):
        model(ids, labels=torch.tensor([0, 1, 0]))
    assert computed == []
    model(ids[:2])
    assert computed.count("DecoderLayer") == 2


@pytest.mark.parametrize(("ids", "said"), [
    ([[1, 2]], "must be a tensor, got list"),
    (torch.tensor([1, 2]), r"shape \(batch, length\), got \(2,\)"),
    (torch.zeros(2, 0, dtype=torch.long), "input_ids is empty"),
    (torch.zeros(1, 2), "must be integers, got torch.float32"),
    (torch.tensor([[1, 23]]), "token id 23 is outside the vocabulary of 23"),
])  # fmt: skip
def test_ids_are_judged_before_their_padding(ids: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        classifier(pad_token_id=0)(ids)


def test_neither_or_both_kinds_of_input_are_refused() -> None:
    with pytest.raises(InputError, match="got neither"):
        classifier()(labels=torch.tensor([0, 1]))
    with pytest.raises(InputError, match="got both"):
        classifier()(tiny_ids(), inputs_embeds=torch.randn(2, 7, 24), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("problem_type", [None, REGRESSION, SINGLE, MULTI])
def test_no_call_changes_the_config(problem_type: str | None) -> None:
    model = classifier(num_labels=3, problem_type=problem_type)
    before = model.config
    for labels in (None, torch.tensor([0, 1]), torch.rand(2, 3), torch.tensor([0, 5])):
        try:
            model(tiny_ids(), labels=labels)
        except InputError:
            assert labels is not None
        assert model.config is model.model.config is before


def test_integers_then_numbers_are_each_taken_for_what_they_are() -> None:
    model = classifier(num_labels=2)
    classes, choices = torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logits = model(tiny_ids(), labels=classes).logits
    loss = model(tiny_ids(), labels=choices).loss
    assert torch.equal(loss, F.binary_cross_entropy_with_logits(logits, choices))
    assert torch.equal(model(tiny_ids(), labels=classes).loss, F.cross_entropy(logits, classes))
