"""Flux's recurrent layers, of both interfaces: `Recur` that keeps its state, and today's.

A cell maps (x, state) to (output, state); x is (features,) or (features, batch). `Recur` (Flux
up to 0.14) keeps the state between calls; RNN, LSTM, GRU and GRUv3 (from 0.15) map a whole
sequence (features, time) or (features, time, batch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpustore.activations import sigmoid_fast, tanh
from gpustore.errors import MismatchError, UnsupportedValueError
from gpustore.layers import activate, glorot_uniform, made_bias, matched, plain, printed, show
from gpustore.notebook import Shown

State = Any  # an array, or for LSTM a tuple of two


def _sizes(sizes: tuple[Any, ...], name: str) -> tuple[int, int]:
    """Return (in, out), given as one pair or as two numbers."""
    pair = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple) else sizes
    if len(pair) != 2:
        raise UnsupportedValueError(f"{name}: expected sizes (in, out), found {pair!r}")
    return int(pair[0]), int(pair[1])


def _columns(v: Any) -> Any:
    """Return (n, batch); a vector is one column."""
    return v if v.ndim == 2 else v.reshape(-1, 1)


ERA = {"era": True}  # a field that only files of some versions have


class _Cell(Shown):
    """What the cells share: their construction, their start, and the shapes of a step."""

    Wi: Any
    Wh: Any
    gates = 1

    def _init(self, sizes: tuple[Any, ...], bias: Any, rng: Any, init: Any) -> Any:
        n_in, n_out = _sizes(sizes, type(self).__name__)
        rng = np.random.default_rng() if rng is None else rng
        self.Wi = init(n_out * self.gates, n_in, rng=rng)
        self.Wh = init(n_out * self.gates, n_out, rng=rng)
        return made_bias(self.Wi, bias, n_out * self.gates, name=type(self).__name__)

    def initialstates(self) -> State:
        """Return the state before the first step: what the file says, else zeros (out,)."""
        found = getattr(self, "state0", None)
        if found is None:
            weight = plain(self.Wh)
            return np.zeros_like(weight, shape=(weight.shape[1],))
        return plain(found)

    def __call__(self, x: Any, state: State = None) -> tuple[Any, State]:
        """Return (output, new state); the state is `initialstates()` by default."""
        weight = plain(self.Wi)
        if x.ndim not in (1, 2) or x.shape[0] != weight.shape[1]:
            raise MismatchError(
                f"{self!r}: expected input ({weight.shape[1]},) or ({weight.shape[1]}, batch), "
                f"found {tuple(x.shape)}"
            )
        state = self.initialstates() if state is None else state
        is_vector = x.ndim == 1 and all(plain(part).ndim == 1 for part in _parts(state))
        h, *more = (
            _columns(plain(part).astype(weight.dtype, copy=False)) for part in _parts(state)
        )
        new = self.step(_columns(matched(x, weight)), h, *more)
        new = tuple(part[:, 0] if is_vector else part for part in new)
        output = new[0].reshape(-1) if x.ndim == 1 else new[0]
        return output, new if isinstance(state, tuple) else new[0]

    def step(self, x: Any, h: Any) -> tuple[Any, ...]:
        raise NotImplementedError

    def _bias(self, name: str = "b") -> Any:
        """Return the bias as a column, or 0."""
        bias = plain(getattr(self, name))
        return 0 if bias is False else bias.reshape(-1, 1)

    def _gates(self, *sums: Any) -> list[list[Any]]:
        """Return each of the arrays cut into the gates' rows."""
        size = plain(self.Wh).shape[1]
        return [
            [v[i * size : (i + 1) * size] if hasattr(v, "shape") else v for i in range(3)]
            for v in sums
        ]

    @printed
    def __repr__(self) -> str:
        rows, n_in = getattr(self.Wi, "shape", ("?", "?"))
        size = rows // self.gates if isinstance(rows, int) else rows
        σ = getattr(self, "σ", tanh)
        return f"{type(self).__name__}({n_in}, {size}{'' if σ is tanh else ', ' + show(σ)})"


def _parts(state: State) -> tuple[Any, ...]:
    return state if isinstance(state, tuple) else (state,)


