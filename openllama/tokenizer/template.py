"""The format of a conversation: turns as the model was trained on them, and templates in Jinja, the language that
current transformers and others read. The plain template of V1 and V2 is the source of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openllama.errors import InputError, TokenizerError

if TYPE_CHECKING:
    from jinja2 import Template

OPEN_END = "\ue000"  # marks the end of a message while it is rendered; no text has this character
DEFAULT_TEMPLATE = "user:{prompt}\nsystem:{answer}</s>"


class ChatTemplate:
    """The format of a turn: a string that contains ``{prompt}`` and then ``{answer}``, each once."""

    def __init__(self, text: str = DEFAULT_TEMPLATE) -> None:
        before, found_prompt, rest = text.partition("{prompt}")
        between, found_answer, self.end = rest.partition("{answer}")
        if not (found_prompt and found_answer) or "{answer}" in before or "{" in between + self.end:
            raise InputError(f"a chat template must contain {{prompt}} and then {{answer}}, each once; got {text!r}")
        self._around_prompt = before, between

    @classmethod
    def from_file(cls, path: Path) -> ChatTemplate:
        """Read the template from a text file, without the newline at its end."""
        return cls(path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n"))

    def question(self, prompt: str) -> str:
        """The turn up to the start of its answer."""
        return prompt.join(self._around_prompt)

    def jinja(self) -> str:
        """The same format in Jinja, for a list of messages of users and assistants; the last line is the answer's."""
        before, between = self._around_prompt
        line, newline, speaker = between.rpartition("\n")
        return (
            "{% for message in messages %}"
            f"{{% if message['role'] == 'user' %}}{{{{ {before!r} + message['content'] + {line + newline!r} }}}}"
            f"{{% elif message['role'] == 'assistant' %}}{{{{ {speaker!r} + message['content'] + {self.end!r} }}}}"
            "{% else %}{{ raise_exception('the roles of this format are user and assistant') }}{% endif %}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {speaker!r} }}}}{{% endif %}}"
        )


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The conversation as one string; raises ``TokenizerError`` for what the Jinja ``template`` does not take.

    [{"role": "user", "content": "Hello"}] in V1's format -> "user:Hello\\n", and with ``add_generation_prompt=True``
    "user:Hello\\nsystem:".
    """
    if not isinstance(template, str):
        raise TokenizerError("this tokenizer has several chat templates; name one: chat_template=...")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise TokenizerError(f"message {i} must be a dict with role and content, got {message!r}")
        if not isinstance(message["content"], str):
            raise TokenizerError(f"message {i}: content must be a str, got {type(message['content']).__name__}")
    import jinja2  # torch needs it, too; importing it takes a tenth of a second

    try:
        return compiled(template).render(messages=messages, **variables)
    except jinja2.TemplateError as error:
        raise TokenizerError(f"the chat template: {error}") from error


def render_open(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The conversation up to the end of its last message, without what closes the turn."""
    if not messages:
        raise TokenizerError("continue_final_message needs a message")
    *others, last = messages
    text = render(template, [*others, {**last, "content": f"{last['content']}{OPEN_END}"}], **variables)
    if OPEN_END not in text:
        raise TokenizerError("continue_final_message: the chat template does not show the last message as it is")
    return text.partition(OPEN_END)[0].rstrip()


@lru_cache
def compiled(template: str) -> Template:
    """A template comes with a checkpoint: it runs in a sandbox, without the attributes that lead out of it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TokenizerError(f"the chat template: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)
