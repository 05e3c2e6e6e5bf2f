"""Rounds matrices to 8 or 4 bits, and gives the numbers that are stored.

A number becomes an integer times a scale. "int8" has one scale for each row, "int4" one for each group of 32 numbers of
a row. With the scale that maps the largest number to the end of the integers, [0.9, 0.2, -0.3] as int8 is:

    scale 0.9 / 127 = 0.007087    integers 127 28 -42    values 0.9 0.1984 -0.2976

That scale serves the largest number alone. Here it is found by least squares: for given integers q, the sum of
(w - q * scale)^2 is smallest at <w, q> / <q, q>. int4 also tries smaller scales, which clip the largest numbers and
round all others more finely; with 8 bits that never pays. As in llama.cpp's Q4_0, a scale of int4 may be negative: the
integers reach from -8 to 7, and the largest number may lie at -8, whatever its sign is.

Many numbers are rounded by ``rounding.cpp`` (see ``loops``), which has the same functions and computes the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openllama.errors import InputError
from openllama.quantized import loops

GROUP = 32  # numbers of an int4 row that share a scale
BLOCK = 2**17  # numbers that are rounded at a time: what is computed of them stays in a cache


@dataclass(frozen=True)
class Format:
    """How one kind of rounded matrix is stored."""

    bits: int  # of a number, without its share of a scale
    low: int  # the integers
    high: int
    weight_dtype: torch.dtype
    scale_dtype: torch.dtype
    divisors: tuple[float, ...]  # tried scales: the number of the largest size over each; the first clips nothing

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the stored weight and scale of a matrix (rows, columns)."""
        if self.weight_dtype == torch.int8:
            return (rows, columns), (rows,)
        groups = -(-columns // GROUP)
        return (rows, groups * GROUP // 2), (rows, groups)


FORMATS: dict[str, Format] = {  # by the names of ``config.QUANTIZATIONS``
    "int8": Format(8, -127, 127, torch.int8, torch.float32, (127,)),
    "int4": Format(4, -8, 7, torch.uint8, torch.bfloat16, (-8, -8.5, -7.5, -7, 7, 7.5, -9)),
}


def check_quantization(asked: object, stored: str | None = None, where: object = "the model") -> None:
    """Raise ``InputError`` unless weights can be rounded to ``asked``.

    What is ``stored`` as integers, in ``where``, is not rounded again: that would lose more than rounding once.
    """
    if asked not in list(FORMATS):
        raise InputError(f"the quantisation must be one of {', '.join(FORMATS)}, got {asked!r}")
    if stored is not None:
        raise InputError(
            f"{where} is quantised to {stored} already, and is not rounded again; for {asked}, take what it was made "
            "from"
        )


def to_round(asked: str | None, stored: str | None, where: object) -> str | None:
    """What weights that are ``stored`` so are to be rounded to, if at all: what is stored as asked keeps its bits."""
    if asked in (None, stored):
        return None
    check_quantization(asked, stored, where)
    return asked


def round_matrix(weight: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """The stored weight and scale of ``weight`` (M, K), computed in float32 for a few rows at a time.

    int8: (M, K) int8 and (M,) float32. int4: (M, G * 16) uint8 and (M, G) bfloat16 for G groups of each row, the last
    filled up with zeros. Byte j of a group holds the integers of its elements j and j + 16, increased by 8, in the low
    and the high half. On the meta device there are shapes alone. Raises ``InputError`` for NaN and infinity.
    """
    form = FORMATS[quantization]
    shapes = form.shapes(*weight.shape)
    stored = torch.empty(shapes[0], dtype=form.weight_dtype, device=weight.device)
    scales = torch.empty(shapes[1], dtype=form.scale_dtype, device=weight.device)
    finite = loops.round_matrix(weight, stored, scales, form.divisors, form.low, form.high)
    if finite is not None:
        _refuse_unless(finite)
    elif not weight.is_meta:
        part = round_rows if quantization == "int8" else round_groups
        for places, rows in _blocks(weight):
            stored[places], scales[places] = part(rows, form)
    return stored, scales


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """An ``InputError`` about a matrix says its ``name``."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def check_finite(weight: Tensor) -> None:
    """Raise ``InputError`` for a matrix that ``round_matrix`` refuses; one on the meta device has no numbers."""
    finite = loops.is_finite(weight)
    if finite is not None:
        _refuse_unless(finite)
    elif not weight.is_meta:
        for _, rows in _blocks(weight):
            _check_range(*rows.aminmax())


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, and these rows in float32."""
    step = max(1, BLOCK // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        places = slice(start, start + step)
        yield places, weight[places].detach().float()


def _check_range(least: Tensor, most: Tensor) -> None:
    _refuse_unless(bool(least.isfinite().all() and most.isfinite().all()))


def _refuse_unless(finite: bool) -> None:
    if not finite:
        raise InputError("a matrix that holds NaN or infinity in float32 cannot be quantised")


def round_rows(rows: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """int8 of ``rows`` (M, K)."""
    scale = best_scale(rows.T, form)
    return integers(rows.T, scale, form).T.to(torch.int8), scale[0]


def round_groups(rows: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """int4 of ``rows`` (M, K)."""
    padded = F.pad(rows, (0, -rows.shape[1] % GROUP))
    groups = padded.view(-1, GROUP).T.contiguous()  # (32, M * G): sums over a group are sums of vectors
    scale = best_scale(groups, form)
    stored = (integers(groups, scale.float(), form) - form.low).to(torch.uint8)
    stored = stored[: GROUP // 2] | stored[GROUP // 2 :] << 4
    return stored.T.reshape(len(rows), -1), scale.view(len(rows), -1)


def integers(w: Tensor, scale: Tensor, form: Format, out: Tensor | None = None) -> Tensor:
    """The nearest integers, as floats; 0 where the scale is 0, or too small to have an inverse."""
    inverse = 1 / scale
    return torch.mul(w, inverse.where(inverse.isfinite(), 0), out=out).round_().clamp_(form.low, form.high)


def nearest_scale(w: Tensor, form: Format) -> Tensor:
    """The scale (1, N) of each column of ``w`` that clips nothing, as it is stored."""
    return (_peak(w, form) / form.divisors[0]).to(form.scale_dtype)


def best_scale(w: Tensor, form: Format) -> Tensor:
    """The scale (1, N) of each column of ``w``, as it is stored; its squared error is never above the nearest's."""
    peak = _peak(w, form)
    fit, best = torch.zeros_like(peak), peak / form.divisors[0]
    q, product = torch.empty_like(w), torch.empty_like(w)
    for divisor in form.divisors:
        integers(w, peak / divisor, form, out=q)
        along = _sum(torch.mul(w, q, out=product))
        square = _sum(torch.mul(q, q, out=product))
        better = along * along > fit * square  # by the scale along / square the error falls by along^2 / square
        fit, best = torch.where(better, along * along / square, fit), torch.where(better, along / square, best)
    scale, nearest = best.to(form.scale_dtype), nearest_scale(w, form)
    return torch.where(squared_error(w, scale, form) < squared_error(w, nearest, form), scale, nearest)


def squared_error(w: Tensor, scale: Tensor, form: Format) -> Tensor:
    """Sum of (w - q * scale)^2 of each column, with the nearest integers q."""
    scale = scale.float()
    return _sum(integers(w, scale, form).mul_(scale).sub_(w).square_())


def _sum(w: Tensor) -> Tensor:
    """The sum of each column (1, N), by halves: it does not depend on how many columns are summed at a time."""
    while len(w) > 1:
        half = len(w) // 2
        total = w[:half] + w[half : 2 * half]
        if len(w) % 2:
            total[0] += w[-1]
        w = total
    return w


def _peak(w: Tensor, form: Format) -> Tensor:
    """The number of the largest size in each column (1, N); its size where the integers are symmetric."""
    least, most = w.amin(0, keepdim=True), w.amax(0, keepdim=True)
    _check_range(least, most)
    size = torch.maximum(most.abs(), least.abs())
    return size if form.low == -form.high else torch.where(most >= -least, size, -size)


def restore_matrix(weight: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix (M, ``columns``) of a stored weight and scale, in ``dtype``."""
    wide = torch.promote_types(dtype, scale.dtype)
    if weight.dtype == torch.int8:
        return (weight.to(wide) * scale[:, None]).to(dtype)
    halves = weight.view(*scale.shape, GROUP // 2)
    q = torch.cat((halves & 15, halves >> 4), -1).to(wide) + FORMATS["int4"].low  # (M, G, 32)
    return (q * scale[..., None]).to(dtype).flatten(1)[:, :columns]
