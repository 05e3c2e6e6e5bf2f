"""Log-probabilities and perplexity of given texts, of long ones in windows, and of continuations."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from openllama.errors import InputError
from openllama.generation import Score, score, score_continuations
from tests.generating import CONFIG, make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


TEXTS = [[5, 9, 13, 2], [7, 21], [3, 30, 8, 1, 12, 39, 4]]


@torch.no_grad()
def test_it_equals_the_models_own_logits_whatever_the_batches(model):
    for batch_size in (1, 2, 8):
        for ids, result in zip(TEXTS, score(model, TEXTS, batch_size), strict=True):
            text = torch.tensor(ids)
            expected = model(text[None, :-1]).logits[0].log_softmax(-1).gather(1, text[1:, None])[:, 0]
            torch.testing.assert_close(result.log_probs, expected)
            assert result.token_ids.tolist() == ids
            assert result.perplexity == pytest.approx(float(model(text[None], labels=text[None]).loss.exp()))


def test_perplexity_by_worked_example():
    result = Score(torch.tensor([0, 1, 2]), torch.tensor([1 / 2, 1 / 8]).log())
    assert result.perplexity == pytest.approx(4)
    assert result.total == pytest.approx(float(torch.tensor(1 / 16).log()))


def test_few_logits_exist_at_a_time(model, monkeypatch):
    sizes = []
    model.lm_head.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    whole = [result.log_probs for result in score(model, TEXTS)]
    assert sizes == [10]
    sizes.clear()
    monkeypatch.setattr(sys.modules[score.__module__], "CHUNK_LOGITS", 4 * CONFIG.vocab_size)
    torch.testing.assert_close([result.log_probs for result in score(model, TEXTS)], whole)
    assert sizes == [4, 4, 2]


@pytest.mark.filterwarnings("ignore:a sequence of 7 tokens")
def test_under_dynamic_rope_a_text_in_a_batch_scores_as_alone():
    model = make_model(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=4)
    together = score(model, TEXTS)
    alone = [score(model, [text])[0] for text in TEXTS]
    for left, right in zip(together, alone, strict=True):
        assert torch.equal(left.log_probs, right.log_probs)


def test_half_precision_is_scored_in_single():
    model = make_model().to(torch.bfloat16)
    assert score(model, TEXTS)[0].log_probs.dtype == torch.float32


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([[1, 2], [3]], r"sequence 1 has shape \(1,\).*two tokens"),
        ([[[1, 2]]], r"sequence 0 has shape \(1, 2\)"),
        ([[1, 40]], "40 is outside the vocabulary of 40"),
        ([[1.0, 2.0]], "integers"),
    ],
)
def test_bad_texts_are_refused(model, texts, message):
    with pytest.raises(InputError, match=message):
        score(model, texts)
    with pytest.raises(InputError, match="batch_size"):
        score(model, TEXTS, batch_size=0)


def test_no_texts_have_no_scores(model):
    assert score(model, []) == []


# ---------------------------------------------------------------------- long sequences


def long_ids(length: int) -> list[int]:
    return torch.randint(1, 40, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("length", [2, 7, 8, 9, 10, 14, 23])
@pytest.mark.parametrize("stride", [1, 3, 7])
@torch.no_grad()
def test_each_token_of_a_long_document_is_scored_once_with_enough_before_it(length, stride):
    model, context = make_model(max_position_embeddings=8), 8
    ids = torch.tensor(long_ids(length))
    expected = []
    for place in range(1, length):
        windows = [start for start in range(0, length, stride) if start < place < start + context]
        start = windows[0]  # the first window that holds a token scores it: the one that sees most before it
        assert place - start >= min(place, context - stride)
        logits = model(ids[None, start:place]).logits[0, -1]
        expected.append(logits.log_softmax(-1)[ids[place]])
    [result] = score(model, [ids], stride=stride)
    torch.testing.assert_close(result.log_probs, torch.stack(expected))
    assert torch.equal(result.token_ids, ids)


def test_a_text_that_fits_scores_as_without_a_stride(model):
    plain, strided = score(model, TEXTS), score(model, TEXTS, stride=5)
    assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(plain, strided, strict=True))


def test_long_and_short_documents_share_batches():
    model = make_model(max_position_embeddings=8)
    documents = [long_ids(23), [5, 9], long_ids(9), long_ids(8)]
    for together, ids in zip(score(model, documents, 3, stride=4), documents, strict=True):
        torch.testing.assert_close(together.log_probs, score(model, [ids], 1, stride=4)[0].log_probs)


def test_a_text_beyond_the_trained_length_warns_once_and_names_both_numbers():
    model = make_model(max_position_embeddings=8)
    with pytest.warns(UserWarning, match=r"23 tokens .* max_position_embeddings 8: .*; stride=4 scores it") as caught:
        score(model, [long_ids(23), long_ids(9)], 1)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"9 tokens .* max_position_embeddings 8") as caught:
        score_continuations(model, [(long_ids(5), [1, 2, 3, 4])])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(model, [long_ids(23)], stride=4)
        score(model, [long_ids(8)])


@pytest.mark.parametrize("stride", [0, 8, -1, 2.0])
def test_a_stride_that_leaves_no_context_is_refused(stride):
    with pytest.raises(InputError, match="stride must be from 1 to 7, less than max_position_embeddings 8, got"):
        score(make_model(max_position_embeddings=8), TEXTS, stride=stride)


# ---------------------------------------------------------------------- continuations


@torch.no_grad()
def test_a_continuation_is_scored_given_its_prompt(model):
    greedy = model.generate(torch.tensor([[5, 9, 13]]), max_new_tokens=4)[0, 3:].tolist()
    pairs = [([5, 9, 13], greedy), ([5, 9, 13], [*greedy[:3], (greedy[3] + 1) % 40]), ([7], [21, 3]), ([7, 21], [3])]
    results = score_continuations(model, pairs, batch_size=3)
    for (prompt, continuation), result in zip(pairs, results, strict=True):
        ids = torch.tensor([*prompt, *continuation])
        log_probs = model(ids[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        torch.testing.assert_close(result.log_probs, log_probs.gather(1, ids[len(prompt) :, None])[:, 0])
        assert result.total == pytest.approx(float(result.log_probs.sum()))
        assert result.is_greedy == torch.equal(log_probs.argmax(-1), ids[len(prompt) :])
    assert [result.is_greedy for result in results[:2]] == [True, False]
    whole = score(model, [[7, 21, 3]])[0]
    assert results[2].total == pytest.approx(whole.total)


@pytest.mark.parametrize(("pair", "message"), [(([], [1]), "prompt 0 has shape"), (([1], []), "continuation 0 has")])
def test_a_pair_needs_a_token_on_both_sides(model, pair, message):
    with pytest.raises(InputError, match=message):
        score_continuations(model, [pair])
    assert score_continuations(model, []) == []


# ---------------------------------------------------------------------- scores of what was generated

OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 5}


def test_transition_scores_of_greedy_search_are_the_log_probabilities_of_what_was_taken():
    model, ids = make_model(), torch.tensor([[5, 9, 13], [7, 3, 30]])
    output = model.generate(ids, **OUTPUTS)
    found = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    expected = [one.log_probs[2:] for one in score(model, output.sequences)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_transition_scores_of_beams_add_up_to_what_the_beams_were_ranked_by():
    model, ids = make_model(), torch.tensor([[5, 9, 13], [7, 3, 30]])
    output = model.generate(ids, num_beams=3, length_penalty=0.0, **OUTPUTS)
    found = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    assert found.shape == (2, 5)
    torch.testing.assert_close(found.sum(1), output.sequences_scores)


def test_transition_scores_of_what_is_no_output_are_refused():
    model, ids = make_model(), torch.tensor([[5, 9, 13], [7, 3, 30]])
    greedy, beams = model.generate(ids, **OUTPUTS), model.generate(ids, num_beams=3, num_return_sequences=3, **OUTPUTS)
    with pytest.raises(InputError, match="output_scores=True"):
        model.compute_transition_scores(greedy.sequences, None)
    for sequences, scores, indices in (
        (greedy.sequences[:, :4], greedy.scores, None),
        (beams.sequences, greedy.scores, None),
        (beams.sequences, beams.scores, greedy.sequences),
    ):
        with pytest.raises(InputError, match="are not of one output of generate"):
            model.compute_transition_scores(sequences, scores, indices)


# ---------------------------------------------------------------------- calls that would score something else


def test_a_tensor_with_padding_is_refused_and_lists_are_taken_as_they_are():
    model = make_model(pad_token_id=3)
    for row in ([[5, 9, 3], [7, 21, 4]], [[5, 9, 8], [3, 21, 4]]):
        with pytest.raises(InputError, match=r"a sequence begins or ends with padding \(id 3\)"):
            score(model, torch.tensor(row))
        assert len(score(model, row)) == 2
    assert len(score(make_model(pad_token_id=3, eos_token_id=3), torch.tensor([[5, 9, 3]]))) == 1


def test_a_model_that_drops_out_is_warned_of():
    model = make_model(hidden_dropout_prob=0.5).train()
    with pytest.warns(UserWarning, match=r"in training mode, .* call model\.eval\(\)"):
        score(model, TEXTS)


@pytest.mark.parametrize(
    ("arguments", "message"), [((["ab"],), "must be lists of ids"), (([[1, 2]], 1.5), "batch_size must be an integer")]
)
def test_arguments_of_another_type_are_refused(model, arguments, message):
    with pytest.raises(InputError, match=message):
        score(model, *arguments)
