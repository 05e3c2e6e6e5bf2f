"""The generation loop: what is drawn, when it is yielded, where it stops, what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from openllama import OpenLlamaForCausalLM
from openllama.cache import GrowingCache, PreallocatedCache
from openllama.errors import InputError, NumericalError
from openllama.generation.sampling import pick
from tests.generating import CONFIG, as_on_a_device, count_forwards, make_model


@pytest.fixture(scope="module")
def model() -> OpenLlamaForCausalLM:
    return make_model()


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.tensor([[5, 9, 13, 2], [7, 21, 3, 30]])


# --- the loop ---------------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest_token_of_each_full_forward(model, prompt):
    ids = prompt
    for _ in range(8):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(prompt, max_new_tokens=8), ids)
    assert len(set(ids[0].tolist())) > 6, "a constant continuation would show nothing"


def test_the_first_token_is_yielded_before_the_second_forward_pass(model, prompt):
    calls: list[int] = []
    handle = count_forwards(model, calls)
    tokens = model.stream(prompt, max_new_tokens=3)
    next(tokens)
    assert calls == [4]
    next(tokens)
    assert calls == [4, 1], "with the cache, the second pass computes one token"
    handle.remove()


def test_stream_yields_what_generate_returns(model, prompt):
    streamed = torch.stack(list(model.stream(prompt, max_new_tokens=6)), dim=1)
    assert torch.equal(torch.cat((prompt, streamed), 1), model.generate(prompt, max_new_tokens=6))


def test_without_cache_every_pass_computes_the_whole_text(model, prompt):
    calls: list[int] = []
    handle = count_forwards(model, calls)
    ids = model.generate(prompt, max_new_tokens=3, use_cache=False)
    handle.remove()
    assert calls == [4, 5, 6]
    assert torch.equal(ids, model.generate(prompt, max_new_tokens=3))


def test_left_padded_rows_continue_as_each_prompt_alone(model):
    prompts = [[5, 9, 13, 2], [7, 21], [30]]
    batch = torch.tensor([[0] * (4 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (4 - len(p)) + [1] * len(p) for p in prompts])
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8)[:, 4:]
    alone = [model.generate(torch.tensor([p]), max_new_tokens=8)[0, len(p) :] for p in prompts]
    assert torch.equal(together, torch.stack(alone))


def test_padding_is_inferred_from_the_padding_id(model):
    batch = torch.tensor([[0, 0, 7, 21], [5, 9, 13, 2]])
    assert torch.equal(
        model.generate(batch, max_new_tokens=4),
        model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=4),
    )


def test_a_text_ends_with_its_eos_and_is_padded_while_others_go_on(model, prompt):
    free = model.generate(prompt, max_new_tokens=8)
    eos = int(free[0, 6])
    ids = model.generate(prompt, max_new_tokens=8, eos_token_id=eos)
    end = free[0].tolist().index(eos, 4)
    assert ids[0, : end + 1].tolist() == free[0, : end + 1].tolist()
    assert set(ids[0, end + 1 :].tolist()) <= {0}
    first_of = [row.tolist().index(eos, 4) if eos in row[4:] else 11 for row in free]
    assert ids.shape[1] == max(first_of) + 1


def test_any_of_several_eos_ids_ends_a_text(model, prompt):
    free = model.generate(prompt[:1], max_new_tokens=8)[0].tolist()
    ids = model.generate(prompt[:1], max_new_tokens=8, eos_token_id=[free[7], free[5]])[0].tolist()
    assert ids == free[: min(free.index(free[7], 4), free.index(free[5], 4)) + 1]


def test_max_length_counts_the_prompt_and_max_new_tokens_does_not(model, prompt):
    assert model.generate(prompt, max_length=7).shape == (2, 7)
    assert model.generate(prompt, max_new_tokens=7, max_length=5).shape == (2, 11)


def test_the_same_generator_seed_draws_the_same_text_and_another_seed_another(model, prompt):
    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, do_sample=True, max_new_tokens=12, generator=generator).tolist()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_a_generator_draws_what_the_global_seed_draws(model, prompt):
    torch.manual_seed(5)
    expected = model.generate(prompt, do_sample=True, max_new_tokens=12)
    drawn = model.generate(prompt, do_sample=True, max_new_tokens=12, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("kind", ["growing", "legacy tuples", "preallocated"])
@pytest.mark.parametrize("only_new", [False, True])
def test_a_past_is_continued_without_computing_it_again(model, prompt, kind, only_new):
    expected = model.generate(prompt, max_new_tokens=6)
    with torch.no_grad():
        past = PreallocatedCache(CONFIG, 2, 20) if kind == "preallocated" else None
        past = model(prompt[:, :2], past_key_values=past).past_key_values
    if kind == "legacy tuples":
        past = tuple((key, value) for key, value in past)
    calls: list[int] = []
    handle = count_forwards(model, calls)
    ids = prompt[:, 2:] if only_new else prompt
    mask = torch.ones(2, 4, dtype=torch.long) if only_new else None
    output = model.generate(ids, past_key_values=past, attention_mask=mask, max_new_tokens=6)
    handle.remove()
    assert calls == [2, 1, 1, 1, 1, 1]
    assert torch.equal(output[:, -6:], expected[:, -6:])


def test_inputs_embeds_stand_in_for_the_prompt(model, prompt):
    with torch.no_grad():
        embeds = model.model.embedding(prompt)
    output = model.generate(prompt, inputs_embeds=embeds, max_new_tokens=5)
    assert torch.equal(output, model.generate(prompt, max_new_tokens=5))
    only_new = model.generate(inputs_embeds=embeds, max_new_tokens=5)
    assert only_new[:, 0].tolist() == [1, 1], "without ids the output begins with bos"
    assert torch.equal(only_new[:, 1:], output[:, 4:])


def test_a_streamer_gets_the_prompt_then_each_token_then_the_end(model, prompt):
    class Recorder:
        def __init__(self) -> None:
            self.got: list[list] = []
            self.ended = 0

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.ended += 1

    recorder = Recorder()
    ids = model.generate(prompt, max_new_tokens=3, streamer=recorder)
    assert recorder.got == [prompt.tolist(), *ids[:, 4:].T.tolist()]
    assert recorder.ended == 1


def test_a_callers_processor_is_applied_before_the_sampling_filters(model, prompt):
    seen = []

    def only_token_seven(input_ids, scores):
        seen.append(input_ids.shape[1])
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    ids = model.generate(prompt, max_new_tokens=3, do_sample=True, logits_processor=[only_token_seven])
    assert ids[:, 4:].unique().tolist() == [7]
    assert seen == [4, 5, 6]


def test_the_models_generation_config_holds_and_a_call_overrides_it(model, prompt):
    changed = dataclasses.replace(model.generation_config, max_length=6)
    assert model.generate(prompt, generation_config=changed).shape[1] == 6
    assert model.generate(prompt, generation_config=changed, max_length=9).shape[1] == 9


def test_a_model_in_half_precision_generates(prompt):
    half = OpenLlamaForCausalLM(CONFIG).eval().to(torch.bfloat16)
    assert half.generate(prompt, max_new_tokens=4, do_sample=True).shape == (2, 8)


# --- memory -----------------------------------------------------------------------------------------


def allocations(step: Callable[[], object]) -> list[int]:
    """The sizes in bytes of everything that torch allocates on the CPU meanwhile, kernels' own included."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sorted(size for size in sizes if size > 0)


