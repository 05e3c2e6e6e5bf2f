"""A character 5-gram with interpolated modified Kneser-Ney smoothing: the baseline of train_tiny.py.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 3.
A true probability distribution over all Unicode characters, also over those not in the training text.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import NamedTuple

BLOCK = 256  # code points; a script fills few blocks, so the block says how likely an unseen character is
BLOCKS = 0x110000 // BLOCK - 0x800 // BLOCK  # all of Unicode but the surrogates, which no text contains

Followers = dict[str, dict[str, int]]  # context -> next character -> count


class Order(NamedTuple):
    """Statistics of the contexts of one length."""

    followers: Followers
    discounts: tuple[float, float, float, float]  # for counts of 0, 1, 2, and 3 or more
    sums: dict[str, tuple[int, float]]  # context -> sum of its counts, sum of their discounts


class CharNgram:
    """``prob(character, context)`` uses the last ``order - 1`` characters of the context.

    Each order subtracts a discount from its counts and gives that probability mass to the next lower order.
    Below the unigram is ``base``, which depends only on the Unicode block of the character.
    """

    def __init__(self, text: str, order: int = 5) -> None:
        if not text:
            raise ValueError("an n-gram model needs a text that is not empty")
        self.order = order
        self.orders = [_order(_count(text, n, highest=n == order)) for n in range(1, order + 1)]
        self.blocks = Counter(ord(character) // BLOCK for character in set(text))
        self.characters = sum(self.blocks.values())

    def base(self, character: str) -> float:
        """Probability without counts of n-grams: 0.5 is added to the number of characters seen in each block."""
        share = (self.blocks[ord(character) // BLOCK] + 0.5) / (self.characters + 0.5 * BLOCKS)
        return share / BLOCK

    def prob(self, character: str, context: str) -> float:
        """P(character | context), interpolated from the lowest order to the highest."""
        p = self.base(character)
        for n, (followers, discounts, sums) in enumerate(self.orders):
            known = context[len(context) - n :]
            if n > len(context) or known not in sums:
                break  # longer contexts were not seen either
            total, freed = sums[known]
            count = followers[known].get(character, 0)
            p = (count - discounts[min(count, 3)] + freed * p) / total
        return p

    def bits(self, text: str, before: str = "") -> float:
        """Bits needed to encode ``text`` after ``before``."""
        whole, reach = before + text, self.order - 1
        positions = range(len(before), len(whole))
        return sum(-math.log2(self.prob(whole[i], whole[max(0, i - reach) : i])) for i in positions)


def _order(followers: Followers) -> Order:
    discounts = _discounts(followers)
    sums = {
        context: (sum(counts.values()), sum(discounts[min(count, 3)] for count in counts.values()))
        for context, counts in followers.items()
    }
    return Order(followers, discounts, sums)


def _count(text: str, n: int, highest: bool) -> Followers:
    """Counts of n-grams; below the highest order, Kneser-Ney counts the different characters before an n-gram.

    "aab aab": the bigram "ab" occurs twice, but its Kneser-Ney count is 1, because only "a" precedes it.
    """
    followers: Followers = defaultdict(dict)
    if highest:
        grams = Counter(text[i : i + n] for i in range(len(text) - n + 1))
    else:
        grams = Counter(gram[1:] for gram in {text[i : i + n + 1] for i in range(len(text) - n)})
        grams.setdefault(text[:n], 1)  # nothing comes before the first one
    for gram, count in grams.items():
        followers[gram[:-1]][gram[-1]] = count
    return dict(followers)


def _discounts(followers: Followers) -> tuple[float, float, float, float]:
    """Discounts for counts of 0, 1, 2 and 3 or more: Chen and Goodman's estimate, clamped."""
    sizes = Counter(count for counts in followers.values() for count in counts.values())
    n1, n2, n3, n4 = (sizes[size] for size in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 else 0.5
    estimates = (1 - 2 * y * n2 / n1 if n1 else y, 2 - 3 * y * n3 / n2 if n2 else y, 3 - 4 * y * n4 / n3 if n3 else y)
    one, two, three = (min(max(d, 0.05), size - 0.05) for size, d in enumerate(estimates, start=1))
    return 0.0, one, two, three
