"""Guess several tokens ahead cheaply, then check them all with one forward pass.

The ids are a b, the guess is c d e. One pass over b c d e gives what the model itself would pick after
b, c, d and e. If that is c, d, x, y, then c and d were right, x corrects e, and three tokens have cost one
pass. Every token is the model's own pick given the tokens before it, so greedy search makes the same ids
as without guessing, and sampling draws from the same distribution. (Rounding apart; and a dynamic-NTK
model beyond its trained length rotates keys by the length they were computed at, so it may differ there.)

Guesses come from an assistant, a smaller model with the same vocabulary (Leviathan et al. 2023), or, for
prompt lookup, from the sequence itself: what followed the last time it ended like this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from openllama.generation.outputs import Step
from openllama.generation.processors import apply
from openllama.generation.sampling import pick
from openllama.generation.state import LanguageModel, Request, Sequences
from openllama.generation.stopping import stopped
from openllama.outputs import CausalLMOutput


@torch.no_grad()
def guess_ahead(sequences: Sequences, request: Request) -> Iterator[Step]:
    """Yield the next token of the one sequence, (1,), until it has ended or reached the length."""
    source = Lookup(request) if request.assistant is None else Assistant(request.assistant, request)
    while sequences.length < request.config.max_length:
        start = sequences.length
        guess = source.guess(sequences.ids, request.config.max_length - start - 1)  # (n,)
        sequences.append(guess)
        logits, output = sequences.forward(keep=len(guess) + 1)
        scores = _process(sequences.ids, logits, request)  # (n + 1, V)
        picked = pick(scores, request.config.do_sample, request.generator)
        tokens = picked.tolist()
        right = _count_right(guess.tolist(), tokens)
        source.learn(right)
        sequences.crop(start + right)
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
                return


def _count_right(guess: list[int], picked: list[int]) -> int:
    """How many tokens of the guess were picked, from its beginning on: 3 4 5 and 3 4 6 7 -> 2."""
    wrong = (index for index, token in enumerate(guess) if token != picked[index])
    return next(wrong, len(guess))


class Lookup:
    """Guesses what followed the sequence's ending when it came before.

    4 5 6 7 4 5 and 2 tokens wanted: after the earlier 4 5 came 6 7. An ending of
    ``max_matching_ngram_size`` tokens is looked for first, then shorter ones.
    """

    def __init__(self, request: Request) -> None:
        self.count = request.config.prompt_lookup_num_tokens or 0
        self.longest = request.config.max_matching_ngram_size

    def guess(self, ids: Tensor, room: int) -> Tensor:
        """Up to ``room`` tokens, (n,), to follow ids (1, L); none where nothing recurs.

        Of several places, the last that as many tokens follow as are wanted, else the first.
        """
        sequence, wanted = ids[0], min(self.count, room)
        for size in range(min(self.longest, len(sequence) - 1), 0, -1):
            matches = (sequence[:-1].unfold(0, size, 1) == sequence[-size:]).all(dim=1)
            ends = [place + size for place in matches.nonzero().flatten().tolist()]
            if ends:
                end = max((end for end in ends if end + wanted <= len(sequence)), default=ends[0])
                return sequence[end : end + wanted]
        return sequence[:0]

    def learn(self, right: int) -> None:
        """Nothing: how far it looks is a setting."""


class Assistant:
    """A smaller model that guesses greedily, with a cache of its own.

    It tries 5 tokens at first; 2 more after a guess that was right throughout, else one less.
    """

    def __init__(self, model: LanguageModel, request: Request) -> None:
        config = request.config.replace(output_attentions=False, output_hidden_states=False)
        mask = request.attention_mask
        if mask is not None:
            mask = mask[:, -request.input_ids.shape[1] :]
        self.request = replace(request, config=config, attention_mask=mask, offset=0, past=None)
        self.ends = request.config.eos_token_ids
        self.sequences, self.count = Sequences(model, self.request), 5

    def guess(self, ids: Tensor, room: int) -> Tensor:
        """Up to ``room`` tokens, (n,), to follow ids (1, L), and none after one that ends the sequence."""
        length = ids.shape[1]
        known = min(self.sequences.length, length - 1)
        self.sequences.crop(known)  # what came after was guessed, and may have been wrong
        self.sequences.append(ids[:, known:])
        for _ in range(min(self.count, room)):
            logits, _ = self.sequences.forward()
            token = apply(self.request.processors, self.sequences.ids, logits[:, -1]).argmax(dim=-1)
            self.sequences.append(token)
            if self.ends and int(token) in self.ends:
                break
        return self.sequences.ids[0, length:]

    def learn(self, right: int) -> None:
        """Set how many tokens to guess next, knowing how many of the last were right."""
        self.count = max(1, self.count + (2 if right == self.count else -1))


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