WIDE = dataclasses.replace(CONFIG, hidden_size=128, num_attention_heads=2, eos_token_id=None)
LONG = 400  # tokens; a layer's keys of one sequence are then 205 kB


def test_in_a_steady_state_a_step_allocates_the_same_but_for_a_few_bytes():
    model = OpenLlamaForCausalLM(WIDE, attn_implementation="sdpa").eval()
    prompt = torch.full((1, LONG), 5)
    whole = allocations(lambda: list(model.stream(prompt, max_new_tokens=1)))
    assert max(whole) > LONG * WIDE.hidden_size * 4, "the profiler sees that the cache is made"
    steps = model.stream(prompt, max_new_tokens=9)
    next(steps)
    sizes = [allocations(lambda: next(steps)) for _ in range(7)]
    assert {len(step) for step in sizes} == {len(sizes[0])}
    assert len(sizes[0]) > 50
    grown = [sum(later) - sum(earlier) for earlier, later in itertools.pairwise(sizes)]
    assert max(grown) < 16, "a kernel's row of scores grows, by some bytes; a token's keys and values take 2 kB"


def largest_allocation(backend: str, past: PreallocatedCache | None = None) -> int:
    """In bytes, of seven steps for three sequences, one of them left-padded, after the first step."""
    model = OpenLlamaForCausalLM(WIDE, attn_implementation=backend).eval()
    mask = torch.ones(3, LONG, dtype=torch.long)
    mask[0, :200] = 0
    ids = torch.full((3, LONG), 5)
    steps = model.stream(ids, attention_mask=mask, past_key_values=past, max_new_tokens=9)
    next(steps)
    return max(size for _ in range(7) for size in allocations(lambda: next(steps)))


