"""Contrastive search (Su et al. 2022): likely tokens that do not repeat what has come.

Each of the ``top_k`` likeliest tokens is tried: the last layer's hidden state that it makes is compared
with every earlier one, and the token with the highest

    (1 - penalty_alpha) * probability - penalty_alpha * highest cosine similarity

is taken. Alpha 0.6, two tokens: probability 0.7, similarity 0.9 -> -0.26; 0.2 and 0.1 -> 0.02: the second.
As in transformers 4.31.0, the states of padding are compared with as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from openllama.generation.outputs import Step
from openllama.generation.processors import apply
from openllama.generation.state import Request, Sequences


@torch.no_grad()
def contrastive_search(sequences: Sequences, request: Request) -> Iterator[Step]:
    """Yield the next token of every sequence until all have ended or reached the length."""
    config = request.config
    every = torch.arange(len(sequences.ids), device=sequences.ids.device)
    width = min(config.top_k or 1, sequences.model.config.vocab_size)  # k, tokens to try
    logits, output = sequences.forward(hidden_states=True)
    states, attentions = output.hidden_states or (), output.attentions  # of the forward pass behind the logits
    context = states[-1]  # (B, S, C)
    while sequences.length < config.max_length:
        scores = apply(request.processors, sequences.ids, logits[:, -1])
        likely, tokens = scores.softmax(dim=-1).topk(width)  # (B, k)
        sequences.check_picked(likely, torch.zeros_like(every))
        sequences.reorder(every.repeat_interleave(width))  # each sequence k times, once for each token
        sequences.append(tokens)
        tried_logits, tried = sequences.forward(hidden_states=True)
        tried_states = tried.hidden_states or ()
        choice = best(context, tried_states[-1], likely, config.penalty_alpha or 0.0)
        rows = every * width + choice
        sequences.reorder(rows)
        token = sequences.pad_ended(sequences.ids[:, -1])
        sequences.replace_last(token)
        yield Step(token, scores, logits[:, -1], attentions, states if config.output_hidden_states else None)
        if sequences.have_ended(scores):
            break
        logits, states = tried_logits[rows], tuple(layer[rows] for layer in tried_states)
        attentions = tried.attentions and tuple(layer[rows] for layer in tried.attentions)
        context = torch.cat((context, states[-1]), dim=1)
    sequences.check()


def best(context: Tensor, tried: Tensor, likely: Tensor, alpha: float) -> Tensor:
    """Which of the k tokens of each sequence to take, (B,).

    ``context`` (B, S, C): hidden states so far; ``tried`` (B * k, 1, C): those the tokens make;
    ``likely`` (B, k): their probabilities.
    """
    direction = context / context.norm(dim=2, keepdim=True)
    tried_direction = tried / tried.norm(dim=2, keepdim=True)
    cosines = direction.repeat_interleave(likely.shape[1], dim=0) @ tried_direction.transpose(1, 2)  # (B * k, S, 1)
    likeness = cosines.squeeze(2).amax(dim=1).view_as(likely)
    return ((1.0 - alpha) * likely - alpha * likeness).argmax(dim=1)
