"""Guess several tokens ahead cheaply, then check them all with one forward pass.

The ids are a b, the guess is c d e. One pass over b c d e gives what the model itself would pick after
b, c, d and e. If that is c, d, x, y, then c and d were right, x corrects e, and three tokens have cost one
pass. Every token is the model's own pick given the tokens before it, so greedy search makes the same ids
as without guessing, and sampling draws from the same distribution. (Rounding apart; and a dynamic-NTK
model beyond its trained length rotates keys by the length they were computed at, so it may differ there.)

Guesses come from an assistant, a smaller model with the same vocabulary (Leviathan et al. 2023), or, for
prompt lookup, from the sequence itself: what followed the last time it ended like this. ``Pace`` says how many.

An assistant that is the model itself with rounded weights needs no prompt pass and no cache of its own: it guesses on
the model's. Before the check the cache is cropped to what the model has computed, so that the model's keys and values
overwrite those of the guess, and the cache never keeps a number of the rounded weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from openllama.cache import PreallocatedCache
from openllama.generation.outputs import Step
from openllama.generation.processors import apply
from openllama.generation.sampling import pick
from openllama.generation.state import LanguageModel, Request, Sequences
from openllama.generation.stopping import stopped
from openllama.outputs import CausalLMOutput


@torch.no_grad()
def guess_ahead(sequences: Sequences, request: Request) -> Iterator[Step]:
    """Yield the next token of the one sequence, (1,), until it has ended or reached the length."""
    source = _source(sequences, request)
    pace = SampledPace() if type(source) is Assistant and request.config.do_sample else Pace(source.first)
    while sequences.length < request.config.max_length:
        start = sequences.length
        guess = source.guess(sequences.ids, min(pace.next(), request.config.max_length - start - 1))  # (n,)
        sequences.append(guess)
        logits, output = sequences.forward(keep=len(guess) + 1)
        scores = _process(sequences.ids, logits, request)  # (n + 1, V)
        picked = pick(scores, request.config.do_sample, request.generator)
        tokens = picked.tolist()
        right = _count_right(guess.tolist(), tokens)
        pace.learn(len(guess), right)
        sequences.crop(start + right)
        sequences.check_picked(scores[: right + 1], picked[: right + 1])
        sequences.append(picked[right])

        for index, token in enumerate(tokens[: right + 1]):
            step = _step(picked[index, None], scores[index, None], logits, output, index)
            ended = token in request.config.eos_token_ids
            if request.stopping:
                ended |= bool(stopped(request.stopping, sequences.ids[:, : start + index + 1], step.scores))
            if ended and index < right:
                sequences.crop(start + index)
                sequences.append(step.token)
            try:
                yield step
            except GeneratorExit:  # what comes after was never taken
                sequences.crop(start + index)
                raise
            if ended:
                sequences.check()
                return
    sequences.check()


def _source(sequences: Sequences, request: Request) -> Lookup | Assistant:
    """What guesses for the model of ``sequences``."""
    assistant, mask = request.assistant, request.attention_mask
    if assistant is None:
        return Lookup(request)
    request = replace(request, config=request.config.replace(output_attentions=False, output_hidden_states=False))
    if _can_share(sequences, assistant):
        return RoundedCopy(assistant, replace(request, past=sequences.cache))
    if mask is not None:
        mask = mask[:, -request.input_ids.shape[1] :]
    return Assistant(assistant, replace(request, attention_mask=mask, offset=0, past=None))


def _can_share(sequences: Sequences, assistant: LanguageModel) -> bool:
    """Whether ``assistant`` is the model, rounded, and writes its keys and values as they lie in the model's cache.

    Its config says so. Another model of the same config would guess worse, and the ids would be the same.
    """
    own, config = sequences.model.config, assistant.config
    if config.quantization in (None, own.quantization):
        return False
    if replace(config, quantization=own.quantization, extra=own.extra) != own:
        return False
    if not isinstance(sequences.cache, PreallocatedCache):  # that of eager grows, for the bits of transformers
        return False
    keys = sequences.cache.storage[0][0]
    heads = keys.shape[1]  # a process of several may have a part of them
    return (heads, keys.dtype, keys.device) == (config.num_attention_heads, assistant.dtype, assistant.device)


def _count_right(guess: list[int], picked: list[int]) -> int:
    """How many tokens of the guess were picked, from its beginning on: 3 4 5 and 3 4 6 7 -> 2."""
    wrong = (index for index, token in enumerate(guess) if token != picked[index])
    return next(wrong, len(guess))


class Pace:
    """How many tokens to guess: ``first``, then one more than were right the last time.

    Wrong guesses cost what it takes to compute them. After one that was wrong from its first token on, 2 tokens are
    made without guessing, after another 4, then 8, up to 64: a source that is never right is asked 8 times in 256.

        3 guessed, 2 right: 3 next; 3 right: 4 next; none right: 0, 0, 1; none right again: 0, 0, 0, 0, 1
    """

    def __init__(self, first: int) -> None:
        self._count, self._pause, self._left = first, 2, 0

    def next(self) -> int:
        """The number for the next pass."""
        if self._left == 0:
            return self._count
        self._left -= 1
        return 0

    def learn(self, guessed: int, right: int) -> None:
        """Of ``guessed`` tokens the first ``right`` were right."""
        if guessed == 0:
            return
        # A guess that was right may have been shorter than asked for, which says nothing against a longer one.
        self._count = max(right + 1, self._count if right == guessed else 0)
        self._left, self._pause = (0, 2) if right else (self._pause, min(64, 2 * self._pause))


class SampledPace:
    """That of transformers 4.31.0, when an assistant guesses and tokens are drawn: 5, then 2 more or one less.

    A number is drawn for each token of a guess, so that another pace would draw other tokens under the same seed.
    """

    def __init__(self) -> None:
        self._count = 5

    def next(self) -> int:
        """The number for the next pass."""
        return self._count

    def learn(self, guessed: int, right: int) -> None:
        """Two more where all that were wanted were right, else one less."""
        self._count = max(1, self._count + (2 if right == self._count else -1))


class Lookup:
    """Guesses what followed the sequence's ending when it came before.

    4 5 6 7 4 5 and 2 tokens wanted: after the earlier 4 5 came 6 7. An ending of
    ``max_matching_ngram_size`` tokens is looked for first, then shorter ones.
    """

    def __init__(self, request: Request) -> None:
        self.first = self.most = request.config.prompt_lookup_num_tokens or 0
        self.longest = request.config.max_matching_ngram_size

    def guess(self, ids: Tensor, count: int) -> Tensor:
        """Up to ``count`` tokens, (n,), to follow ids (1, L); none where nothing recurs.

        Of several places, the last that as many tokens follow as are wanted, else the first.
        """
        sequence, wanted = ids[0], min(self.most, count)
        if wanted == 0:
            return sequence[:0]
        for size in range(min(self.longest, len(sequence) - 1), 0, -1):
            matches = (sequence[:-1].unfold(0, size, 1) == sequence[-size:]).all(dim=1)
            ends = [place + size for place in matches.nonzero().flatten().tolist()]
            if ends:
                end = max((end for end in ends if end + wanted <= len(sequence)), default=ends[0])
                return sequence[end : end + wanted]
        return sequence[:0]


class Assistant:
    """A smaller model that guesses greedily, with a cache of its own."""

    first = 3  # a pass over 4 tokens takes about as long as one over a single token

    def __init__(self, model: LanguageModel, request: Request) -> None:
        self.request, self.ends = request, request.config.eos_token_ids
        self.sequences = Sequences(model, request)

    def guess(self, ids: Tensor, count: int) -> Tensor:
        """Up to ``count`` tokens, (n,), to follow ids (1, L), and none after one that ends the sequence.

        With none wanted, ids are taken note of, and computed with the next guess.
        """
        self.sequences.crop(min(self.sequences.length, ids.shape[1] - 1))  # what came after may have been wrong
        return self._continue(ids, count)

    def _continue(self, ids: Tensor, count: int) -> Tensor:
        """The guess, after taking over those of ids that are not among its own."""
        self.sequences.append(ids[:, self.sequences.length :])
        for _ in range(count):
            logits, _ = self.sequences.forward()
            token = apply(self.request.processors, self.sequences.ids, logits[:, -1]).argmax(dim=-1)
            self.sequences.append(token)
            if self.ends and int(token) in self.ends:
                break
        return self.sequences.ids[0, ids.shape[1] :]


class RoundedCopy(Assistant):
    """The model itself with rounded weights, which guesses on the model's cache: its sequences have that cache."""

    def guess(self, ids: Tensor, count: int) -> Tensor:
        """As an ``Assistant``; none before the model has computed all tokens but the last, as it has after each step.

        The model computes that token and the guess anew: they are not left in its cache, whatever happens here.
        """
        computed = ids.shape[1] - 1
        if self.sequences.cache.get_seq_length() < self.request.offset + computed:
            return ids[0, :0]
        try:
            return self._continue(ids, count)
        finally:
            self.sequences.crop(computed)


