"""Change real small checkpoints at random and do all that the package does with them.

    python -m tests.fuzz --minutes 60 [--seed N] [--count N]

First comes the whole corpus of ``tests.hostile``. Prints the seed; stops with exit code 1 at an exception that is not
the package's, more than 10 s, more than 1 GB, or a file that was written elsewhere. What is found becomes a case there.
"""

from __future__ import annotations

import argparse
import random
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.attacks import attack, attacks, good_folder
from tests.checkpoints import FORMS
from tests.hostile import corpus

DIGITS = b"0123456789-.eE"
PIECES = [b"null", b"true", b"[", b"]", b"{", b"}", b'"', b",", b":", b"NaN", b"1e999", b"\xff" * 8, b"\x00" * 8,
          b"\x7f" + b"\xff" * 7, b"PK\x03\x04", b"\x1b[2J"]  # fmt: skip


def mutate(path: Path, draw: random.Random) -> None:
    """Change one file in one to four places, most of them near its start or its end, where the descriptions are."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 4)):
        end = len(content)
        near = min(end, draw.choice([64, 2048, end]))
        where = draw.randint(0, near) if draw.random() < 0.5 else end - draw.randint(0, near)
        length = draw.choice([1, 1, 2, 4, 8, 64])
        kind = draw.randrange(7)
        if kind == 0:
            content[where : where + length] = draw.randbytes(length)
        elif kind == 1:
            content[where:where] = draw.choice(PIECES) * draw.choice([1, 1, 1, 100])
        elif kind == 2:
            del content[where : where + draw.choice([1, 8, end])]
        elif kind == 3:
            source = draw.randint(0, end)
            content[where : where + length] = content[source : source + length]
        elif kind == 4 and where < end:
            content[where] ^= 1 << draw.randrange(8)
        elif kind == 5:
            content[where : where + 8] = draw.choice([2**63, 2**31, 2**32 - 1, 0, end]).to_bytes(8, "little")
        elif numbers := [i for i, byte in enumerate(content[:65536]) if byte in DIGITS]:
            content[draw.choice(numbers)] = draw.choice(DIGITS)
    path.write_bytes(content)


def _legacy(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--count", type=int, default=sys.maxsize, help="at most so many checkpoints")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    print(f"seed {options.seed}", flush=True)
    refusals = count = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for case, _, wrong in attacks(corpus() if options.minutes > 5 else {}, root):
            if wrong:
                print(case, *wrong, sep="\n")
                return 1
        goods = [good_folder(root / f"good {form}", form) for form in FORMS]
        goods.append(good_folder(root / "good before 1.6", FORMS[0]))
        _legacy(goods[-1])
        work = root / "work"
        while time.monotonic() < end and count < options.count:
            draw = random.Random(f"{options.seed} {count}")
            shutil.copytree(draw.choice(goods), work / "checkpoint")
            for file in draw.sample(sorted((work / "checkpoint").iterdir()), draw.choice([1, 1, 2])):
                mutate(file, draw)
            refused, wrong = attack(work / "checkpoint", root)
            if wrong:
                print(f"seed {options.seed}, number {count}", *wrong, sep="\n")
                return 1
            refusals += bool(refused)
            count += 1
            shutil.rmtree(work)
    print(f"{count} checkpoints, {refusals} refused, nothing else happened")
    return 0


if __name__ == "__main__":
    sys.exit(main())