KEYS = 3 * LONG * WIDE.hidden_size * 4  # bytes of the keys of a layer


def test_no_step_allocates_a_tensor_of_the_size_of_a_layer_s_keys():
    assert largest_allocation("sdpa") < KEYS / 20


def test_under_eager_the_cache_grows_by_copies_unless_the_caller_gives_one_with_room():
    """Copies have transformers' memory layout, and so its bits."""
    assert KEYS < largest_allocation("eager") < 1.1 * KEYS
    assert largest_allocation("eager", PreallocatedCache(WIDE, 3, LONG + 9)) < KEYS / 20


@pytest.mark.parametrize("attentions", [False, True])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_cache_and_the_logits_of_the_prompt_are_what_the_backend_of_the_pass_needs(prompt, backend, attentions):
    model = make_model()
    model.set_attn_implementation(backend)
    positions: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: positions.append(args[0].shape[1]))
    output = model.generate(prompt, max_new_tokens=3, output_attentions=attentions, return_dict_in_generate=True)
    eager = backend == "eager" or attentions
    assert isinstance(output.past_key_values, GrowingCache if eager else PreallocatedCache)
    assert positions == ([4, 1, 1] if eager else [1, 1, 1])


# --- inputs that somebody else prepares -------------------------------------------------------------


def with_prefix(model: OpenLlamaForCausalLM, prefix: torch.Tensor) -> None:
    """Put vectors (1, P, C) before every prompt by replacing a method, as prompt tuning does."""
    original = model.prepare_inputs_for_generation

    def prepare_inputs(ids: torch.Tensor, **arguments: Any) -> dict[str, Any]:
        inputs = original(ids, **arguments)
        ones = inputs["attention_mask"].new_ones(len(ids), prefix.shape[1])
        inputs["attention_mask"] = torch.cat((ones, inputs["attention_mask"]), dim=1)
        inputs["position_ids"] = None
        if inputs["past_key_values"] is None:
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = torch.cat((prefix.expand(len(ids), -1, -1), embeds), dim=1)
        return inputs

    model.prepare_inputs_for_generation = prepare_inputs


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_inputs_that_an_adapter_prepares_are_used(prompt, backend):
    model, prefix = make_model(use_stable_embedding=False), torch.randn(1, 5, 32)
    plain = model.generate(prompt, max_new_tokens=6)
    model.set_attn_implementation(backend)
    with_prefix(model, prefix)
    ids = prompt
    for _ in range(6):
        embeds = torch.cat((prefix.expand(2, -1, -1), model.get_input_embeddings()(ids)), dim=1)
        ids = torch.cat((ids, model(inputs_embeds=embeds).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(prompt, max_new_tokens=6), ids)
    assert not torch.equal(ids, plain)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, num_beams=2)[:, :4], prompt)


@torch.no_grad()
def test_inputs_that_a_subclass_prepares_are_used_and_checked(prompt):
    class Shifted(OpenLlamaForCausalLM):
        shift = 3

        def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **arguments: Any) -> dict[str, Any]:
            inputs = super().prepare_inputs_for_generation(input_ids, **arguments)
            return {**inputs, "position_ids": inputs["position_ids"] * self.shift}

    original, model = make_model(), Shifted(CONFIG, "eager").eval()
    model.load_state_dict(original.state_dict())
    ids = prompt
    for _ in range(6):
        positions = 3 * torch.arange(ids.shape[1])[None]
        ids = torch.cat((ids, original(ids, position_ids=positions).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(prompt, max_new_tokens=6), ids)
    assert not torch.equal(original.generate(prompt, max_new_tokens=6), ids)
    model.shift = -1
    with pytest.raises(InputError, match="must not be negative"):
        model.generate(prompt, max_new_tokens=6)


def test_guessing_ahead_of_inputs_that_an_adapter_prepares_is_refused(prompt):
    model = make_model()
    with_prefix(model, torch.randn(1, 5, 32))
    with pytest.raises(InputError, match="prompt_lookup_num_tokens needs the model's own prepare_inputs"):
        model.generate(prompt[:1], max_new_tokens=6, prompt_lookup_num_tokens=2)
    with pytest.raises(InputError, match="assistant_model needs the model's own prepare_inputs"):
        make_model().generate(prompt[:1], max_new_tokens=6, assistant_model=model)


def test_generating_while_a_model_trains_with_recomputation_gives_the_same_ids(prompt):
    model = make_model(hidden_dropout_prob=0.0, attention_dropout_prob=0.0)
    expected = model.generate(prompt, max_new_tokens=6)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.train().generate(prompt, max_new_tokens=6), expected)


