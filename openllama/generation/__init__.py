"""From logits to tokens. Read ``loop`` first: it goes from the call to the token. All modules:

config                            the settings, each with its rule
processors, sampling, stopping    the small functions that the settings stand for
outputs, state                    what is handed back; what is asked for, and the sequences being made
checks                            a call of ``generate``, checked once
loop                              ``generate``, ``stream``, greedy search and sampling
beam, contrastive, assisted       the rarer strategies, each on its own
arguments                         the names and types of all arguments, for type checkers
scoring                           log-probabilities of given sequences
embedding                         vectors of given sequences
text                              strings in and out, for those who have a tokenizer
"""

from openllama.generation.checks import prepare
from openllama.generation.config import GenerationConfig
from openllama.generation.embedding import embed_sequences
from openllama.generation.loop import generate, stream
from openllama.generation.outputs import GenerateOutput
from openllama.generation.processors import LogitsProcessor
from openllama.generation.scoring import ContinuationScore, Score, score, score_continuations
from openllama.generation.stopping import StoppingCriterion

__all__ = [
    "ContinuationScore",
    "GenerateOutput",
    "GenerationConfig",
    "LogitsProcessor",
    "Score",
    "StoppingCriterion",
    "embed_sequences",
    "generate",
    "prepare",
    "score",
    "score_continuations",
    "stream",
]
