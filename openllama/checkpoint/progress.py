"""Shows how far a conversion is: a bar for each file on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Literal

from tqdm import tqdm

Phase = Literal["write", "compare"]
SECONDS = 5.0  # between lines where there is no terminal
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {rate_fmt}{postfix}"


class Progress:
    """Is told of every file that is written or compared, and of the bytes; shows nothing."""

    def begin(self, phase: Phase, file: str, nbytes: int) -> None:
        """From now on, ``tick`` counts the bytes of this file."""

    def tick(self, nbytes: int) -> None:
        """So many bytes more are done."""

    def skip(self, nbytes: int) -> None:
        """So many bytes need not be written: an earlier run has."""

    def close(self) -> None:
        """The last file is done, or there was an error."""


class ShownProgress(Progress):
    """On standard error. The time left follows from the mean rate of each phase, so that it does not swing."""

    def __init__(self, nbytes: int) -> None:
        self.left: dict[Phase, int] = {"write": nbytes, "compare": nbytes}
        self.done: dict[Phase, int] = {"write": 0, "compare": 0}
        self.seconds: dict[Phase, float] = {"write": 0.0, "compare": 0.0}
        self.phase: Phase = "write"
        self.text, self.size, self.count = "", 0, 0
        self.bar: tqdm | None = None
        self.last_tick = self.last_line = time.monotonic()

    def begin(self, phase: Phase, file: str, nbytes: int) -> None:
        self.close()
        self.phase, self.text, self.size, self.count = phase, f"{phase} {file}", nbytes, 0
        self.last_tick = self.last_line = time.monotonic()
        if sys.stderr is not None and sys.stderr.isatty():
            with suppress(OSError):
                self.bar = tqdm(total=nbytes, desc=self.text, unit="B", unit_scale=True, smoothing=0, bar_format=BAR)

    def tick(self, nbytes: int) -> None:
        now = time.monotonic()
        self.seconds[self.phase] += now - self.last_tick
        self.done[self.phase] += nbytes
        self.left[self.phase] -= nbytes
        self.count += nbytes
        self.last_tick = now
        with suppress(OSError):  # a terminal that has gone does not end the work
            if self.bar is not None:
                self.bar.set_postfix_str(f"all done in {self._time_left()}", refresh=False)
                self.bar.update(nbytes)
            elif now - self.last_line >= SECONDS:
                self._print()

    def skip(self, nbytes: int) -> None:
        self.left["write"] -= nbytes

    def close(self) -> None:
        with suppress(OSError):
            if self.bar is not None:
                self.bar.close()
            elif self.text and self.count == self.size:  # else there was an error, which is said elsewhere
                self._print()
        self.bar, self.text = None, ""

    def _print(self) -> None:
        self.last_line = self.last_tick
        percent = 100 * self.count // max(self.size, 1) if self.size else 100
        rate = self.done[self.phase] / max(self.seconds[self.phase], 1e-9) / 1e6
        size = f"{self.count / 1e9:.2f} of {self.size / 1e9:.2f} GB"
        if sys.stderr is not None:
            print(f"{self.text}: {percent}%, {size}, {rate:.0f} MB/s, all done in {self._time_left()}", file=sys.stderr)

    def _time_left(self) -> str:
        """Minutes and seconds; before anything was compared, comparing is taken to be as slow as writing."""
        rates = {phase: self.done[phase] / self.seconds[phase] for phase in self.done if self.seconds[phase]}
        slowest = min(rates.values(), default=0.0)
        if not slowest:
            return "?"
        seconds = round(sum(left / rates.get(phase, slowest) for phase, left in self.left.items()))
        return f"{seconds // 60}:{seconds % 60:02}"
