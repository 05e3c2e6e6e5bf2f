"""Beam search against its definition: exhaustive search, sums of log-probabilities, what ends and when."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openllama.cache import PreallocatedCache
from openllama.generation import GenerationConfig
from openllama.generation.beam import Diversity, Group
from tests.draw import examples
from tests.generating import CONFIG, make_model

SCORES = {"return_dict_in_generate": True, "output_scores": True}


@pytest.fixture(scope="module")
def model():
    return make_model()


def log_probability(model, prompt: torch.Tensor, text: torch.Tensor) -> float:
    ids = torch.cat((prompt, text))
    log_probs = model(ids[None, :-1]).logits[0].log_softmax(-1)
    return float(log_probs[len(prompt) - 1 :].gather(1, text[:, None]).sum())


@torch.no_grad()
def test_with_as_many_beams_as_texts_it_finds_the_likeliest():
    model, prompt = make_model(vocab_size=5), torch.tensor([1, 4, 2])
    texts = [torch.tensor(text) for text in itertools.product(range(5), repeat=3)]
    best = sorted(texts, key=lambda text: log_probability(model, prompt, text))[::-1][:3]
    found = model.generate(prompt[None], num_beams=25, num_return_sequences=3, max_new_tokens=3)
    assert [row[3:].tolist() for row in found] == [text.tolist() for text in best]
    greedy = model.generate(prompt[None], max_new_tokens=3)
    assert log_probability(model, prompt, found[0, 3:]) >= log_probability(model, prompt, greedy[0, 3:])


@examples(20)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    groups=st.integers(1, 2),
    penalty=st.sampled_from((0.0, 1.0, -0.5)),
    eos=st.sampled_from((None, 2, [2, 3, 4])),
)
def test_beam_indices_lead_to_the_scores_that_make_up_the_sequences_scores(seed, batch, groups, penalty, eos):
    """In groups too, where transformers 4.31.0 has the rows of the first group only."""
    model = make_model(vocab_size=12, eos_token_id=eos)
    prompt = torch.randint(5, 12, (batch, 3), generator=torch.Generator().manual_seed(seed))
    output = model.generate(
        prompt,
        num_beams=4,
        num_beam_groups=groups,
        diversity_penalty=0.7 if groups > 1 else 0.0,
        num_return_sequences=4,
        length_penalty=penalty,
        max_new_tokens=7,
        **SCORES,
    )
    assert output.beam_indices.shape == output.sequences.shape == (4 * batch, output.sequences.shape[1])
    for text, rows, score in zip(output.sequences, output.beam_indices, output.sequences_scores, strict=True):
        new = int((rows >= 0).sum())
        ends = new < 7 or int(text[3 + new - 1]) in (model.generation_config.eos_token_ids or [])
        tokens = text[3 : 3 + new].tolist()
        total, finals = 0.0, [tokens[-1]]
        for step, (row, token) in enumerate(zip(rows[: new - 1].tolist(), tokens, strict=False)):
            total += float(output.scores[step][row, token])
        if ends and eos is not None:
            finals = [2] if eos == 2 else [2, 3, 4]  # which one ended it is not told
        sums = [total + float(output.scores[new - 1][rows[new - 1], final]) for final in finals]
        lengths = {3 + new, 3 + new - 1}
        assert any(abs(value / length**penalty - float(score)) < 1e-3 for value in sums for length in lengths)


def test_a_prompt_is_continued_in_a_batch_as_alone(model):
    prompts = torch.tensor([[5, 9, 13], [7, 21, 3]])
    together = model.generate(prompts, num_beams=3, max_new_tokens=8)
    alone = [model.generate(prompt[None], num_beams=3, max_new_tokens=8)[0] for prompt in prompts]
    assert torch.equal(together, torch.stack(alone))


def test_a_past_is_continued_without_changing_the_callers_cache(model):
    prompt = torch.tensor([[5, 9, 13, 2]])
    expected = model.generate(prompt, num_beams=3, max_new_tokens=6)
    for past in (None, PreallocatedCache(CONFIG, 1, 30)):
        with torch.no_grad():
            past = model(prompt[:, :3], past_key_values=past).past_key_values
        assert torch.equal(model.generate(prompt, num_beams=3, max_new_tokens=6, past_key_values=past), expected)
        assert past.get_seq_length() == 3
        assert past[0][0].shape[0] == 1


def test_many_eos_ids_leave_beams_to_go_on():
    """transformers 4.31.0 looks at 2 * num_beams candidates only, and raises where they all end."""
    model = make_model(vocab_size=12, eos_token_id=list(range(2, 12)))
    prompt = torch.tensor([[5, 9, 7]])
    assert model.generate(prompt, num_beams=3, max_new_tokens=5, num_return_sequences=3).shape[0] == 3
    everything = list(range(12))
    drawn = model.generate(prompt, num_beams=3, max_new_tokens=5, do_sample=True, eos_token_id=everything)
    assert drawn.shape == (1, 4), "where every token ends a text, one is made"


def test_a_caller_can_stop_beams_early_even_without_eos(model):
    """transformers 4.31.0 raises a TypeError: it writes an eos id that is not there."""
    prompt = torch.tensor([[5, 9, 13]])
    stop = [lambda ids, scores: ids.shape[1] >= 6]
    assert model.generate(prompt, num_beams=2, max_new_tokens=9, stopping_criteria=stop).shape == (1, 6)


def test_early_stopping_by_worked_example():
    def group(**settings) -> Group:
        group = Group([0, 1], GenerationConfig(num_beams=2, max_length=10, **settings))
        for total in (-4.0, -6.0):
            group.add(total, torch.zeros(4), torch.zeros(1))
        return group  # the worst finished text has -6 / 4 = -1.5

    assert group(early_stopping=True).cannot_improve(-0.1, 5)
    assert not group(early_stopping=False).cannot_improve(-5.0, 5)  # -1.0 now
    assert group(early_stopping=False).cannot_improve(-8.0, 5)  # -1.6 now
    assert not group(early_stopping="never").cannot_improve(-8.0, 5)  # -0.8 at length 10
    assert group(early_stopping="never", length_penalty=-1.0).cannot_improve(-8.0, 5)  # length does not help


def test_a_better_text_replaces_the_worst():
    group = Group([0, 1], GenerationConfig(num_beams=2, length_penalty=0.0))
    for total in (-3.0, -5.0, -4.0, -9.0):
        group.add(total, torch.zeros(4), torch.zeros(1))
    assert sorted(text.score for text in group.finished) == [-4.0, -3.0]


def test_diversity_by_worked_example():
    rule = Diversity(0.5)
    assert rule(None, torch.zeros(1, 8)).count_nonzero() == 0
    rule.taken = [torch.tensor([[7, 7]]), torch.tensor([[4, 0]])]
    assert rule(None, torch.zeros(1, 8)).tolist() == [[-0.5, 0, 0, 0, -0.5, 0, 0, -1.0]]


def test_groups_differ_where_beams_are_alike(model):
    prompt = torch.tensor([[5, 9, 13]])
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6}
    texts = model.generate(prompt, **settings, num_beam_groups=3, diversity_penalty=20.0)[:, 3:]
    assert len({tuple(row) for row in texts.tolist()}) == 3
    assert len(set(texts[:, 0].tolist())) == 3, "a high penalty forbids an earlier group's token"
