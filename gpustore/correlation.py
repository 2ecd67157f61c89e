"""Cross-correlation and its adjoint, of any number of spatial axes, on NumPy and CuPy alike.

Axes are the reverse of Julia's: (batch, channels, ..., width), which is how a column-major array
(width, ..., channels, batch) lies in memory. Windows are gathered into one buffer of bounded size
and multiplied as matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpustore.errors import MismatchError

_BUFFER_NBYTES = 4 * 1024 * 1024  # of gathered windows at a time
_ALL = (slice(None),)
_MAX_WASTE = 1.5  # of a gathered row, counting what lies between the windows


def correlate(x: Any, weight: Any, stride: Any, pad: Any, dilation: Any, groups: int) -> Any:
    """Return the cross-correlation: x (batch, in, ...), weight (out, in / groups, ...).

    `stride`, `pad` as (low, high) and `dilation` are per spatial axis, in the order of the axes.
    """
    batch, channels, *space = x.shape
    kernel = weight.shape[2:]
    padded_space = [n + low + high for n, (low, high) in zip(space, pad, strict=True)]
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    out_space = [(n - r - 1) // s + 1 for n, r, s in zip(padded_space, reach, stride, strict=True)]
    if min(out_space, default=1) < 1:
        raise MismatchError(
            f"expected an input of at least {[r + 1 for r in reach]} with its padding, found "
            f"{padded_space}"
        )
    out = np.empty_like(x, order="C", shape=(batch, weight.shape[0], *out_space))
    if out.size == 0:
        return out
    if groups == channels and weight.shape[1] == 1 and groups > 1:
        return _depthwise(_padded(x, pad, padded_space), weight, stride, dilation, out)
    rows = weight.reshape((groups, weight.shape[0] // groups, -1))
    if math.prod(kernel) == 1 and max(stride) == 1 and not any(map(any, pad)):
        flat = x.reshape((batch, groups, channels // groups, -1))
        np.matmul(rows, flat, out=out.reshape((batch, groups, rows.shape[1], -1)))
        return out
    _gathered(x, rows, kernel, (stride, pad, dilation), padded_space, out)
    return out


def _padded(x: Any, pad: Any, space: list[int], extra: int | None = None) -> Any:
    """Return `x` with zeros around it: (batch, channels, ...).

    With `extra` its space is flat, with that many zeros after it.
    """
    count = math.prod(space)
    flat = np.zeros_like(x, order="C", shape=(*x.shape[:2], count + (extra or 0)))
    inner = tuple(slice(low, n - high) for n, (low, high) in zip(space, pad, strict=True))
    flat[:, :, :count].reshape((*x.shape[:2], *space))[_ALL * 2 + inner] = x
    return flat.reshape((*x.shape[:2], *space)) if extra is None else flat


def flipped(weight: Any) -> Any:
    """Return a weight with its spatial axes, all but the first two, the other way round."""
    return weight[_ALL * 2 + (slice(None, None, -1),) * (weight.ndim - 2)]


def _depthwise(padded: Any, weight: Any, stride: Any, dilation: Any, out: Any) -> Any:
    """Fill `out` where each channel is correlated with kernels of its own."""
    multiple = out.shape[1] // padded.shape[1]
    batch, channels, *space = padded.shape[:2] + out.shape[2:]
    target = out.reshape((batch, channels, multiple, *space))
    target[...] = 0
    kernels = weight.reshape((channels, multiple, *weight.shape[2:]))
    for place in np.ndindex(*weight.shape[2:]):
        window = padded[_ALL * 2 + _window(place, dilation, stride, space)]
        factor = kernels[_ALL * 2 + place]
        target += window[:, :, None] * factor.reshape(factor.shape + (1,) * len(space))
    return out


def _window(place: Any, dilation: Any, stride: Any, space: Any) -> tuple[slice, ...]:
    """Return the slices of a padded array that one element of the kernel meets."""
    starts = [p * d for p, d in zip(place, dilation, strict=True)]
    return tuple(
        slice(start, start + (n - 1) * s + 1, s)
        for start, s, n in zip(starts, stride, space, strict=True)
    )


def _gathered(
    x: Any, rows: Any, kernel: tuple[int, ...], how: Any, space: list[int], out: Any
) -> None:
    """Fill `out` block by block: windows are gathered side by side, then one matrix product.

    With stride 1 a window of the flat padded array is one run of memory, with some elements
    between its rows that belong to no output; these are computed too and dropped.
    """
    stride, pad, dilation = how
    groups, _, width = rows.shape
    out_space = out.shape[2:]
    waste = math.prod(space[1:]) / math.prod(out_space[1:])
    is_flat = max(stride) == 1 and waste <= _MAX_WASTE
    row_size = math.prod(space[1:]) if is_flat else math.prod(out_space[1:])
    tail = sum((k - 1) * d * math.prod(space[i + 1 :]) for i, (k, d) in
               enumerate(zip(kernel, dilation, strict=True)) if i)  # fmt: skip
    padded = _padded(x, pad, space, tail if is_flat else None)
    column_nbytes = groups * width * row_size * x.dtype.itemsize
    for images, lines in _blocks(x.shape[0], out_space[0], column_nbytes):
        count, n_lines = images.stop - images.start, lines.stop - lines.start
        shape = (groups, width // math.prod(kernel), math.prod(kernel), count, n_lines * row_size)
        buffer = np.empty_like(x, order="C", shape=shape)
        block = padded[images].swapaxes(0, 1)
        for index, place in enumerate(np.ndindex(*kernel)):
            if is_flat:
                start = lines.start * row_size + sum(
                    p * d * math.prod(space[i + 1 :])
                    for i, (p, d) in enumerate(zip(place, dilation, strict=True))
                )
                window = block[:, :, start : start + n_lines * row_size]
            else:
                slices = _window(place, dilation, stride, (n_lines, *out_space[1:]))
                first = slice(
                    slices[0].start + lines.start * stride[0],
                    slices[0].stop + lines.start * stride[0],
                    stride[0],
                )
                window = block[_ALL * 2 + (first,) + slices[1:]]
            target = buffer[:, :, index]
            target.reshape((groups, -1, count, *window.shape[2:]))[...] = window.reshape(
                (groups, -1, *window.shape[1:])
            )
        product = rows @ buffer.reshape((groups, width, -1))
        inner = (n_lines, *(space[1:] if is_flat else out_space[1:]))
        whole = product.reshape((out.shape[1], count, *inner)).swapaxes(0, 1)
        kept = whole[_ALL * 3 + tuple(slice(n) for n in out_space[1:])]
        out[images, :, lines] = kept


def _blocks(batch: int, n_lines: int, line_nbytes: int) -> Iterator[tuple[slice, slice]]:
    """Yield (images, lines) whose windows fit the buffer: several images, or lines of one."""
    per_image = line_nbytes * n_lines
    if per_image <= _BUFFER_NBYTES:
        step = max(1, _BUFFER_NBYTES // max(per_image, 1))
        for start in range(0, batch, step):
            yield slice(start, min(start + step, batch)), slice(0, n_lines)
        return
    step = max(1, _BUFFER_NBYTES // line_nbytes)
    for image, start in itertools.product(range(batch), range(0, n_lines, step)):
        yield slice(image, image + 1), slice(start, min(start + step, n_lines))


def transposed(
    x: Any, weight: Any, stride: Any, pad: Any, outpad: Any, dilation: Any, groups: int
) -> Any:
    """Return what `correlate` with this weight has as its adjoint, for x (batch, in, ...).

    weight: (in, out / groups, ...). `outpad` are further elements at the end of each axis.
    """
    batch, channels, *space = x.shape
    kernel = weight.shape[2:]
    full = [
        (n - 1) * s + (k - 1) * d + 1 + max(high_extra, 0)
        for n, s, k, d, high_extra in zip(space, stride, kernel, dilation, outpad, strict=True)
    ]
    n_out = weight.shape[1] * groups
    whole = np.zeros_like(x, order="C", shape=(batch, n_out, *full))
    rows = weight.reshape((groups, channels // groups, -1)).swapaxes(1, 2)
    for image in range(batch):
        flat = x[image].reshape((groups, channels // groups, -1))
        columns = (rows @ flat).reshape((n_out, *kernel, *space))
        for place in np.ndindex(*kernel):
            target = _ALL + _window(place, dilation, stride, space)
            whole[image][target] += columns[_ALL + place]
    inner = tuple(slice(low, n - high) for n, (low, high) in zip(full, pad, strict=True))
    return whole[_ALL * 2 + inner]
