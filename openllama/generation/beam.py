"""Beam search: follow the most likely sequences instead of the most likely token.

Each prompt has ``num_beams`` rows, its beams. A step scores every continuation of every beam by the sum
of its log-probabilities, and the best become the new beams. A continuation that ends with eos leaves
the race and is kept, scored by sum / length ** length_penalty. Two beams, three tokens, the last is eos:

    beam a (-1.0) + log-probabilities -0.2 -3.0 -0.9  ->  -1.2 -4.0 -1.9
    beam b (-1.5) + log-probabilities -2.0 -0.1 -4.0  ->  -3.5 -1.6 -5.5

The new beams are a0 (-1.2) and b1 (-1.6); had a2 come before one of them, it would be kept as finished.

Beam sampling draws the candidates instead of taking the best. Diverse beam search (Vijayakumar et al.
2018) splits the beams into groups that move one after the other; a token costs ``diversity_penalty``
for each beam of an earlier group that has just taken it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openllama.generation.config import GenerationConfig
from openllama.generation.outputs import GenerateOutput, Record, Step
from openllama.generation.processors import LogitsProcessor, apply
from openllama.generation.sampling import draw
from openllama.generation.state import Request, Sequences, no_numbers
from openllama.generation.stopping import stopped

DEAD = -1e9  # the score of a beam that is not to be continued


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A finished sequence."""

    score: float
    ids: Tensor  # (length,), without eos
    rows: Tensor  # the beam that each new token came from


@dataclass
class Group:
    """The beams of one prompt that compete with each other, and the best sequences they have finished."""

    rows: list[int]  # of all beams of the batch
    config: GenerationConfig
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False

    def add(self, total: float, ids: Tensor, rows: Tensor) -> None:
        """Keep a finished sequence whose log-probabilities sum to ``total``, if it is among the best."""
        score = total / len(ids) ** self.config.length_penalty
        if len(self.finished) < len(self.rows):
            self.finished.append(Hypothesis(score, ids, rows))
            return
        worst = min(self.finished, key=lambda hypothesis: hypothesis.score)
        if score > worst.score:
            self.finished.remove(worst)
            self.finished.append(Hypothesis(score, ids, rows))

    def cannot_improve(self, best: float, length: int) -> bool:
        """Whether no sequence that goes on from a sum of ``best`` at ``length`` can enter the finished ones.

        ``early_stopping``: True stops anyway. False takes the score that ``best`` has now for the
        highest to come; "never" the score it would have at full length, if length makes scores higher.
        """
        config = self.config
        if len(self.finished) < len(self.rows):
            return False
        if config.early_stopping is True:
            return True
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = config.max_length
        return min(one.score for one in self.finished) >= best / length**config.length_penalty