def _process(ids: Tensor, logits: Tensor, request: Request) -> Tensor:
    """Scores (n, V) from logits (1, n, V) of the last n tokens of ids, each seeing the sequence up to its token."""
    processors = [*request.processors, *request.filters]
    first = ids.shape[1] - logits.shape[1] + 1
    return torch.cat([apply(processors, ids[:, : first + i], logits[:, i]) for i in range(logits.shape[1])])


def _step(token: Tensor, scores: Tensor, logits: Tensor, output: CausalLMOutput, index: int) -> Step:
    """The step of logits (1, n, V) number ``index``, with its part of a forward pass over several tokens.

    A pass over a prompt of 3 and a guess of 2 is shared out as 3, 1, 1.
    """
    attentions, states = output.attentions, output.hidden_states
    behind = logits.shape[1] - 1 - index  # tokens of the guess that come after
    if states is not None:
        length = states[0].shape[1]
        begin = 0 if index == 0 else length - behind - 1
        states = tuple(layer[:, begin : length - behind] for layer in states)
    if attentions is not None:
        length, keys = attentions[0].shape[2:]
        begin = 0 if index == 0 else length - behind - 1
        attentions = tuple(layer[:, :, begin : length - behind, : keys - behind] for layer in attentions)
    return Step(token, scores, logits[:, index], attentions, states)