# --- picking --------------------------------------------------------------------------------------


def test_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = pick(probabilities.log().expand(20000, 4), True, torch.Generator().manual_seed(0))
    observed = drawn.bincount(minlength=4)
    chi_square = ((observed - 20000 * probabilities) ** 2 / (20000 * probabilities)).sum()
    assert chi_square < 16.27, "0.1 % point of chi-square with 3 degrees of freedom"


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 4}, "max_length 4 .* prompt of 4"),
        ({"max_new_tokens": 0}, "max_new_tokens .* 0"),
        ({"temperature": 0.0, "do_sample": True}, "temperature .*do_sample=False.* 0.0"),
        ({"top_p": 0.0}, r"top_p .* \(0, 1\].* got 0.0"),
        ({"top_k": -1}, "top_k .* -1"),
        ({"eos_token_id": 40}, "eos_token_id 40 .* 40"),
        ({"max_token": 3}, "max_token"),
        ({"attention_mask": torch.ones(2, 3)}, "covers 3 tokens, but there are 4"),
        ({"attention_mask": torch.ones(1, 4)}, r"\(2, 4\), got \(1, 4\)"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"padding mask \(2, 4\)"),
        ({"attention_mask": torch.full((2, 4), 3)}, "1 .*0"),
    ],
)
def test_bad_settings_are_refused_before_any_forward_pass(model, prompt, options, message):
    calls: list[int] = []
    handle = count_forwards(model, calls)
    with pytest.raises(InputError, match=message):
        model.generate(prompt, **options)
    with pytest.raises(InputError, match=message):
        model.stream(prompt, **options)
    handle.remove()
    assert calls == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "empty"),
        (torch.tensor([[1.0, 2.0]]), "integers, got torch.float32"),
        (torch.tensor([[1, 40]]), "40 is outside the vocabulary of 40"),
        (torch.tensor([[-1, 4]]), "-1 is outside the vocabulary of 40"),
        (torch.tensor([1, 2]), r"\(batch, length\), got \(2,\)"),
        ([[1, 2]], "tensor"),
    ],
)
def test_bad_prompts_are_refused(model, ids, message):
    with pytest.raises(InputError, match=message):
        model.generate(ids, max_new_tokens=2)


def test_a_past_as_long_as_the_prompt_is_refused(model, prompt):
    past = model(prompt).past_key_values
    with pytest.raises(InputError, match="holds 4 tokens, the prompt covers 4"):
        model.generate(prompt, past_key_values=past, max_new_tokens=2)


def test_no_prompt_and_no_bos_is_refused(model):
    with pytest.raises(InputError, match="bos_token_id"):
        model.generate(bos_token_id=None, max_new_tokens=2)


# --- models that others have changed ------------------------------------------------------------------


class Blind(OpenLlamaForCausalLM):
    """Its forward pass hides the first token, whatever the mask says."""

    def forward(self, *arguments, attention_mask=None, **named):
        mask = (
            torch.ones(1, named["past_key_values"].get_seq_length() + named["input_ids"].shape[1])
            if named.get("past_key_values")
            else torch.ones_like(named["input_ids"])
        )
        mask[:, 0] = 0
        return super().forward(*arguments, attention_mask=mask, **named)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_subclass_with_a_forward_of_its_own_gets_the_arguments_by_name(model, backend):
    torch.manual_seed(1)
    blind = Blind(CONFIG, attn_implementation=backend).eval()
    blind.load_state_dict(model.state_dict())
    prompt = torch.tensor([[5, 9, 13, 2]])
    masked = torch.tensor([[0, 1, 1, 1]])
    positions = {"use_cache": False}  # positions of generate skip padding: compare without them, one token on
    logits = model(prompt, attention_mask=masked, position_ids=torch.arange(4)[None], **positions).logits[0, -1]
    assert int(blind.generate(prompt, max_new_tokens=1)[0, -1]) == int(logits.argmax())
    assert blind.generate(prompt, max_new_tokens=4).shape == (1, 8)


