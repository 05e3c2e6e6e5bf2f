"""Tokens and their ids. The shipped model's tokenizer after ``add_tokens("<|user|>")``:

    id      0      1    2     3      4 ... 4599    4600
    token   <unk>  <s>  </s>  <pad>  <0x00> ... 齧  <|user|>
    role    unk    bos  eos   pad

The pieces come first, then the added tokens. Either can have a role, which makes it a special token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from openllama.errors import TokenizerError
from openllama.tokenizer.checks import checked_ids, checked_text

LIST_ROLE = "additional_special_tokens"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
         LIST_ROLE)  # fmt: skip
MAX_ADDED, MAX_TOKEN = 50_000, 1000  # tokens, characters of one: matching them takes time and memory
USUAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is never split; ``lstrip`` and ``rstrip`` remove the whitespace on its left and right."""

    content: str
    single_word: bool = False  # no effect, like `normalized`: both are only stored in the files
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True

    def __str__(self) -> str:
        return self.content


Token: TypeAlias = str | AddedToken  # a str strips the whitespace on both sides


def parse_token(value: Any, role: str) -> Token:
    """Check a token from a file or a caller: a str, an AddedToken or the JSON object of one."""
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        known = {field.name for field in dataclasses.fields(AddedToken)}
        value = AddedToken(**{key: flag for key, flag in value.items() if key in known})
    if not isinstance(value, (str, AddedToken)) or not str(value):
        raise TokenizerError(f"{role} must be a non-empty string or an AddedToken, got {value!r}")
    if len(str(value)) > MAX_TOKEN:
        raise TokenizerError(f"{role} has {len(str(value)):,} characters; at most {MAX_TOKEN:,} are one token")
    checked_text(str(value), f"{role}: ")
    return value


def parse_role(role: str, value: Any) -> Any:
    """Check the value of a role: a token or None; a list of tokens for additional_special_tokens."""
    if role not in ROLES:
        raise TokenizerError(f"{role} is neither an argument of the tokenizer nor one of {', '.join(ROLES)}")
    if role != LIST_ROLE:
        return None if value is None else parse_token(value, role)
    if not isinstance(value, (list, tuple, type(None))):
        raise TokenizerError(f"{role} must be a list of tokens, got {value!r}")
    return [parse_token(token, role) for token in value or ()]


def token_of_model(sp: Any, role: str) -> str | None:
    """The token of a role in the sentencepiece file; if the file has none, LLaMA's usual token."""
    number = getattr(sp, role.replace("token", "id"))()  # sp.bos_id() for bos_token; -1 for none
    return sp.id_to_piece(number) if number >= 0 else USUAL_TOKENS.get(role)


def role_properties(role: str) -> tuple[property, property]:
    """Make the properties of a role, e.g. ``eos_token`` (str or None) and ``eos_token_id`` (int or None)."""

    def token(self: Vocabulary) -> str | None:
        value = self._special[role]
        if value is None and role == "pad_token":
            value = token_of_model(self.sp, role)  # it pads, but in text it is not special, as in HF
        return None if value is None else str(value)

    def set_token(self: Vocabulary, value: Any) -> None:
        parsed = parse_role(role, value)
        if parsed is not None and not self._knows(str(parsed)):
            raise TokenizerError(f"{role} {str(parsed)!r} is not in the vocabulary; use add_special_tokens")
        self._special[role] = parsed

    def token_id(self: Vocabulary) -> int | None:
        name = token(self)
        return None if name is None else self._token_to_id(name)

    def set_token_id(self: Vocabulary, number: Any) -> None:
        set_token(self, None if number is None else self.convert_ids_to_tokens(number))

    return property(token, set_token), property(token_id, set_token_id)


