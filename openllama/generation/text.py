"""Text in and out: streams of characters, stop strings, scores and embeddings. The loop itself knows ids only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from openllama.errors import InputError
from openllama.generation.embedding import embed_sequences
from openllama.generation.loop import stream
from openllama.generation.scoring import ContinuationScore, Score, score, score_continuations
from openllama.generation.state import Decoding, LanguageModel
from openllama.generation.stopping import StoppingCriterion
from openllama.tokenizer import OpenLlamaTokenizer, StreamDecoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from openllama.generation.arguments import Arguments


def stream_text(
    model: LanguageModel,
    tokenizer: OpenLlamaTokenizer,
    prompt: str,
    stop_strings: Sequence[str] = (),
    **arguments: Unpack[Arguments],
) -> Iterator[str]:
    """The continuation of ``prompt`` as it is made, whole characters at a time, up to the first stop string.

    ``arguments`` are those of ``generate``, and are checked at once.
    """
    _check(stop_strings)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return until(decoded(tokenizer, ids[0].tolist(), stream(model, ids, **arguments)), stop_strings)


def decoded(tokenizer: OpenLlamaTokenizer, prompt: Iterable[int], tokens: Iterable[Tensor | int]) -> Iterator[str]:
    """What each token, an id or (1,), adds to the text that begins with ``prompt``, whose own text is left out."""
    decoder = StreamDecoder(tokenizer)
    for token_id in prompt:
        decoder.push(token_id)  # what a token shows depends on what stands before it
    for token in tokens:
        yield decoder.push(int(token))
    yield decoder.finish()


def until(pieces: Iterable[str], stop_strings: Sequence[str]) -> Iterator[str]:
    """Pass text on up to the first stop string, without it; what may be the beginning of one waits.

    Pieces "user", ":", "x" and stop string "user:" give nothing; "use", "d" give "", "used".
    """
    waiting = ""
    for piece in pieces:
        waiting += piece
        found = [waiting.index(stop) for stop in stop_strings if stop in waiting]
        if found:
            yield waiting[: min(found)]
            return
        sure = len(waiting) - _held(waiting, stop_strings)
        yield waiting[:sure]
        waiting = waiting[sure:]
    yield waiting


def stop_at(tokenizer: OpenLlamaTokenizer, stop_strings: Sequence[str], prompt_length: int) -> StoppingCriterion:
    """A criterion that ends each sequence whose continuation, as text, contains one of the strings; for batches, beams.

    The string stays in the ids; ``"".join(until([text], stop_strings))`` cuts a text before it.
    """
    _check(stop_strings)

    def criterion(input_ids: Tensor, scores: Tensor) -> Tensor:
        # A continuation decoded alone would lose the space that it begins with.
        whole = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        prompts = tokenizer.batch_decode(input_ids[:, :prompt_length], skip_special_tokens=True)
        texts = [text[len(prompt) :] for text, prompt in zip(whole, prompts, strict=True)]
        return input_ids.new_tensor([any(stop in text for stop in stop_strings) for text in texts]).bool()

    return criterion


def score_texts(
    model: LanguageModel,
    tokenizer: OpenLlamaTokenizer,
    texts: Sequence[str],
    batch_size: int = 8,
    stride: int | None = None,
) -> list[Score]:
    """Log-probabilities and perplexity of texts, encoded as the tokenizer is set to; see ``score``.

    A book is longer than the model's context:

        [book] = score_texts(model, tokenizer, [text], stride=model.config.max_position_embeddings // 2)
        print(book.perplexity)
    """
    return score(model, _encoded(tokenizer, texts), batch_size, stride)


def score_text_continuations(
    model: LanguageModel, tokenizer: OpenLlamaTokenizer, pairs: Sequence[tuple[str, str]], batch_size: int = 8
) -> list[ContinuationScore]:
    """log p(continuation | prompt) of pairs of strings, and whether greedy search would make the continuation.

    See ``continuation_ids``, which encodes them, and ``score_continuations``. Which answer is the most likely:

        answers = [" Paris", " Rome"]
        scores = score_text_continuations(model, tokenizer, [("The capital of France is", one) for one in answers])
        print(answers[max(range(2), key=lambda i: scores[i].total)])
    """
    return score_continuations(model, [continuation_ids(tokenizer, *pair) for pair in pairs], batch_size)


def continuation_ids(tokenizer: OpenLlamaTokenizer, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of its continuation, cut where the ids of both together leave those of the prompt.

    As in lm-evaluation-harness, spaces at the end of the prompt go to the continuation, and no eos is added; bos is if
    the tokenizer is set to. An empty prompt is the token before a text: bos, or else the eos of the text before.

    "To be " + "or not" -> ids of "To be", ids of " or not"
    """
    spaces = len(prompt) - len(prompt.rstrip())
    kept = tokenizer.encode(prompt[: len(prompt) - spaces], add_special_tokens=False)
    ids = tokenizer.encode(prompt + continuation, add_special_tokens=False)
    shared = next((i for i, pair in enumerate(zip(kept, ids, strict=False)) if pair[0] != pair[1]), len(kept))
    if len(ids) <= shared:
        raise InputError(f"the continuation {continuation!r} adds no token to its prompt; leave it out")
    before = [tokenizer.bos_token_id] if tokenizer.add_bos_token else [] if shared else [tokenizer.eos_token_id]
    if None in before:
        raise InputError("the tokenizer has no token to begin a text with; give a prompt")
    return before + ids[:shared], ids[shared:]


def embed_texts(
    model: Decoding, tokenizer: OpenLlamaTokenizer, texts: Sequence[str], pooling: str = "mean", batch_size: int = 8
) -> Tensor:
    """Embeddings (N, C) of texts, encoded as the tokenizer is set to; see ``embed_sequences``.

    How near two texts are to a third:

        query, *others = embed_texts(model, tokenizer, ["sweet sorrow", "Parting is such sweet sorrow", "A horse!"])
        print([torch.cosine_similarity(query, other, dim=0).item() for other in others])
    """
    return embed_sequences(model, _encoded(tokenizer, texts), pooling, batch_size)


def _encoded(tokenizer: OpenLlamaTokenizer, texts: Sequence[str]) -> list[list[int]]:
    if isinstance(texts, str):
        raise InputError(f"texts must be a list of strings, got the string {texts[:20]!r}; put it into a list")
    return tokenizer([*texts]).input_ids if texts else []


def _held(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest ending of ``text`` that begins a stop string: "abc" and "cd" have 1."""
    beginnings = (stop[:size] for stop in stop_strings for size in range(1, len(stop)))
    return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)


def _check(stop_strings: Sequence[str]) -> None:
    if isinstance(stop_strings, str) or not all(stop_strings):
        raise InputError(f"stop_strings must be a list of strings that are not empty, got {stop_strings!r}")