@dataclass(init=False, repr=False, eq=False)
class RNNCell(_Cell):
    """h' = σ(Wi x + Wh h + bias).

    A cell takes x (in,) or (in, batch) and a state, and returns the output and the new state.

    >>> output, state = RNNCell(3, 5)(np.ones((3, 2), np.float32))
    >>> output.shape
    (5, 2)
    """

    σ: Any
    Wi: Any
    Wh: Any
    bias: Any
    state0: Any = field(default=None, metadata=ERA)

    def __init__(
        self, *sizes: Any, σ: Any = tanh, bias: Any = True, rng: Any = None,
        init: Callable[..., Any] = glorot_uniform,
    ) -> None:  # fmt: skip
        sizes, self.σ = (sizes[:-1], sizes[-1]) if callable(sizes[-1]) else (sizes, σ)
        self.bias = self._init(sizes, bias, rng, init)

    def step(self, x: Any, h: Any) -> tuple[Any, ...]:
        return (activate(self.σ, plain(self.Wi) @ x + plain(self.Wh) @ h + self._bias("bias")),)


@dataclass(init=False, repr=False, eq=False)
class LSTMCell(_Cell):
    """Long short-term memory; rows of the weights are input, forget, cell and output gate.

    The state is (h, c).

    >>> output, (h, c) = LSTMCell(3, 5)(np.ones((3, 2), np.float32))
    >>> c.shape
    (5, 2)
    """

    Wi: Any
    Wh: Any
    bias: Any
    state0: Any = field(default=None, metadata=ERA)
    h: Any = field(default=None, metadata=ERA)
    c: Any = field(default=None, metadata=ERA)

    gates = 4

    def __init__(
        self, *sizes: Any, bias: Any = True, rng: Any = None,
        init: Callable[..., Any] = glorot_uniform,
    ) -> None:  # fmt: skip
        self.bias = self._init(sizes, bias, rng, init)

    def initialstates(self) -> State:
        """Return (h, c) before the first step: what the file says, else zeros (out,) each."""
        if self.state0 is not None:
            return tuple(plain(part) for part in self.state0)
        if self.h is not None and self.c is not None:
            return plain(self.h), plain(self.c)
        start = super().initialstates()
        return start, start

    def step(self, x: Any, h: Any, c: Any = None) -> tuple[Any, ...]:
        size = plain(self.Wh).shape[1]
        g = plain(self.Wi) @ x + plain(self.Wh) @ h + self._bias("bias")
        keep, forget, cell, output = (g[i * size : (i + 1) * size] for i in range(4))
        c = sigmoid_fast(forget) * c + sigmoid_fast(keep) * np.tanh(cell)
        return sigmoid_fast(output) * np.tanh(c), c


@dataclass(init=False, repr=False, eq=False)
class GRUCell(_Cell):
    """Gated recurrent unit; rows of the weights are reset gate, update gate and candidate.

    >>> GRUCell(3, 5)
    GRUCell(3, 5)
    """

    Wi: Any
    Wh: Any
    b: Any
    state0: Any = field(default=None, metadata=ERA)

    gates = 3

    def __init__(
        self, *sizes: Any, bias: Any = True, rng: Any = None,
        init: Callable[..., Any] = glorot_uniform,
    ) -> None:  # fmt: skip
        self.b = self._init(sizes, bias, rng, init)

    def step(self, x: Any, h: Any) -> tuple[Any, ...]:
        gx, gh, b = self._gates(plain(self.Wi) @ x, plain(self.Wh) @ h, self._bias())
        r, z = (sigmoid_fast(gx[i] + gh[i] + b[i]) for i in range(2))
        candidate = np.tanh(gx[2] + r * gh[2] + b[2])
        return ((1 - z) * candidate + z * h,)