class Diversity:
    """The processor of diverse beam search: tokens cost what earlier groups' beams have just taken.

    Penalty 0.5 and earlier tokens 7, 7, 4: token 7 loses 1.0 and token 4 loses 0.5.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty
        self.taken: list[Tensor] = []  # (B, beams of a group), of the groups that have moved

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.taken:
            return scores
        earlier = torch.cat(self.taken, dim=1)  # (B, beams that have moved)
        counts = scores.new_zeros(len(earlier), scores.shape[1])
        counts.scatter_add_(1, earlier, torch.ones_like(earlier, dtype=scores.dtype))
        return scores - (self.penalty * counts).repeat_interleave(len(scores) // len(earlier), dim=0)


class BeamSearch:
    """Beam search, beam sampling or diverse beam search; ``sequences`` holds each prompt ``num_beams`` times."""

    def __init__(self, sequences: Sequences, request: Request) -> None:
        config = request.config
        self.sequences, self.request, self.config = sequences, request, config
        rows = torch.arange(len(sequences.ids), device=sequences.ids.device)
        self.rows = rows.view(-1, config.num_beam_groups, config.num_beams // config.num_beam_groups)  # (B, groups, G)
        self.groups = [[Group(beams, config) for beams in groups] for groups in self.rows.tolist()]
        self.totals = torch.zeros(len(rows), device=rows.device)  # sums of log-probabilities
        if not config.do_sample:
            self.totals[self.rows[:, :, 1:].flatten()] = DEAD  # all beams are alike: one goes on
        self.history = rows.new_empty(len(rows), 0)  # the row that each new token of a beam came from
        self.diversity = Diversity(config.diversity_penalty or 0.0)
        self.processors: list[LogitsProcessor] = list(request.processors)
        if config.num_beam_groups > 1:  # in transformers' order, after the sequence bias
            self.processors.insert(1 if config.sequence_bias else 0, self.diversity)

    @torch.no_grad()
    def run(self) -> GenerateOutput:
        """Search to the end."""
        record = Record(self.config)
        while self.sequences.length < self.config.max_length:
            logits, output = self.sequences.forward()
            tokens, scores = self.step(logits[:, -1])
            record.add(Step(tokens, scores, logits[:, -1], output.attentions, output.hidden_states))
            if all(group.done for groups in self.groups for group in groups):
                break
            if self.request.stopping and bool(stopped(self.request.stopping, self.sequences.ids, scores).all()):
                break
        return self.output(record)

    def step(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Move every beam one token on; the tokens (rows,) and the processed scores (rows, V)."""
        log_probs = logits.log_softmax(dim=-1)
        scores, totals = torch.empty_like(log_probs), torch.empty_like(self.totals)
        tokens, parents = torch.empty_like(self.rows.flatten()), torch.empty_like(self.rows.flatten())
        self.diversity.taken.clear()
        for index in range(self.config.num_beam_groups):
            rows = self.rows[:, index].flatten()  # (B * G,)
            ids = self.sequences.ids[rows]
            processed = apply(self.processors, ids, log_probs[rows])
            scores[rows] = apply(self.request.filters, ids, processed)
            sums = apply(self.request.filters, ids, processed + self.totals[rows, None])
            best, flat = (part.tolist() for part in self.candidates(sums))  # all that is read for a token
            new = [self.advance(groups[index], *args) for groups, *args in zip(self.groups, best, flat, strict=True)]
            columns = zip(*(beam for beams in new for beam in beams), strict=True)
            totals[rows], tokens[rows], parents[rows] = (torch.tensor(column, device=rows.device) for column in columns)
            self.diversity.taken.append(tokens[self.rows[:, index]])
        self.totals = totals
        self.history = torch.cat((self.history[parents], parents[:, None]), dim=1)
        self.sequences.reorder(parents)
        self.sequences.append(tokens)
        return tokens, scores

    def candidates(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The best (or drawn) continuations of each prompt, best first: totals and beam * V + token, (B, n) each.

        Of sums (B * G, V) there are 2 * G, so that G go on when all others end, or more where there are
        several ways to end.
        """
        size = self.rows.shape[2]
        sums = sums.view(-1, size * sums.shape[1])
        if self.config.do_sample:
            drawn = draw(sums, 2 * size, self.request.generator)
            best, order = sums.gather(1, drawn).sort(descending=True)
            return best, drawn.gather(1, order)
        count = max(2, 1 + len(set(self.config.eos_token_ids))) * size
        return sums.topk(min(count, sums.shape[1]))

    def advance(self, group: Group, sums: list[float], flat: list[int]) -> list[tuple[float, int, int]]:
        """The new beams of a group as (total, token, row); candidates that end are kept as finished."""
        size, idle = len(group.rows), (self.config.padding_id, group.rows[0])
        if group.done:
            return [(0.0, *idle)] * size
        if not sums[0] < math.inf:  # the best, and NaN is above all
            prompt, made = group.rows[0] // self.config.num_beams, self.history.shape[1]
            raise no_numbers(f"{prompt}, new token {made + 1}")
        new: list[tuple[float, int, int]] = []
        for rank, (total, index) in enumerate(zip(sums, flat, strict=True)):
            beam, token = divmod(index, self.sequences.model.config.vocab_size)
            row = group.rows[beam]
            if token not in self.config.eos_token_ids:
                new.append((total, token, row))
            elif rank < size:
                came_from = torch.cat((self.history[row], self.history.new_tensor([row])))
                group.add(total, self.sequences.ids[row].clone(), came_from)
            if len(new) == size:
                break
        group.done = group.cannot_improve(sums[0], self.sequences.length + 1)
        return new + [(DEAD, *idle)] * (size - len(new))

    def output(self, record: Record) -> GenerateOutput:
        """The best sequences of each prompt, those that had no time to end among them."""
        best: list[Hypothesis] = []
        for groups in self.groups:
            for group in groups:
                for row in [] if group.done else group.rows:
                    group.add(float(self.totals[row]), self.sequences.ids[row], self.history[row])
            ranked = sorted((one for group in groups for one in group.finished), key=lambda one: one.score)
            best += ranked[::-1][: 1 if self.config.do_sample else self.config.num_return_sequences]
        sequences, beam_indices = self._aligned(best)
        output = GenerateOutput(sequences, **record.fields())
        if output.scores is not None:
            output.beam_indices = beam_indices
            output.sequences_scores = self.totals.new_tensor([one.score for one in best])
        return output

    def _aligned(self, best: list[Hypothesis]) -> tuple[Tensor, Tensor]:
        """Ids and beam indices as rectangles; a sequence with room for it ends with the first eos id."""
        config = self.config
        longest = max(len(one.ids) for one in best)
        width = min(longest + 1, config.max_length) if config.eos_token_ids else longest
        sequences = self.sequences.ids.new_full((len(best), width), config.padding_id)
        beam_indices = sequences.new_full(sequences.shape, -1)
        for row, one in enumerate(best):
            length = len(one.ids)
            sequences[row, :length] = one.ids
            beam_indices[row, : len(one.rows)] = one.rows
            if length < width and config.eos_token_ids:
                sequences[row, length] = config.eos_token_ids[0]
        return sequences, beam_indices
