"""The tokenizer: text to ids, batches, conversations, ids to text. Argument names are HF's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

from openllama.errors import TokenizerError
from openllama.tokenizer import files
from openllama.tokenizer.batches import (
    HIGHEST_LENGTH,
    NO_MAX_LENGTH,
    NOT_PADDED,
    Encoding,
    as_batch,
    joined,
    kept,
    padded,
    room_for_text,
    special_mask,
    to_tensors,
    token_types,
)
from openllama.tokenizer.checks import checked_ids, checked_text, checked_texts, one_of, refuse
from openllama.tokenizer.template import ChatTemplate, render, render_open
from openllama.tokenizer.tokens import Splitter
from openllama.tokenizer.vocabulary import LIST_ROLE, AddedToken, Token, token_of_model

CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # stripped, in this order


class OpenLlamaTokenizer(Splitter):
    """Tokenizer over the sentencepiece model ``vocab_file``.

    If ``unk_token``, ``bos_token`` or ``eos_token`` is "", it is taken from the model file. With ``legacy``
    (HF's default) sentencepiece adds a space to the text after each special token.
    ``special_tokens_map`` and ``added_tokens`` are the contents of the files with these names; the map
    overrides the arguments. A plain string in it strips the whitespace around that token in the text, like
    every ordinary added token; an ``AddedToken`` (in JSON: an object) follows its flags.
    """

    is_fast = False  # HF's word for tokenizers in Rust; collators and trainers ask
    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        vocab_file: str | PathLike[str],
        unk_token: Token | None = "",
        bos_token: Token | None = "",
        eos_token: Token | None = "",
        pad_token: Token | None = None,
        sp_model_kwargs: Mapping[str, Any] | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        legacy: bool = True,
        *,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_max_length: int | None = None,
        special_tokens_map: Mapping[str, Any] | None = None,
        added_tokens: Mapping[str, int] | None = None,
        extra: Mapping[str, Any] | None = None,  # keys of tokenizer_config.json that are kept but not used
        **roles: Any,  # sep_token, cls_token, mask_token, additional_special_tokens
    ) -> None:
        self.sp_model_kwargs = files.checked_options(sp_model_kwargs)
        sp, self._model_bytes = files.load_model(Path(vocab_file), self.sp_model_kwargs)
        self.add_bos_token, self.add_eos_token = bool(add_bos_token), bool(add_eos_token)
        self.clean_up_tokenization_spaces, self.legacy = bool(clean_up_tokenization_spaces), bool(legacy)
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self.model_max_length = NO_MAX_LENGTH if model_max_length is None else model_max_length
        self.extra = dict(extra or {})
        named = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        for role, token in named.items():
            token = token_of_model(sp, role) if token == "" else token
            named[role] = AddedToken(token) if isinstance(token, str) else token
        super().__init__(sp, {**named, **roles, **(special_tokens_map or {})}, added_tokens or {})

    @property
    def padding_side(self) -> str:
        """Where padding goes: "left", as ``generate`` needs it, or "right"."""
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self._padding_side = one_of("padding_side", side, ("left", "right"))

    @property
    def truncation_side(self) -> str:
        """Where a text is cut: "left" or "right"."""
        return self._truncation_side

    @truncation_side.setter
    def truncation_side(self, side: str) -> None:
        self._truncation_side = one_of("truncation_side", side, ("left", "right"))

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **overrides: Any) -> OpenLlamaTokenizer:
        """Load from a folder with ``tokenizer.model`` and, optionally, HF's three JSON files.

        ``overrides`` are arguments of the constructor; they override the files. ``folder`` can also be the
        path of a ``.model`` file; then no JSON file is read.
        """
        path = Path(folder).expanduser()
        if path.is_file():
            return cls(path, **overrides)
        arguments = files.read_folder(path)
        for role in overrides:
            arguments["special_tokens_map"].pop(role, None)
        try:
            return cls(path / files.MODEL_FILE, **{**arguments, **overrides})
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the files that ``from_pretrained`` reads, here and in HF; creates the folder if needed."""
        special = {role: token for role, token in self._special.items() if token}
        main_roles = ("bos_token", "eos_token", "unk_token", "pad_token")
        config = {
            **self.extra,
            **{name: getattr(self, name) for name in files.SETTINGS},
            **{role: str(special[role]) if role in special else None for role in main_roles},
            "tokenizer_class": "LlamaTokenizer",
        }
        files.write_folder(Path(folder), self._model_bytes, config, special, self._added)

    def __repr__(self) -> str:
        roles = [f"{role}={getattr(self, f'{role}_token')!r}" for role in ("bos", "eos", "unk", "pad")]
        names = ("add_bos_token", "add_eos_token", "padding_side", "truncation_side")
        limit = "none" if self.model_max_length > HIGHEST_LENGTH else self.model_max_length
        settings = [*(f"{name}={getattr(self, name)!r}" for name in names), f"model_max_length={limit}"]
        return f"OpenLlamaTokenizer({len(self)} tokens, {', '.join([*roles, *settings])})"

    # ------------------------------------------------------------------ text to ids

    def encode(self, text: str, text_pair: str | None = None, **options: Any) -> Any:
        """``input_ids`` of one string, or of a pair; options as in ``__call__``."""
        return self(checked_text(text), text_pair, **options)["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        split_special_tokens: bool = False,
        **not_taken: Any,
    ) -> Encoding:
        """Encode a string or a list of strings; returns ``input_ids`` and ``attention_mask``.

        text_pair: a second string for each: bos a eos bos b eos. padding: True or "longest", "max_length", or False.
        truncation: True or "longest_first", "only_first", "only_second", False, or None, which truncates if
        ``max_length`` is given without padding. max_length: number of tokens with special tokens; ``model_max_length``
        by default. pad_to_multiple_of: rounds the padded length up. return_tensors: None for lists, "pt" for int64
        (B, T), B = 1 for a str, "np" for the same as arrays. split_special_tokens: for untrusted text; ``</s>`` in it
        is encoded as ordinary characters.

        On demand, ``token_type_ids``: 0 in the first text, 1 in the second; ``special_tokens_mask``: 1 for what is
        added to the text; ``offset_mapping``: the (start, end) of each token's characters in its text, the whole
        character for each of its byte tokens, and (0, 0) for what is added:

            tokenizer("To be龘", return_offsets_mapping=True).offset_mapping  # of To, ▁be, the bytes of 龘, and eos
            # [(0, 2), (2, 5), (5, 6), (5, 6), (5, 6), (0, 0)]
        """
        refuse(not_taken)
        columns = checked_texts(text, text_pair)
        bos, eos = self._bos_and_eos() if add_special_tokens else ([], [])
        limits = (self.model_max_length, padding, pad_to_multiple_of, len(bos + eos) * len(columns))
        room = room_for_text(truncation, max_length, *limits)
        batch: dict[str, list[Any]] = defaultdict(list)
        for row in zip(*columns, strict=True):
            if return_offsets_mapping:
                ids, places = zip(*(self._ids_and_spans(one, split_special_tokens) for one in row), strict=True)
            else:
                ids, places = tuple(self._ids(one, split_special_tokens) for one in row), ()
            counts = kept([*map(len, ids)], room, truncation)
            batch["input_ids"].append(joined(ids, counts, self.truncation_side, bos, eos))
            if return_offsets_mapping:
                nowhere = [(0, 0)] * len(bos), [(0, 0)] * len(eos)
                batch["offset_mapping"].append(joined(places, counts, self.truncation_side, *nowhere))
            if return_token_type_ids:
                batch["token_type_ids"].append(token_types(counts, len(bos + eos)))
            if return_special_tokens_mask:
                batch["special_tokens_mask"].append(special_mask(counts, len(bos), len(eos)))
        if isinstance(text, str) and not batch["input_ids"][0]:
            padding = False  # HF pads an empty string in a batch, but not alone
        is_single = isinstance(text, str) and return_tensors is None
        rest = (padding, max_length, pad_to_multiple_of, return_attention_mask, return_tensors)
        return self._padded(batch, is_single, *rest)

    def encode_plus(self, text: str, text_pair: str | None = None, **options: Any) -> Encoding:
        """HF's older name of ``__call__`` with a string."""
        return self(text, text_pair, **options)

    def batch_encode_plus(self, texts: Sequence[str], **options: Any) -> Encoding:
        """HF's older name of ``__call__`` with a list."""
        return self(texts, **options)

    def _bos_and_eos(self) -> tuple[list[int], list[int]]:
        """Ids that add_special_tokens adds before and after a string; a list is empty if its setting is off."""
        for role, on in {"bos_token": self.add_bos_token, "eos_token": self.add_eos_token}.items():
            if on and self._special[role] is None:
                raise TokenizerError(f"add_{role} is on, but the tokenizer has no {role}")
        return [self.bos_token_id] if self.add_bos_token else [], [self.eos_token_id] if self.add_eos_token else []

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Number of ids that are added to a string, or to a pair."""
        return sum(map(len, self._bos_and_eos())) * (2 if pair else 1)

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Ids with bos and eos, as the settings say: bos a eos, of a pair bos a eos bos b eos."""
        bos, eos = self._bos_and_eos()
        second = [] if token_ids_1 is None else [*bos, *token_ids_1, *eos]
        return [*bos, *token_ids_0, *eos, *second]

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each special token: of those that would be added to these ids, or of those that are among them."""
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise TokenizerError("ids that already have special tokens are one sequence; give no token_ids_1")
            special = set(self.all_special_ids)
            return [int(number in special) for number in checked_ids(token_ids_0)]
        bos, eos = self._bos_and_eos()
        lengths = [len(token_ids_0), *([] if token_ids_1 is None else [len(token_ids_1)])]
        return special_mask(lengths, len(bos), len(eos))

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        **not_taken: Any,
    ) -> Encoding:
        """Pad a batch, a list of single encodings or one of them; arguments as in ``__call__``.

        Keys that the tokenizer does not make are kept unchanged.

            tokenizer.pad([{"input_ids": [5, 2], "label": 0}, {"input_ids": [5, 6, 2], "label": 1}])
            # {'input_ids': [[5, 2, 3], [5, 6, 2]], 'label': [0, 1], 'attention_mask': [[1, 1, 0], [1, 1, 1]]}
        """
        refuse(not_taken)
        batch, is_single = as_batch(encoded_inputs)
        rest = (padding, max_length, pad_to_multiple_of, return_attention_mask, return_tensors)
        return self._padded(batch, is_single, *rest)

    def _padded(
        self,
        batch: dict[str, list[Any]],
        is_single: bool,
        padding: bool | str,
        max_length: int | None,
        pad_to_multiple_of: int | None,
        return_attention_mask: bool | None,
        return_tensors: str | None,
    ) -> Encoding:
        one_of("return_tensors", return_tensors, (None, "pt", "np"))
        if return_attention_mask in (None, True):
            batch.setdefault("attention_mask", [[1] * len(row) for row in batch["input_ids"]])
        pad_id = None if padding in NOT_PADDED else self.pad_token_id
        limit = max_length or self.model_max_length
        filled = padded(batch, padding, limit, pad_to_multiple_of, pad_id, self.padding_side)
        if is_single:
            filled.update({name: values[0] for name, values in filled.items()})
        return to_tensors(filled, return_tensors) if return_tensors else filled

    # ------------------------------------------------------------------ conversations

    @property
    def chat_template(self) -> str:
        """The format of conversations in Jinja: the folder's own, or that of V1 and V2."""
        return self.extra.get("chat_template") or ChatTemplate().jinja()

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.extra["chat_template"] = template

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        *,
        continue_final_message: bool = False,
        return_dict: bool = False,
        **options: Any,
    ) -> Any:
        """A conversation as the model was trained on it, or a list of them: ids, or a string without ``tokenize``.

        add_generation_prompt: ends with the beginning of an answer. continue_final_message: ends with the text of the
        last message, without what closes its turn. return_dict: an ``Encoding``. ``options`` are those of
        ``__call__``, such as ``return_tensors="pt"``. The template writes the special tokens; none are added, and one
        that is spelt in a message is one.

            chat = [{"role": "user", "content": "Hello"}]
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            # 'user:Hello\\nsystem:'
        """
        if continue_final_message and add_generation_prompt:
            raise TokenizerError("continue_final_message and add_generation_prompt exclude each other; give one")
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        variables = {role: str(token) for role, token in self._special.items() if token and role != LIST_ROLE}
        texts = []
        for messages in conversation if several else [conversation]:
            rendered = render_open if continue_final_message else render
            template = chat_template or self.chat_template
            texts.append(rendered(template, messages, add_generation_prompt=add_generation_prompt, **variables))
        if not tokenize:
            if given := [name for name, value in options.items() if value]:
                raise TokenizerError(f"{', '.join(given)} shapes ids; leave it out, or tokenize=False")
            return texts if several else texts[0]
        encoding = self(texts if several else texts[0], **{"add_special_tokens": False, **options})
        return encoding if return_dict else encoding["input_ids"]

    # ------------------------------------------------------------------ ids to text

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """Text of an id, or of a sequence or 1-D tensor of ids.

        ``clean_up_tokenization_spaces`` (None: the tokenizer's setting) removes spaces before English punctuation.
        Added tokens get spaces around them: To ▁be <|user|> or -> "To be <|user|> or".
        """
        tokens = self.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids, skip_special_tokens)
        parts: list[str] = []
        for added, group in groupby(tokens, self._added.__contains__):
            run = [*group]
            parts += run if added else [self.convert_tokens_to_string(run)]
        text = " ".join(parts)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        for spaced in CLEANED_UP if clean_up_tokenization_spaces else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def batch_decode(self, sequences: Iterable[Any], **options: Any) -> list[str]:
        """``decode`` of each sequence, or of each row of a (B, T) tensor."""
        return [self.decode(ids, **options) for ids in sequences]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of tokens. As in HF, ordinary text before a special token gets a space in front.

        To ▁be </s> or -> " To be</s>or"
        """
        text = ""
        special_tokens = set(self.all_special_tokens)
        groups = [(special, [*group]) for special, group in groupby(tokens, special_tokens.__contains__)]
        for i, (special, group) in enumerate(groups):
            before_special = not special and i + 1 < len(groups)
            text += " " * before_special + ("".join(group) if special else self.sp.decode(group))
        return text