@dataclass(init=False, repr=False, eq=False)
class GRUv3Cell(_Cell):
    """Gated recurrent unit whose reset gate comes before the recurrent product.

    >>> GRUv3Cell(3, 5)
    GRUv3Cell(3, 5)
    """

    Wi: Any
    Wh: Any
    b: Any
    Wh_h̃: Any
    state0: Any = field(default=None, metadata=ERA)

    gates = 3

    def __init__(
        self, *sizes: Any, bias: Any = True, rng: Any = None,
        init: Callable[..., Any] = glorot_uniform,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng() if rng is None else rng
        self.b = self._init(sizes, bias, rng, init)
        n_out = self.Wh.shape[1]
        self.Wh = init(n_out * 2, n_out, rng=rng)
        self.Wh_h̃ = init(n_out, n_out, rng=rng)

    def step(self, x: Any, h: Any) -> tuple[Any, ...]:
        gx, gh, b = self._gates(plain(self.Wi) @ x, plain(self.Wh) @ h, self._bias())
        r, z = (sigmoid_fast(gx[i] + gh[i] + b[i]) for i in range(2))
        candidate = np.tanh(gx[2] + plain(self.Wh_h̃) @ (r * h) + b[2])
        return ((1 - z) * candidate + z * h,)


@dataclass(init=False, repr=False, eq=False)
class Recur(Shown):
    """A cell with its state, which each call moves on (Flux up to 0.14); `reset()` starts again.

    >>> Recur(RNNCell(3, 5))
    Recur(RNNCell(3, 5))
    """

    cell: Any
    state: Any = field(metadata={"trainable": False})
    init: Any = field(default=None, metadata=ERA)

    def __init__(self, cell: Any) -> None:
        self.cell, self.state = cell, cell.initialstates()

    def __call__(self, x: Any) -> Any:
        """Return the output for x (features,) or (features, batch), or for each of a sequence.

        A sequence is (features, batch, time), as in Flux 0.13 and 0.14.
        """
        if x.ndim == 3:
            return np.stack([self(x[:, :, t]) for t in range(x.shape[2])], axis=2)
        state = tuple(map(plain, self.state)) if isinstance(self.state, tuple) else self.state
        output, self.state = self.cell(x, plain(state))
        return output

    def reset(self) -> None:
        """Put the state back to what it is before the first step."""
        self.state = self.cell.initialstates() if self.init is None else self.init

    @printed
    def __repr__(self) -> str:
        return f"Recur({self.cell!r})"


class _Sequence(Shown):
    """A layer of today's Flux: it maps a whole sequence by its cell, and keeps no state."""

    cell: Any
    return_state: Any = False
    cell_type: type[Any]

    def __init__(self, *sizes: Any, return_state: bool = False, **options: Any) -> None:
        is_cell = len(sizes) == 1 and isinstance(sizes[0], _Cell)
        self.cell = sizes[0] if is_cell else self.cell_type(*sizes, **options)
        self.return_state = return_state

    def initialstates(self) -> State:
        return self.cell.initialstates()

    def __call__(self, x: Any, state: State = None) -> Any:
        """Return (out, time) or (out, time, batch), and the last state with `return_state`.

        x: (features, time) or (features, time, batch); the state starts as `initialstates()`.
        """
        if x.ndim not in (2, 3):
            raise MismatchError(
                f"{self!r}: expected input (features, time) or (features, time, batch), found "
                f"{tuple(x.shape)}"
            )
        state = self.initialstates() if state is None else state
        outputs = []
        for step in range(x.shape[1]):
            output, state = self.cell(x[:, step], state)
            outputs.append(output)
        made = np.stack(outputs, axis=1)
        return (made, state) if self.return_state else made

    @printed
    def __repr__(self) -> str:
        inner = repr(self.cell)
        return f"{type(self).__name__}({inner[inner.index('(') + 1 :]}"


@dataclass(init=False, repr=False, eq=False)
class RNN(_Sequence):
    """A vanilla recurrent layer of Flux 0.15 and later.

    x (in, time) or (in, time, batch) gives (out, time) or (out, time, batch), from a state of
    zeros each time; with `return_state` the last state too. `options` are those of its cell.

    >>> RNN(3, 5)(np.ones((3, 7), np.float32)).shape
    (5, 7)
    """

    cell: Any
    cell_type = RNNCell


@dataclass(init=False, repr=False, eq=False)
class LSTM(_Sequence):
    """A long short-term memory layer of Flux 0.15 and later; shapes as for RNN.

    >>> LSTM(3, 5)
    LSTM(3, 5)
    """

    cell: Any
    cell_type = LSTMCell


@dataclass(init=False, repr=False, eq=False)
class GRU(_Sequence):
    """A gated recurrent layer of Flux 0.15 and later; shapes as for RNN.

    >>> GRU(3, 5)
    GRU(3, 5)
    """

    cell: Any
    cell_type = GRUCell


@dataclass(init=False, repr=False, eq=False)
class GRUv3(_Sequence):
    """A gated recurrent layer of the third version, of Flux 0.15 and later; shapes as for RNN.

    >>> GRUv3(3, 5)
    GRUv3(3, 5)
    """

    cell: Any
    cell_type = GRUv3Cell