def test_a_hook_on_the_model_gets_the_arguments_by_name_and_may_change_them(model, prompt):
    expected = model.generate(torch.full_like(prompt, 7), max_new_tokens=1)[:, -1]
    seen: list[set[str]] = []

    def replace(module, arguments, named):
        seen.append(set(named))
        return arguments, {**named, "input_ids": torch.full_like(named["input_ids"], 7)}

    handle = model.register_forward_pre_hook(replace, with_kwargs=True)
    found = model.generate(prompt, max_new_tokens=1)[:, -1]
    handle.remove()
    assert torch.equal(found, expected)
    assert {"input_ids", "past_key_values", "attention_mask"} <= seen[0]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_past_that_was_computed_with_gradients_is_continued(backend, prompt):
    model = make_model()
    model.set_attn_implementation(backend)
    past = model(prompt[:, :2]).past_key_values
    assert past[0][0].requires_grad
    assert torch.equal(
        model.generate(prompt, past_key_values=past, max_new_tokens=4), model.generate(prompt, max_new_tokens=4)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor(1)}, r"padding mask \(2, 4\), got \(\)"),
        ({"past_key_values": 3}, "past_key_values must be a cache .* got int"),
        ({"inputs_embeds": torch.zeros(3, 2, 32)}, "inputs_embeds has 3 rows, input_ids 2"),
        ({"stopping_criteria": [lambda ids, scores: None]}, "a stopping criterion returns .* got None"),
    ],
)
def test_what_torch_would_refuse_in_its_own_words_is_refused_in_ours(model, prompt, arguments, message):
    with pytest.raises(InputError, match=message):
        model.generate(prompt, **{"max_new_tokens": 2, **arguments})


def test_an_empty_list_of_forced_ids_forces_none(model, prompt):
    assert torch.equal(
        model.generate(prompt, max_new_tokens=3, forced_eos_token_id=[]), model.generate(prompt, max_new_tokens=3)
    )


