"""From logits to tokens. Reading order: ``config``, ``processors``, ``loop``."""

from openllama.generation.config import GenerationConfig
from openllama.generation.loop import generate, prepare, stream
from openllama.generation.processors import LogitsProcessor

__all__ = ["GenerationConfig", "LogitsProcessor", "generate", "prepare", "stream"]
