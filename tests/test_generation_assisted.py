"""Guessing ahead: the same ids as greedy search in fewer passes, the same distribution when sampling."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openllama import OpenLlamaForCausalLM, OpenLlamaTokenizer
from openllama.cache import PreallocatedCache
from openllama.generation.assisted import Lookup, Pace
from openllama.generation.checks import prepare
from openllama.generation.state import Sequences
from openllama.inference import fast, loops, quantize
from openllama.quantized.modules import QuantizedMatrix
from tests.draw import examples
from tests.generating import count_forwards, make_model
from tests.sentencepieces import TINY_CHECKPOINT

PROMPT = torch.tensor([[5, 9, 13, 2]])


@pytest.fixture(scope="module")
def model():
    return make_model()


def passes(model, **settings) -> tuple[torch.Tensor, int]:
    calls: list[int] = []
    handle = count_forwards(model, calls)
    ids = model.generate(PROMPT, **settings)
    handle.remove()
    return ids, len(calls)


def test_an_assistant_that_is_always_right_saves_most_passes(model):
    greedy, every = passes(model, max_new_tokens=30)
    twin = make_model()
    ids, few = passes(model, max_new_tokens=30, assistant_model=twin)
    assert torch.equal(ids, greedy)
    assert (every, few) == (30, 5), "4, 5, 6, 7 and 8 tokens"


def test_an_assistant_that_is_mostly_wrong_changes_nothing(model):
    greedy, every = passes(model, max_new_tokens=30)
    ids, passed = passes(model, max_new_tokens=30, assistant_model=make_model(7, num_hidden_layers=1))
    assert torch.equal(ids, greedy)
    assert passed <= every


def test_prompt_lookup_makes_greedy_ids_in_fewer_passes():
    model = make_model(initializer_range=0.15)  # such a model says one token again and again
    greedy, every = passes(model, max_new_tokens=30)
    ids, few = passes(model, max_new_tokens=30, prompt_lookup_num_tokens=6)
    assert torch.equal(ids, greedy)
    assert few <= every // 4


def test_the_pace_follows_what_was_right():
    pace = Pace(3)

    def asked(right: int) -> tuple[int, int]:
        """For how many tokens nothing is guessed, and how many are guessed then, of which ``right`` are right."""
        pause = 0
        while not (count := pace.next()):
            pause += 1
        pace.learn(count, right)
        return pause, count

    assert [asked(right) for right in (2, 3, 0, 0, 0, 1, 1, 0)] == [
        (0, 3), (0, 3), (0, 4), (2, 1), (4, 1), (8, 1), (0, 2), (0, 2),
    ]  # fmt: skip
    assert [asked(0) for _ in range(7)] == [(pause, 1) for pause in (2, 4, 8, 16, 32, 64, 64)]


def test_no_guess_or_a_short_one_says_nothing_against_a_longer_one():
    pace = Pace(6)
    pace.learn(0, 0)
    assert pace.next() == 6
    pace.learn(2, 2)
    assert pace.next() == 6


def contrary(wrong_until: float = torch.inf):
    """The model itself, which as long as the sequence is shorter is sure of the token after the right one."""

    def roll(module, args, output):
        if output.past_key_values.get_seq_length() < wrong_until:
            output.logits = output.logits.roll(1, -1)
        return output

    twin = make_model()
    twin.register_forward_hook(roll)
    return twin


def tokens_computed(model, new_tokens: int, **settings) -> tuple[torch.Tensor, list[int]]:
    """Ids, and how many tokens each pass of the model computed."""
    calls: list[int] = []
    handle = count_forwards(model, calls)
    ids = model.generate(PROMPT, max_new_tokens=new_tokens, **settings)
    handle.remove()
    return ids, calls


def test_an_assistant_that_is_never_right_is_asked_8_times_in_256_tokens(model):
    greedy, plain = tokens_computed(model, 256)
    assistant, asked = contrary(), []
    count_forwards(assistant, asked)
    ids, calls = tokens_computed(model, 256, assistant_model=assistant)
    assert torch.equal(ids, greedy)
    assert len(calls) == len(plain) == 256, "no pass more than without"
    assert sum(calls) - sum(plain) == len(asked) == 3 + 7, "each token guessed costs a pass of it and a row of ours"


def test_an_assistant_that_becomes_right_is_trusted_again(model):
    greedy, _ = tokens_computed(model, 128)
    ids, calls = tokens_computed(model, 128, assistant_model=contrary(wrong_until=40))
    assert torch.equal(ids, greedy)
    assert calls[:35] == [7, 1, 1, 2, *[1] * 4, 2, *[1] * 8, 2, *[1] * 16, 2], "wrong after 2, 4, 8 and 16 tokens"
    assert calls[35:] == [*[1] * 32, 2, 3, 4, 5, 6, 7, 8, 9, 10, 7], "right after 32 more, and from there on"


def test_a_lookup_that_is_never_right_is_rarely_computed():
    """Pairs of tokens may not recur, so what followed a token before never follows it again."""
    model = make_model(vocab_size=14)
    settings = {"no_repeat_ngram_size": 2, "max_matching_ngram_size": 1}
    greedy, plain = tokens_computed(model, 60, **settings)
    ids, calls = tokens_computed(model, 60, prompt_lookup_num_tokens=8, **settings)
    assert torch.equal(ids, greedy)
    assert len(calls) == len(plain)
    guessed = [count - 1 for count in calls[1:] if count > 1]
    assert guessed == [2, 1, 1, 1, 1], "a token pair that was there, then one token after 2, 4, 8 and 16 others"


def drawn(data, seed):
    """A prompt that may be padded, its mask, and settings of ``generate``."""
    prompt = torch.randint(4, 10, (1, data.draw(st.integers(1, 6))), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(prompt)
    mask[:, : data.draw(st.integers(0, prompt.shape[1] - 1))] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": data.draw(st.integers(1, 20)),
        "repetition_penalty": data.draw(st.sampled_from((1.0, 1.2))),
        "min_new_tokens": data.draw(st.integers(0, 1)),
        "stopping_criteria": data.draw(st.sampled_from((None, [lambda ids, scores: int(ids[0, -1]) == 7]))),
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_hidden_states": True,
    }
    return prompt, mask, settings


@examples(25)
@given(data=st.data(), seed=st.integers(0, 10**6), lookup=st.booleans())
def test_with_any_settings_the_ids_are_those_of_greedy_search(data, seed, lookup):
    """Processors hold for every token; in transformers 4.31.0 not for the one after a right guess."""
    model = make_model(seed, vocab_size=10, eos_token_id=data.draw(st.sampled_from((None, 2, [2, 3]))))
    prompt, mask, settings = drawn(data, seed)
    settings |= {
        "no_repeat_ngram_size": data.draw(st.sampled_from((0, 3))),
        "output_logits": True,
        "output_attentions": True,
    }
    seed_of_assistant = data.draw(st.sampled_from((seed, seed + 1)))
    guessing = {"prompt_lookup_num_tokens": 3}
    if not lookup:
        guessing = {"assistant_model": make_model(seed_of_assistant, vocab_size=10)}
    greedy, output = model.generate(prompt, **settings), model.generate(prompt, **settings, **guessing)
    assert torch.equal(output.sequences, greedy.sequences)
    assert output.past_key_values.get_seq_length() == greedy.past_key_values.get_seq_length()
    for name in ("scores", "logits"):
        torch.testing.assert_close(output[name], greedy[name], rtol=1e-3, atol=1e-4)
    for name in ("attentions", "hidden_states") if mask.all() else ():  # what padding sees is no matter
        for left, right in zip(output[name], greedy[name], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("guess", ["twin", "stranger", "lookup", "rounded copy"])
def test_sampling_draws_from_the_models_own_distribution(guess):
    """Pairs of tokens, drawn 400 times, against their probabilities: chi-square."""
    model = make_model(2, vocab_size=5, initializer_range=0.2, num_hidden_layers=1)
    assistant = {
        "twin": make_model(2, vocab_size=5, initializer_range=0.2, num_hidden_layers=1),
        "stranger": make_model(9, vocab_size=5, num_hidden_layers=1),
        "rounded copy": quantize(make_model(2, vocab_size=5, initializer_range=0.2, num_hidden_layers=1), "int4"),
    }
    if guess == "rounded copy":
        model.set_attn_implementation("sdpa")  # its cache does not grow, so that both can use it
    settings = {"prompt_lookup_num_tokens": 2} if guess == "lookup" else {"assistant_model": assistant[guess]}
    settings |= {"do_sample": True, "temperature": 0.8, "top_k": 4, "max_new_tokens": 2}
    prompt = torch.tensor([[1, 2, 3, 1, 2]])
    expected = torch.zeros(5, 5)
    with torch.no_grad():
        for first in range(5):
            logits = model(torch.cat((prompt, torch.tensor([[first]])), dim=1)).logits[0, -2:] / 0.8
            cut = logits.masked_fill(logits < logits.topk(4).values[:, -1:], -torch.inf).softmax(-1)
            expected[first] = cut[0, first] * cut[1]
    generator, observed = torch.Generator().manual_seed(0), torch.zeros(5, 5)
    for _ in range(400):
        first, second = model.generate(prompt, generator=generator, **settings)[0, 5:].tolist()
        observed[first, second] += 1
    possible = expected > 0
    assert observed[~possible].sum() == 0, "tokens that top_k cuts never come"
    chi_square = ((observed - 400 * expected) ** 2 / (400 * expected))[possible].sum()
    assert int(possible.sum()) == 16
    assert chi_square < 37.7, "0.1 % point of chi-square with 15 degrees of freedom"


def test_lookup_by_worked_example(model):
    def guess(text: list[int], count: int, room: int = 9) -> list[int]:
        request = prepare(model, torch.tensor([text]), prompt_lookup_num_tokens=count, max_new_tokens=5)
        return Lookup(request).guess(request.input_ids, room).tolist()

    assert guess([4, 5, 6, 7, 4, 5], 2) == [6, 7]
    assert guess([4, 5, 6, 7, 4, 5], 9) == [6, 7, 4, 5]
    assert guess([4, 5, 6, 7, 4, 5], 2, room=1) == [6]
    assert guess([5, 6, 4, 5, 7, 5], 1) == [7], "the last time it came"
    assert guess([5, 5, 5, 5, 5], 2) == [5, 5], "as many as wanted, though a later place has one"
    assert guess([4, 5, 8, 5, 9, 4, 5], 1) == [8], "two tokens that recur count for more than one"
    assert guess([4, 5, 6], 2) == []
    assert guess([4], 2) == []


def test_guesses_never_go_beyond_the_length():
    model = make_model()
    model.set_attn_implementation("sdpa")  # so that the cache has a length
    request = prepare(model, PROMPT, max_new_tokens=3, assistant_model=make_model())
    sequences = Sequences(model, request)
    assert sequences.cache.max_length == 7
    assert model.generate(PROMPT, max_new_tokens=3, assistant_model=make_model()).shape == (1, 7)


def test_it_streams_token_by_token(model):
    streamed = [int(token) for token in model.stream(PROMPT, max_new_tokens=9, assistant_model=make_model())]
    assert streamed == model.generate(PROMPT, max_new_tokens=9)[0, 4:].tolist()


def test_a_past_is_continued(model):
    expected = model.generate(PROMPT, max_new_tokens=9)
    with torch.no_grad():
        past = model(PROMPT[:, :2]).past_key_values
    for settings in ({"assistant_model": make_model()}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(PROMPT, past_key_values=past, max_new_tokens=9, **settings), expected)


@pytest.mark.parametrize("taken", [1, 2, 3, 5])
def test_a_stream_that_is_left_early_has_cached_nothing_that_was_not_taken(model, taken):
    cache = PreallocatedCache(model.config, 1, 40)
    tokens = model.stream(PROMPT, max_new_tokens=20, assistant_model=make_model(), past_key_values=cache)
    ids = torch.cat((PROMPT, *(next(tokens)[None] for _ in range(taken))), dim=1)
    del tokens
    assert cache.get_seq_length() < ids.shape[1]
    expected = model.generate(ids, max_new_tokens=5)
    assert torch.equal(model.generate(ids, max_new_tokens=5, past_key_values=cache), expected)


# ---- a rounded copy of the model, which guesses on the model's cache


def quick(model):
    model = fast(model)
    assert not model.reason
    return model


WRAPS = {"plain": lambda model: model, "fast": quick}


@pytest.fixture(autouse=True)
def _same_on_every_machine(monkeypatch):
    """The loops check guesses of up to 15 tokens, a number which a machine measures."""
    monkeypatch.setattr(loops, "most_rows", lambda *_: 16)


def pair(quantization="int4", seed=1, **fields):
    """A model whose cache does not grow, and its rounded copy."""
    models = make_model(seed, **fields), quantize(make_model(seed, **fields), quantization)
    for one in models:
        one.set_attn_implementation("sdpa")
    return models


def exact_pair(quantization="int4"):
    """The same where the model has the rounded numbers, too, so that every guess is right."""
    model, copy = pair(quantization)
    for name, module in copy.named_modules():
        if isinstance(module, QuantizedMatrix):
            model.get_submodule(name).weight.data = module.dequantize().contiguous()
    return model, copy


@pytest.fixture
def computed(monkeypatch):
    """``computed(model)``: how many tokens each of its passes in generation has computed since the last call."""
    passes, forward = [], Sequences.forward

    def counting(sequences, *arguments, **named):
        before = sequences.cache.get_seq_length()
        result = forward(sequences, *arguments, **named)
        passes.append((sequences.model, sequences.cache.get_seq_length() - before))
        return result

    def of(model):
        found = [count for one, count in passes if one is model]
        passes[:] = [(one, count) for one, count in passes if one is not model]
        return found

    monkeypatch.setattr(Sequences, "forward", counting)
    return of


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("wraps", list(itertools.product(WRAPS, repeat=2)), ids="-".join)
def test_a_rounded_copy_never_computes_the_prompt_and_changes_no_id(computed, quantization, wraps):
    model, copy = (WRAPS[wrap](one) for wrap, one in zip(wraps, pair(quantization), strict=True))
    prompt = torch.randint(4, 40, (1, 30), generator=torch.Generator().manual_seed(0))
    greedy = model.generate(prompt, max_new_tokens=30)
    computed(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=30, assistant_model=copy), greedy)
    first, *checks = computed(model)
    guesses = computed(copy)
    assert first == 30, "the prompt alone"
    assert len(checks) < 29, "some guesses were right"
    assert set(guesses) == {1}
    assert len(guesses) == sum(checks) - len(checks), "each pass of the copy is a token that the model checks"


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("past", ["none", "all but one", "some", "some, ids of the rest"])
def test_a_copy_whose_rounding_loses_nothing_is_always_right(computed, wrap, padding, past):
    """So it sees what the model sees, at the same positions, whatever is cached and whatever is padding."""
    model, copy = map(WRAPS[wrap], exact_pair())
    prompt = torch.randint(4, 40, (1, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    mask[:, :padding] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 25}
    greedy = model.generate(prompt, **settings)[:, 12:]
    cached = {"none": 0, "all but one": 11}.get(past, 7)
    cache = PreallocatedCache(model.config, 1, 40 if cached == 11 else 8)  # used itself, or copied
    if cached:
        before = {"attention_mask": mask[:, :cached], "max_new_tokens": 1}
        model.generate(prompt[:, :cached], past_key_values=cache, **before)
    prompt = prompt[:, 7:] if past.endswith("rest") else prompt
    computed(model)
    ids = model.generate(prompt, past_key_values=cache, assistant_model=copy, **settings)
    assert torch.equal(ids[:, prompt.shape[1] :], greedy)
    checks = [4, 5, 6, 7, 2] if cached < 11 else [4, 5, 6, 7, 3]
    assert computed(model) == ([12 - cached] if cached < 11 else []) + checks
    assert set(computed(copy)) == {1}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_cache_holds_the_models_own_keys_and_values(wrap, quantization):
    model, copy = map(WRAPS[wrap], pair(quantization))
    settings = {"max_new_tokens": 40, "return_dict_in_generate": True}
    greedy = model.generate(PROMPT, **settings)
    output = model.generate(PROMPT, assistant_model=copy, **settings)
    with torch.no_grad():
        rounded = copy(greedy.sequences[:, :-1]).past_key_values
    assert type(output.past_key_values) is PreallocatedCache
    for own, found, others in zip(greedy.past_key_values, output.past_key_values, rounded, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
        assert min((own[i] - others[i]).abs().amax(dim=(0, 1, 3)).min() for i in (0, 1)) > 1e-3, "which others are not"


@examples(25)
@given(data=st.data(), seed=st.integers(0, 10**6), quantization=st.sampled_from(("int8", "int4")))
def test_with_any_settings_a_rounded_copy_leaves_ids_scores_and_cache_as_they_are(data, seed, quantization):
    eos = data.draw(st.sampled_from((None, 2, [2, 3])))
    models = pair(quantization, seed, vocab_size=10, eos_token_id=eos)
    model, copy = map(WRAPS[data.draw(st.sampled_from(tuple(WRAPS)))], models)
    prompt, mask, settings = drawn(data, seed)
    settings["logits_processor"] = data.draw(
        st.sampled_from(([], [lambda ids, scores: scores.roll(int(ids[0, -1]), -1)]))
    )
    greedy = model.generate(prompt, **settings)
    output = model.generate(prompt, assistant_model=copy, **settings)
    assert torch.equal(output.sequences, greedy.sequences)
    torch.testing.assert_close(output.scores, greedy.scores, rtol=1e-3, atol=1e-4)
    for left, right in zip(output.hidden_states, greedy.hidden_states, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
    first = int((mask == 0).sum())  # what padding caches is no matter
    for left, right in zip(output.past_key_values, greedy.past_key_values, strict=True):
        for found, own in zip(left, right, strict=True):
            torch.testing.assert_close(found[:, :, first:], own[:, :, first:], rtol=1e-3, atol=1e-4)


def stranger(seed=1, quantization="int4", **fields):
    return quantize(make_model(seed, **fields), quantization)


@pytest.mark.parametrize(
    ("make_assistant", "model_is"),
    [
        (make_model, "sdpa"),
        (lambda: stranger(num_hidden_layers=1), "sdpa"),
        (lambda: stranger(max_position_embeddings=99), "sdpa"),
        (lambda: stranger().to(torch.float64), "sdpa"),
        (stranger, "eager"),
        (stranger, "int4"),
    ],
    ids=["not rounded", "fewer layers", "another config", "another dtype", "a cache that grows", "rounded alike"],
)
def test_any_other_assistant_keeps_a_cache_of_its_own(computed, make_assistant, model_is):
    model, assistant = stranger() if model_is == "int4" else make_model(), make_assistant()
    model.set_attn_implementation("eager" if model_is == "eager" else "sdpa")
    greedy = model.generate(PROMPT, max_new_tokens=20)
    ids = model.generate(PROMPT, max_new_tokens=20, assistant_model=assistant)
    assert torch.equal(ids, greedy)
    assert computed(assistant)[0] == 4, "the prompt"


def test_a_copy_that_is_rounded_more_than_the_model_shares_its_cache(computed):
    model, copy = stranger(quantization="int8"), stranger()
    model.set_attn_implementation("sdpa")
    greedy = model.generate(PROMPT, max_new_tokens=20)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=20, assistant_model=copy), greedy)
    assert set(computed(copy)) == {1}


def test_keys_of_a_copy_that_fails_are_not_left_in_the_cache():
    model, copy = exact_pair()
    cache = PreallocatedCache(model.config, 1, 40)
    asked = []

    def fail(module, args):
        asked.append(0)
        if len(asked) == 5:  # the second token of its second guess
            raise RuntimeError("no power")

    copy.model.register_forward_pre_hook(fail)
    tokens, taken = model.stream(PROMPT, max_new_tokens=20, assistant_model=copy, past_key_values=cache), []
    with pytest.raises(RuntimeError, match="no power"):
        taken.extend(tokens)
    assert cache.get_seq_length() == 4 + len(taken) - 1
    ids = torch.cat((PROMPT, torch.stack(taken, dim=1)), dim=1)
    expected = model.generate(PROMPT, max_new_tokens=20)
    assert torch.equal(model.generate(ids, max_length=24, past_key_values=cache), expected)


@pytest.mark.parametrize("taken", [1, 2, 3, 5])
def test_a_stream_with_a_rounded_copy_that_is_left_early_has_cached_only_what_was_taken(taken):
    model, copy = exact_pair()
    cache = PreallocatedCache(model.config, 1, 40)
    tokens = model.stream(PROMPT, max_new_tokens=20, assistant_model=copy, past_key_values=cache)
    ids = torch.cat((PROMPT, *(next(tokens)[None] for _ in range(taken))), dim=1)
    del tokens
    assert cache.get_seq_length() == ids.shape[1] - 1
    expected = model.generate(ids, max_new_tokens=5)
    assert torch.equal(model.generate(ids, max_new_tokens=5, past_key_values=cache), expected)


def test_a_seed_draws_the_same_tokens_again_with_a_rounded_copy(computed):
    model, copy = pair()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(PROMPT, max_new_tokens=30, do_sample=True, generator=generator, assistant_model=copy)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert computed(model)[:2] == [4, 4], "3 tokens are guessed first"


@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.9), ("int4", 0.6)])
def test_a_rounded_copy_of_a_trained_model_is_mostly_right(monkeypatch, quantization, share):
    learn, learnt = Pace.learn, []
    monkeypatch.setattr(Pace, "learn", lambda pace, *counts: (learnt.append(counts), learn(pace, *counts))[1])
    tokenizer = OpenLlamaTokenizer.from_pretrained(TINY_CHECKPOINT)
    load = OpenLlamaForCausalLM.from_pretrained
    model, copy = (fast(load(TINY_CHECKPOINT, dtype=torch.float32, quantize=to)) for to in (None, quantization))
    for text in ("To be, or not to be: that is the", "Enter the King and", "My lord, I have", "What is thy name?"):
        prompt = torch.tensor([tokenizer.encode(text)])
        greedy = model.generate(prompt, max_new_tokens=60)
        assert torch.equal(model.generate(prompt, max_new_tokens=60, assistant_model=copy), greedy)
    guessed, right = map(sum, zip(*learnt, strict=True))
    assert guessed > 100
    assert right / guessed > share
