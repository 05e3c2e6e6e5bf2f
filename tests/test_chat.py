"""A conversation: what the model reads, what is computed, what is forgotten."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from openllama import OpenLlamaForCausalLM
from openllama.chat import ChatSession, ChatTemplate
from openllama.errors import InputError
from openllama.quantized import quantize
from openllama.tokenizer import OpenLlamaTokenizer
from openllama.tokenizer.template import DEFAULT_TEMPLATE
from tests.checkpoints import tiny_config
from tests.generating import count_forwards
from tests.sentencepieces import trained
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OpenLlamaTokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(trained("v1-like"))
    return OpenLlamaTokenizer(file, add_bos_token=False)


def session_of(tokenizer: OpenLlamaTokenizer, context: int = 400, **settings: object) -> ChatSession:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.4}
    model = OpenLlamaForCausalLM(tiny_config(max_position_embeddings=context, eos_token_id=None, **sizes)).eval()
    return ChatSession(model, tokenizer, **{"max_new_tokens": 8, **settings})


def say(session: ChatSession, question: str) -> str:
    return "".join(session.ask(question))


def test_the_model_reads_the_turns_end_to_end(tokenizer):
    session = session_of(tokenizer)
    say(session, "Who art thou?")
    say(session, "And he?")
    first, second = session.turns
    assert first[: -8 - 1] == tokenizer.encode("user:Who art thou?\nsystem:")
    assert first[-1] == second[-1] == tokenizer.eos_token_id
    assert second[: -8 - 1] == tokenizer.encode("user:And he?\nsystem:")


def test_answers_are_those_of_a_model_that_reads_everything_anew(tokenizer):
    session = session_of(tokenizer)
    for question in ("Who art thou?", "And he?", "明月"):
        before = [token for turn in session.turns for token in turn]
        say(session, question)
        prompt = before + tokenizer.encode(session.template.question(question))
        ids = session.model.generate(torch.tensor([prompt]), max_new_tokens=8, eos_token_id=tokenizer.eos_token_id)
        answer = ids[0, len(prompt) :].tolist()
        assert (
            session.turns[-1][-1 - len(answer) :][: len(answer)] == answer
            or session.turns[-1][-len(answer) :] == answer
        )


def test_no_token_is_computed_twice(tokenizer):
    session = session_of(tokenizer)
    computed: list[int] = []
    count_forwards(session.model, computed)
    for question in ("Who art thou?", "And he?", "And she?"):
        say(session, question)
    # all but the end of the last answer, which nothing has asked for yet
    assert sum(computed) == sum(map(len, session.turns)) - 2


def test_reset_forgets(tokenizer):
    session = session_of(tokenizer)
    answer = say(session, "Who art thou?")
    say(session, "And he?")
    session.reset()
    assert session.turns == []
    assert say(session, "Who art thou?") == answer


def test_an_answer_that_is_not_taken_to_its_end_is_kept_as_far_as_it_came(tokenizer):
    session = session_of(tokenizer)
    with contextlib.closing(session.ask("Who art thou?")) as pieces:
        for _ in range(3):
            next(pieces)
    assert session.answered == 3
    assert session.turns[0][-1] == tokenizer.eos_token_id
    assert len(session.turns[0]) == len(tokenizer.encode(session.template.question("Who art thou?"))) + 3 + 1
    say(session, "And he?")
    assert len(session.turns) == 2


def test_the_oldest_turns_make_room_and_it_is_told_how_many(tokenizer):
    session = session_of(tokenizer, context=90)
    dropped = []
    for number in range(6):
        say(session, f"question {number}")
        dropped.append(session.dropped)
        assert sum(map(len, session.turns)) <= 90
    assert dropped[0] == 0
    assert sum(dropped) == 6 - len(session.turns) > 0
    fresh = session_of(tokenizer, context=90)
    fresh.turns = session.turns[:-1]
    say(fresh, "question 5")
    assert fresh.turns[-1] == session.turns[-1], "what is left is computed anew, at its new positions"


def test_an_end_of_several_tokens_stops_the_answer_and_is_not_shown(tokenizer):
    free = session_of(tokenizer)
    text = say(free, "Who art thou?")
    end = text[3:5]
    session = session_of(tokenizer, template=ChatTemplate(DEFAULT_TEMPLATE.removesuffix("</s>") + end))
    assert say(session, "Who art thou?") == text[: text.index(end)]


def test_a_question_that_leaves_no_room_is_refused_and_changes_nothing(tokenizer):
    session = session_of(tokenizer, context=40)
    say(session, "a")
    turns = [list(turn) for turn in session.turns]
    with pytest.raises(InputError, match=r"\d+ tokens leaves no room for an answer in a context of 40"):
        session.ask("long " * 50)
    assert session.turns == turns


@pytest.mark.parametrize("text", ["", "{prompt}", "{answer}", "{answer}{prompt}", "{prompt}{answer}{answer}"])
def test_a_template_without_both_sides_is_refused(text):
    with pytest.raises(InputError, match="each once"):
        ChatTemplate(text)


def test_a_template_is_read_from_a_file(tmp_path):
    (tmp_path / "template").write_text("Q: {prompt}\nA: {answer}\n\n\n")
    template = ChatTemplate.from_file(tmp_path / "template")
    assert template.question("why?") == "Q: why?\nA: "
    assert template.end == "\n\n"


@pytest.mark.parametrize("guesses", ["none", "lookup", "assistant", "rounded copy"])
@pytest.mark.parametrize("taken", [1, 2, 4, 7])
def test_what_an_interrupted_answer_guessed_ahead_is_not_remembered(tokenizer, guesses, taken):
    model = session_of(tokenizer).model
    generation_config = model.generation_config.replace(prompt_lookup_num_tokens=5 if guesses == "lookup" else None)
    assistants = {"assistant": model, "rounded copy": quantize(copy.deepcopy(model), "int8")}
    settings = {"generation_config": generation_config, "assistant_model": assistants.get(guesses)}
    session = ChatSession(model, tokenizer, max_new_tokens=20, **settings)
    pieces = session.ask("the king, the king, the king,")
    for _ in range(taken):
        next(pieces)
    pieces.close()
    before = [token for turn in session.turns for token in turn]
    assert session._cache.get_seq_length() < len(before)
    answer = say(session, "And he?")
    anew = ChatSession(model, tokenizer, max_new_tokens=20)
    anew.turns = [before]
    assert say(anew, "And he?") == answer


def test_a_rounded_copy_computes_no_turn_of_the_conversation(tokenizer):
    """Only guesses, on the cache of the session."""
    alone = session_of(tokenizer)
    rounded, passes = quantize(copy.deepcopy(alone.model), "int8"), []
    count_forwards(rounded, passes)
    session = ChatSession(alone.model, tokenizer, max_new_tokens=8, assistant_model=rounded)
    for question in ("Who art thou?", "And he?", "明月"):
        assert say(session, question) == say(alone, question)
        assert set(passes) == {1}
        passes.clear()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "past_key_values"),
        ({"suppress_tokens": [99999]}, "99999"),
        ({"min_length": 50}, "min_length 50"),
    ],
)
def test_settings_that_cannot_serve_a_conversation_are_refused_at_once(tokenizer, settings, message):
    model = session_of(tokenizer).model
    with pytest.raises(InputError, match=message):
        ChatSession(model, tokenizer, max_new_tokens=8, generation_config=model.generation_config.replace(**settings))


def test_at_most_half_of_the_context_is_kept_free_for_an_answer(tokenizer):
    session = session_of(tokenizer, context=400, max_new_tokens=1000)
    pieces = session.ask("Who art thou?")
    next(pieces)
    pieces.close()
    next(session.ask("And he?"))
    assert (session.dropped, len(session.turns)) == (0, 2)


def test_a_template_of_the_tokenizer_that_is_not_used_is_warned_of(tokenizer: OpenLlamaTokenizer) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ messages[0]['content'] }}"
    with pytest.warns(UserWarning, match="chat template of its own, which is not used"):
        ChatSession(tiny_model(vocab_size=len(own)), own)
