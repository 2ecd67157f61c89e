"""Flux's attention: NNlib's scaled products of queries and keys, and the layer around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpustore.activations import identity
from gpustore.errors import MismatchError, UnsupportedValueError
from gpustore.layers import Dense, glorot_uniform, printed
from gpustore.normalisation import Dropout
from gpustore.notebook import Shown


@dataclass(init=False, repr=False, eq=False)
class MultiHeadAttention(Shown):
    """Attention of several heads (Vaswani 2017): projections, and weights by their scaled products.

    Made from sizes, `MultiHeadAttention(8, nheads=2)`, as in Flux: one for all, or those of the
    inputs, of the heads together and of the output, `MultiHeadAttention(q_in, qk, out)`, where
    the first may be (q_in, k_in, v_in), the second (qk, v), and the third is as v by default.
    Or of its fields: `MultiHeadAttention(nheads, q_proj, k_proj, v_proj, attn_drop, out_proj)`,
    where the projections are layers such as Dense without bias, `attn_drop` a Dropout or a
    function.

    q (features, q_len, batch), and k and v (features, kv_len, batch) where they are not q, give the
    output (out, q_len, batch) and the attention (kv_len, q_len, nheads, batch).

    >>> attend = MultiHeadAttention(8, nheads=2)
    >>> [part.shape for part in attend(np.ones((8, 5, 1), np.float32))]
    [(8, 5, 1), (5, 5, 2, 1)]
    """

    nheads: int
    q_proj: Any
    k_proj: Any
    v_proj: Any
    attn_drop: Any
    out_proj: Any

    def __init__(
        self,
        size: Any,
        *parts: Any,
        nheads: int = 8,
        bias: bool = False,
        init: Callable[..., Any] = glorot_uniform,
        dropout_prob: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> None:
        if len(parts) == 5:
            self.nheads, self.q_proj, self.k_proj, self.v_proj = size, *parts[:3]
            self.attn_drop, self.out_proj = parts[3:]
            return
        (q_in, k_in, v_in), (qk, v), out = _sizes(size, *parts)
        if nheads < 1 or qk % nheads or v % nheads:
            raise MismatchError(
                f"MultiHeadAttention: expected sizes of the heads that {nheads} divides, found "
                f"{qk} and {v}; give another nheads"
            )

        def project(n_in: int, n_out: int) -> Dense:
            return Dense(n_in, n_out, bias=bias, init=init, rng=rng)

        self.nheads, self.attn_drop = nheads, Dropout(dropout_prob)
        self.q_proj, self.k_proj = project(q_in, qk), project(k_in, qk)
        self.v_proj, self.out_proj = project(v_in, v), project(v, out)

    def __call__(
        self, q: Any, k: Any = None, v: Any = None, bias: Any = None, *, mask: Any = None
    ) -> tuple[Any, Any]:
        """Return (out, q_len, batch) and the attention (kv_len, q_len, nheads, batch).

        q: (features, q_len, batch); k, v: (features, kv_len, batch), q itself by default. `bias`
        is added to the scores, `mask` keeps those where it is true; both broadcast to them.
        """
        k = q if k is None else k
        v = k if v is None else v
        for x in (q, k, v):
            if x.ndim != 3:
                raise MismatchError(
                    f"{self!r}: expected inputs (features, length, batch), found {x.shape}; "
                    "add a batch axis with x[:, :, None]"
                )
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        x, weights = dot_product_attention(
            q, k, v, bias, nheads=int(self.nheads), mask=mask, fdrop=self.attn_drop
        )
        return self.out_proj(x), weights

    @printed
    def __repr__(self) -> str:
        sizes = getattr(getattr(self.q_proj, "weight", None), "shape", ("?",))
        return f"MultiHeadAttention({sizes[-1]}; nheads={self.nheads})"


def _sizes(*given: Any) -> tuple[Any, Any, int]:
    """Return sizes as Flux's three: of the inputs, of the heads, of the output."""
    if len(given) > 3:
        raise UnsupportedValueError(
            "MultiHeadAttention: expected up to three sizes, or the number of heads and five "
            f"parts, found {len(given)} arguments"
        )
    inputs = given[0]
    heads = given[1] if len(given) > 1 else inputs
    inputs = inputs if isinstance(inputs, tuple) else (inputs,) * 3
    heads = heads if isinstance(heads, tuple) else (heads,) * 2
    return inputs, heads, given[2] if len(given) > 2 else heads[1]


def dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
    bias: Any = None,
    *,
    nheads: int = 1,
    mask: Any = None,
    fdrop: Callable[[Any], Any] = identity,
) -> tuple[Any, Any]:
    """Return softmax(k' q / sqrt(d)) applied to v, and its weights, as NNlib's of this name.

    q: (features, q_len, batch); k, v: (features, kv_len, batch). `bias` is added to the scores,
    `mask` keeps those where it is true, `fdrop` goes over the weights: (kv_len, q_len, nheads,
    batch).

    >>> q, kv = np.ones((4, 3, 1)), np.ones((4, 5, 1))
    >>> [part.shape for part in dot_product_attention(q, kv, kv, nheads=2)]
    [(4, 3, 1), (5, 3, 2, 1)]
    """

    def heads(x: Any) -> Any:  # (features, length, batch) -> (batch, heads, length, features)
        split = x.reshape((x.shape[0] // nheads, nheads, *x.shape[1:]), order="F")
        return split.transpose(3, 1, 2, 0)

    queries, keys, values = heads(q), heads(k), heads(v)
    scores = queries @ keys.swapaxes(-1, -2) / np.sqrt(queries.dtype.type(queries.shape[-1]))
    scores = scores.transpose(3, 2, 1, 0)  # (kv_len, q_len, heads, batch)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape + (1,) * (4 - bias.ndim))
    if mask is not None:
        lowest = np.finfo(scores.dtype).min
        scores = np.where(mask.reshape(mask.shape + (1,) * (4 - mask.ndim)), scores, lowest)
    powers = np.exp(scores - scores.max(axis=0, keepdims=True))
    weights = fdrop(powers / powers.sum(axis=0, keepdims=True))
    mixed = weights.transpose(3, 2, 1, 0) @ values  # (batch, heads, q_len, features)
    joined = mixed.transpose(3, 1, 2, 0)
    size = math.prod(joined.shape[:2])
    return joined.reshape((size, *joined.shape[2:]), order="F"), weights