class Vocabulary:
    """The pieces of ``sp``, the tokens added to them, and the tokens that have a role.

    ``special`` maps roles (some of ROLES) to tokens, ``added`` maps the tokens of added_tokens.json to ids.
    """

    bos_token, bos_token_id = role_properties("bos_token")
    eos_token, eos_token_id = role_properties("eos_token")
    unk_token, unk_token_id = role_properties("unk_token")
    pad_token, pad_token_id = role_properties("pad_token")
    sep_token, sep_token_id = role_properties("sep_token")
    cls_token, cls_token_id = role_properties("cls_token")
    mask_token, mask_token_id = role_properties("mask_token")
    _pad_token = pad_token  # HF's collators look here whether there is one

    def __init__(self, sp: Any, special: Mapping[str, Any], added: Mapping[str, int]) -> None:
        self.sp = sp
        self._special = {role: parse_role(role, token) for role, token in {**dict.fromkeys(ROLES), **special}.items()}
        self._added: dict[str, int] = {}
        self._no_split: set[str] = set()  # tokens that _no_split_pattern cuts out before sentencepiece runs
        self._restore_added(added)
        self.add_tokens(self._special_tokens(), special_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of pieces in the sentencepiece model, without added tokens."""
        return self.sp.get_piece_size()

    def __len__(self) -> int:
        return self.vocab_size + len(self._added)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return {**{self.sp.id_to_piece(i): i for i in range(self.vocab_size)}, **self._added}

    # ------------------------------------------------------------------ token and id

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Id of a token (int) or of several (list); a token outside the vocabulary gets the id of ``<unk>``."""
        if isinstance(tokens, str):
            return self._token_to_id(checked_text(tokens))
        return [self._token_to_id(checked_text(token)) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id (str), or tokens of a sequence or 1-D tensor of ids (list)."""
        if isinstance(ids, int):
            return self._id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._id_to_token(n, f" at position {i}") for i, n in enumerate(checked_ids(ids)) if n not in skipped]

    def _token_to_id(self, token: str) -> int:
        return self._added[token] if token in self._added else self.sp.piece_to_id(token)

    def _id_to_token(self, number: int, where: str = "") -> str:
        if not 0 <= number < len(self):
            raise TokenizerError(f"token id {number}{where} is outside the vocabulary of {len(self)} tokens")
        if number >= self.vocab_size:
            return self._added_names[number - self.vocab_size]
        return self.sp.id_to_piece(number)

    def _knows(self, token: str) -> bool:
        unknown = self.sp.unk_id()  # the id of "<unk>", of a token in its place and of every str that is no piece
        named = token in (self.unk_token, self.sp.id_to_piece(unknown))
        return named or token in self._added or self.sp.piece_to_id(token) != unknown

    # ------------------------------------------------------------------ special tokens

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that have a role, each once."""
        return list(dict.fromkeys(map(str, self._special_tokens())))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of ``all_special_tokens``; ``skip_special_tokens`` skips them."""
        return [self._token_to_id(token) for token in self.all_special_tokens]

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """Roles with their tokens, e.g. ``{"eos_token": "</s>", "additional_special_tokens": ["<|user|>"]}``."""
        given = {role: token for role, token in self._special.items() if token}
        return {role: [*map(str, token)] if role == LIST_ROLE else str(token) for role, token in given.items()}

    def _special_tokens(self, roles: Iterable[str] = ROLES) -> list[Token]:
        values = [self._special[role] for role in roles]
        return [token for entry in values if entry for token in (entry if isinstance(entry, list) else [entry])]

    # ------------------------------------------------------------------ new tokens

    def add_tokens(self, tokens: Token | Sequence[Token], special_tokens: bool = False) -> int:
        """Give each new token the next free id; returns the number of new tokens.

        New tokens are never split; with ``special_tokens``, tokens already in the vocabulary are not split either.
        The model's embedding then needs ``len(tokenizer)`` rows.
        """
        tokens = [tokens] if isinstance(tokens, (str, AddedToken)) else tokens
        names = [str(parse_token(token, "an added token")) for token in tokens]
        if len(names) + len(self._no_split) > MAX_ADDED:
            raise TokenizerError(f"{len(names):,} tokens to add; a tokenizer takes {MAX_ADDED:,}")
        new = [name for name in dict.fromkeys(names) if not self._knows(name)]
        self._added.update({name: len(self) + i for i, name in enumerate(new)})
        self._added_names = list(self._added)  # in the order of their ids
        self._no_split.update(names if special_tokens else new)
        longest_first = sorted(self._no_split, key=len, reverse=True)  # "<a" must not match in "<ab>"
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) matches nothing
        self._no_split_pattern = re.compile(f"({pattern})")
        return len(new)

    def add_special_tokens(self, tokens: Mapping[str, Any], replace_additional_special_tokens: bool = True) -> int:
        """Give tokens their roles, e.g. ``{"pad_token": "<pad>"}``; returns the number of new tokens."""
        parsed = {role: parse_role(role, token) for role, token in tokens.items()}
        if LIST_ROLE in parsed and not replace_additional_special_tokens:
            parsed[LIST_ROLE] = list(dict.fromkeys(self._special[LIST_ROLE] + parsed[LIST_ROLE]))
        self._special.update(parsed)
        return self.add_tokens(self._special_tokens(parsed), special_tokens=True)

    def _restore_added(self, added: Mapping[str, int]) -> None:
        """Add the tokens of added_tokens.json; raises ``TokenizerError`` if a token would get another id."""
        if wrong := [token for token, number in added.items() if type(number) is not int]:
            raise TokenizerError(f"added token {wrong[0]!r} has the id {added[wrong[0]]!r}, which is not an integer")
        new: list[str] = []
        for token, number in sorted(added.items(), key=lambda item: item[1]):
            known = self._knows(token)
            here = self._token_to_id(token) if known else len(self) + len(new)
            if number != here:
                would = "is" if known else "would be"
                raise TokenizerError(
                    f"added_tokens.json gives {token!r} the id {number}; in this vocabulary it {would} {here}"
                )
            if not known:
                new.append(token)
        self.add_tokens(new)
