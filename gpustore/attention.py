"""Flux's attention: NNlib's scaled products of queries and keys, and the layer around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpustore.activations import identity
from gpustore.errors import MismatchError
from gpustore.layers import printed
from gpustore.notebook import Shown


@dataclass(repr=False, eq=False)
class MultiHeadAttention(Shown):
    """Attention of several heads (Vaswani 2017): projections, and weights by their scaled products.

    The projections are layers such as Dense without bias; `attn_drop` a Dropout or a function.
    q (features, q_len, batch), and k and v (features, kv_len, batch) where they are not q, give the
    output (out, q_len, batch) and the attention (kv_len, q_len, nheads, batch).

    >>> from gpustore import Dense
    >>> parts = [Dense(8, 8, bias=False) for _ in range(4)]
    >>> attend = MultiHeadAttention(2, *parts[:3], identity, parts[3])
    >>> [part.shape for part in attend(np.ones((8, 5, 1), np.float32))]
    [(8, 5, 1), (5, 5, 2, 1)]
    """

    nheads: int
    q_proj: Any
    k_proj: Any
    v_proj: Any
    attn_drop: Any
    out_proj: Any

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
