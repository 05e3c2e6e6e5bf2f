"""Messages: short, on one line, and without anything that controls a terminal."""

from __future__ import annotations

import pytest

from openllama.errors import MAX_MESSAGE, CheckpointNotFoundError, ConfigError, OpenLlamaError, listed, warn


def test_a_list_shows_ten_entries_and_the_number_of_the_others() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert listed([str(i) for i in range(10**6)], "; ").endswith("; 9 and 999,990 more")


@pytest.mark.parametrize("kind", [OpenLlamaError, ConfigError, CheckpointNotFoundError])
def test_control_characters_are_escaped(kind: type[OpenLlamaError]) -> None:
    assert str(kind("a\x1b[2J\nb\x07 床\u202e\ud800 ok")) == r"a\x1b[2J\nb\x07 床\u202e\ud800 ok"
    with pytest.warns(UserWarning, match=r"^a\\x1b\\n$"):
        warn("a\x1b\n")


def test_long_messages_are_cut() -> None:
    assert str(ConfigError("x" * 10**6)) == "x" * MAX_MESSAGE + "... (1,000,000 characters)"
