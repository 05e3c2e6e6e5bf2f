"""From logits to tokens. Reading order, which is also the order of imports:

config, warpers, processors, stopping  the settings and the small functions they stand for
outputs, request                       what is handed back; a call, checked and settled
loop                                   greedy search and sampling: the file to read first
beam, contrastive, assisted            the rarer families, each on its own
entry                                  ``generate`` and ``stream``
score                                  log-probabilities of given texts
text                                   strings in and out, for those who have a tokenizer
"""

from openllama.generation.config import GenerationConfig
from openllama.generation.entry import generate, stream
from openllama.generation.outputs import GenerateOutput
from openllama.generation.request import prepare
from openllama.generation.score import Score, score
from openllama.generation.stopping import StoppingCriterion
from openllama.generation.warpers import LogitsProcessor

__all__ = [
    "GenerateOutput",
    "GenerationConfig",
    "LogitsProcessor",
    "Score",
    "StoppingCriterion",
    "generate",
    "prepare",
    "score",
    "stream",
]