def test_the_prompt_may_be_called_inputs_but_not_twice():
    model, ids = make_model(), torch.tensor([[5, 9, 13]])
    assert torch.equal(model.generate(inputs=ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    assert len(list(model.stream(inputs=ids, max_new_tokens=4))) == 4
    with pytest.raises(InputError, match="inputs and input_ids are two names of the prompt"):
        model.generate(ids, inputs=ids, max_new_tokens=4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_prompt_that_ends_with_padding_is_warned_of_once_at_the_callers_line(settings):
    model, ids = make_model(), torch.tensor([[5, 9, 0], [7, 3, 8]])
    with pytest.warns(UserWarning, match=r'1 of the prompts end with padding.*padding_side="left"') as caught:
        model.generate(ids, max_new_tokens=3, **settings)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids[1:], max_new_tokens=3, **settings)
        model.generate(ids.flip(1), max_new_tokens=3, **settings)


def test_embeddings_masked_at_the_end_are_warned_of():
    model, vectors = make_model(), torch.randn(2, 3, 32)
    with pytest.warns(UserWarning, match="2 of the prompts end with padding"):
        model.generate(inputs_embeds=vectors, attention_mask=torch.tensor([[1, 1, 0], [1, 0, 0]]), max_new_tokens=2)


# --- scores that are no numbers ---------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def spoiled(row: int, length: int, value: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A processor that makes one score of a row another, once there are ``length`` tokens."""

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        if input_ids.shape[1] >= length:
            scores[row, 7] = value
        return scores

    return process


@pytest.mark.parametrize("name", WAYS)
def test_scores_that_are_nan_pick_no_token_and_it_is_said_which(model, prompt, name):
    way = WAYS[name]
    ids = prompt[:1] if name == "lookup" else prompt
    copies = way.get("num_beams", 1) // way.get("num_beam_groups", 1)
    row = len(ids) - 1
    with pytest.raises(NumericalError, match=rf"\(sequence {row}, new token 3\): .*verify.*remove_invalid_values"):
        model.generate(
            ids, max_new_tokens=6, logits_processor=[spoiled(row * copies, ids.shape[1] + 2, torch.nan)], **way
        )


def test_sampling_by_infinity_is_the_same_error_and_greedy_search_takes_the_infinite(model, prompt):
    for value in (torch.inf, torch.nan):
        with pytest.raises(NumericalError, match=r"sequence 1, new token 1\)"):
            model.generate(prompt, max_new_tokens=2, do_sample=True, logits_processor=[spoiled(1, 0, value)])
    best = model.generate(prompt, max_new_tokens=1, logits_processor=[spoiled(1, 0, torch.inf)])
    assert best[1, -1] == 7


def test_a_token_is_not_yielded_that_no_number_picked(model, prompt):
    length = prompt.shape[1]
    tokens = model.stream(prompt, max_new_tokens=6, logits_processor=[spoiled(0, length + 2, torch.nan)])
    assert [len(next(tokens)) for _ in range(2)] == [2, 2]
    with pytest.raises(NumericalError):
        next(tokens)


@pytest.mark.parametrize("ends", [True, False])
def test_where_reading_would_wait_for_a_device_nan_is_found_at_the_end(model, prompt, ends, monkeypatch):
    as_on_a_device(monkeypatch)
    calls: list[int] = []
    arguments = {"max_new_tokens": 6, "eos_token_id": 39 if ends else None}
    handle = count_forwards(model, calls)
    try:
        with pytest.raises(NumericalError, match=r"\(sequence 0, new token 3\)"):
            model.generate(prompt[:1], **arguments, logits_processor=[spoiled(0, prompt.shape[1] + 2, torch.nan)])
    finally:
        handle.remove()
    assert len(calls) == (3 if ends else 6), "where values are read, a sequence ends with it"


def test_what_comes_after_the_end_of_a_sequence_may_be_no_number(model, prompt):
    whole = model.generate(prompt, max_new_tokens=6)
    arguments = {"max_new_tokens": 6, "eos_token_id": int(whole[0, prompt.shape[1]])}
    expected = model.generate(prompt, **arguments)
    processors = [spoiled(0, prompt.shape[1] + 1, torch.nan)]
    assert torch.equal(model.generate(prompt, **arguments, logits_processor=processors), expected)


def test_scores_that_allow_nothing_pick_no_token(model, prompt):
    nothing = [lambda ids, scores: torch.full_like(scores, -torch.inf)]
    for way in ({}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        with pytest.raises(NumericalError, match=r"\(sequence 0, new token 1\).*logits processor"):
            model.generate(prompt[:1], max_new_tokens=4, logits_processor=nothing, **way)


def test_a_sequence_that_has_ended_without_numbers_does_not_change_what_others_draw(model, prompt):
    def end_first(ids, scores):
        if ids.shape[1] == prompt.shape[1]:
            scores = scores.clone()
            scores[0] = -torch.inf
            scores[0, 5] = 0
        return scores

    def sampled(*processors):
        torch.manual_seed(4)
        arguments = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": 5}
        return model.generate(prompt, logits_processor=[end_first, *processors], **arguments)

    expected = sampled()
    assert expected[0, prompt.shape[1]] == 5
    assert torch.equal(sampled(spoiled(0, prompt.shape[1] + 1, torch.nan)), expected)


@pytest.mark.parametrize("row", [0, 1])
def test_on_a_device_the_token_is_named_that_had_no_number(model, prompt, row, monkeypatch):
    as_on_a_device(monkeypatch)
    with pytest.raises(NumericalError, match=rf"\(sequence {row}, new token 2\)"):
        model.generate(prompt, max_new_tokens=6, logits_processor=[spoiled(row, prompt.shape[1] + 1, torch.nan)])


def test_numbers_in_place_of_nan_can_be_asked_for(model, prompt):
    with torch.no_grad():
        broken = make_model()
        broken.lm_head.weight[7] = torch.nan
    with pytest.raises(NumericalError):
        broken.generate(prompt, max_new_tokens=2)
    assert broken.generate(prompt, max_new_tokens=2, remove_invalid_values=True).shape == (2, 6)
