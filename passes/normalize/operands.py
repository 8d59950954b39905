"""What an attention operand is made of, read by evaluating its sub-graph: source columns, a factor, a rotation.

Models spell head splitting and rotary embedding in dozens of ways (views, chunks, interleaved or half-split pairs,
complex numbers, partial rotation). All of them are, for one position, q[h, d] = a x[i] cos + b x[j] sin. Feeding the
sub-graph with column numbers instead of activations, with the cosines or the sines switched off, yields i and j
directly, and feeding ones at every position yields the tables.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dscompile.passes.evaluate import NoValue, depends_on, depends_on_tokens, evaluate
from dscompile.passes.graph import ModelGraph

aten = torch.ops.aten

LAYOUT = {
    operator.getitem,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.cat.default,
    aten.stack.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.clone.default,
    aten.contiguous.default,
    aten.new_empty.default,
    aten.slice_scatter.default,
    aten.copy.default,
}
ROTATION = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.neg.default,
    aten.view_as_complex.default,
    aten.view_as_real.default,
}
POSITIONS_PER_CHUNK = 512
_LATEST_ORIGIN = 4


class Unreadable(Exception):
    """The operand is not understood; the message says why."""


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding of each head's first `2 * pairs` canonical columns; tables [max_seq_len, pairs] float32."""

    cos: Tensor
    sin: Tensor

    @property
    def pairs(self) -> int:
        return self.cos.shape[1]


@dataclass(frozen=True)
class Operand:
    """An attention operand [1, H, T, D]: canonical element (h, d) is `scale` * source element `index[h][d]`.

    sources: the nodes behind the layout; their elements are counted row-major at one token, one node after the other.
    Canonical order within a head: first halves of the rotated pairs, second halves, the rest; `order` has each one's
    column in the operand.
    """

    sources: tuple[fx.Node, ...]
    index: tuple[tuple[int, ...], ...]
    scale: float
    rotation: Rotation | None
    order: tuple[int, ...]


class OperandReader:
    """Reads the operands of one graph's attentions; rotary tables are computed once per set of cosines and sines."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self._activations: dict[fx.Node, bool] = {}
        self._positional: dict[fx.Node, bool] = {}
        self._tables: dict[object, Rotation] = {}
        self._changes: dict[fx.Node, int | None] = {}

    def read(self, node: fx.Node) -> Operand:
        """Read an operand of shape [1, H, T, D]; raises Unreadable."""
        sources, frontier = self._boundary(node)
        cosines, sines = self._at_zero(frontier, cosine=True), self._at_zero(frontier, cosine=False)
        one, code = self._ones(sources, 1), self._codes(sources)
        factor = self._run(node, one, cosines)[0, :, 0].double()
        first = self._run(node, code, cosines)[0, :, 0].double() / factor
        index = self._integral(first)
        self._check_selection(node, index, factor, cosines, sources)
        if not frontier:
            return Operand(sources, _rows(index), self._uniform(factor), None, tuple(range(index.shape[1])))
        passing = {n: torch.zeros_like(v) for n, v in sines.items()}
        second, partner_weight = (
            (self._run(node, x, sines) - self._run(node, x, passing))[0, :, 0].double() for x in (code, one)
        )
        order, pairs = self._canonical_order(index, second, partner_weight)
        factor = factor[:, order]
        if not pairs:
            self._check_constant(node, frontier)
            return Operand(sources, _rows(index), self._uniform(factor), None, tuple(range(index.shape[1])))
        scale = self._uniform(factor[:, 2 * pairs :] if 2 * pairs < len(order) else self._unrotated(node, one, cosines))
        rotation = self._rotation(node, sources, frontier, order, pairs, scale)
        return Operand(sources, _rows(index[:, order]), scale, rotation, tuple(order))

    def elements(self, node: fx.Node) -> tuple[fx.Node, Tensor]:
        """(source, element numbers in the node's shape at one token) of a node that only rearranges its source."""
        sources, frontier = self._boundary(node)
        if frontier or len(sources) > 1:
            raise Unreadable(f"{node.name} depends on positions or several activations before its norm")
        self._uniform(self._run(node, self._ones(sources, 1), {}).double(), expected=1.0)
        index = self._integral(self._run(node, self._codes(sources), {}).double())
        self._check_selection(node, index, torch.ones(()), {}, sources)
        return sources[0], index

    def _boundary(self, node: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """The activations the sub-graph starts from, and the tensors it uses that change with the position."""
        sources: list[fx.Node] = []
        frontier: list[fx.Node] = []
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current.target not in LAYOUT | ROTATION:
                sources.append(current)
                continue
            for i in current.all_input_nodes:
                if i in seen:
                    continue
                seen.add(i)
                if depends_on_tokens(self.graph, self._activations, i):
                    stack.append(i)
                elif isinstance(i.meta.get("val"), Tensor) and depends_on(i, {self.graph.positions}, self._positional):
                    frontier += [i] * (self._first_change(i) is not None)
        return tuple(sources), tuple(frontier)

    def _at_zero(self, frontier: tuple[fx.Node, ...], cosine: bool) -> dict[fx.Node, Tensor]:
        """Values at angle 0 with only the cosines (1 or a constant factor) or only the sines (set to 1) left."""
        position = self._origin(frontier)
        values = {}
        for node in frontier:
            value = evaluate(self.graph, node, {self.graph.positions: position, self.graph.tokens: position})
            if value.is_complex():
                one = torch.ones_like(value.real)
                values[node] = torch.complex(one, 0 * one) if cosine else torch.complex(0 * one, one)
            elif bool((value == 0).all()):
                values[node] = torch.zeros_like(value) if cosine else torch.ones_like(value)
            else:
                values[node] = value if cosine else torch.zeros_like(value)
        return values

    def _unrotated(self, node: fx.Node, one: dict[fx.Node, Tensor], cosines: dict[fx.Node, Tensor]) -> Tensor:
        """What columns are multiplied by besides cosines [H, D]."""
        unit = {n: torch.ones_like(v) if bool((v != 0).any()) else v for n, v in cosines.items()}
        return self._run(node, one, unit)[0, :, 0].double()

    def _origin(self, frontier: tuple[fx.Node, ...]) -> Tensor:
        """The position [1, 1] of angle 0, where sines vanish: 0, or less where a model counts from more."""
        for place in range(0, -_LATEST_ORIGIN, -1):
            position = torch.full((1, 1), place)
            given = {self.graph.positions: position, self.graph.tokens: torch.zeros_like(position)}
            if any(bool((evaluate(self.graph, node, given) == 0).all()) for node in frontier):
                return position
        return torch.zeros(1, 1, dtype=torch.long)

    def _ones(self, sources: tuple[fx.Node, ...], num_tokens: int) -> dict[fx.Node, Tensor]:
        """Ones in the sources' shapes at `num_tokens` tokens."""
        return {source: torch.ones(_shape_at(source, num_tokens)) for source in sources}

    def _codes(self, sources: tuple[fx.Node, ...]) -> dict[fx.Node, Tensor]:
        """Element numbers counted from 1, through all sources, in their shapes at one token."""
        codes, start = {}, 1
        for source in sources:
            shape = torch.Size(_shape_at(source, 1))
            codes[source] = torch.arange(start, start + shape.numel(), dtype=torch.float64).reshape(shape)
            start += shape.numel()
        return codes

    def _run(self, node: fx.Node, values: dict[fx.Node, Tensor], frontier: dict[fx.Node, Tensor]) -> Tensor:
        source, value = next(iter(values.items()))
        tokens_dim = [isinstance(s, int) for s in source.meta["val"].shape].index(False)
        inputs = torch.zeros(1, value.shape[tokens_dim], dtype=torch.long)
        given = {self.graph.tokens: inputs, self.graph.positions: inputs, **values, **frontier}
        try:
            return evaluate(self.graph, node, given)
        except NoValue as error:
            raise Unreadable(f"{node.name} is combined with a weight: {error}") from None

    def _check_constant(self, node: fx.Node, frontier: tuple[fx.Node, ...]) -> None:
        """Refuse a factor that depends on the position, up to the longest sequence."""
        if changes := [change for n in frontier if (change := self._first_change(n)) is not None]:
            raise Unreadable(
                f"{node.name} is scaled by position from position {max(changes)} on; "
                f"compile for shorter sequences with --max-seq-len {max(changes)}"
            )

    def _first_change(self, node: fx.Node) -> int | None:
        """The first position at which a tensor [.., T, ..] is not what it is at 0, up to the longest sequence."""
        if node not in self._changes:
            starts = range(0, self.graph.max_seq_len, POSITIONS_PER_CHUNK - 1)
            self._changes[node] = next((c for s in starts if (c := self._change_after(node, s)) is not None), None)
        return self._changes[node]

    def _change_after(self, node: fx.Node, start: int) -> int | None:
        """The first of POSITIONS_PER_CHUNK positions at which a tensor is not what it is at the first of them."""
        positions = torch.arange(start, min(start + POSITIONS_PER_CHUNK, self.graph.max_seq_len))[None]
        given = {self.graph.positions: positions, self.graph.tokens: torch.zeros_like(positions)}
        sizes = [isinstance(s, int) for s in node.meta["val"].shape]
        if all(sizes):
            return None
        value = evaluate(self.graph, node, given).movedim(sizes.index(False), 0)
        changed = (value != value[:1]).flatten(1).any(-1).nonzero().flatten()
        return start + int(changed[0]) if len(changed) else None

    def _check_selection(
        self,
        node: fx.Node,
        index: Tensor,
        factor: Tensor,
        frontier: dict[fx.Node, Tensor],
        sources: tuple[fx.Node, ...],
    ) -> None:
        """Refuse sums: the mean of two element numbers may be a third's, but not that of random values."""
        generator = torch.Generator().manual_seed(0)
        values = {
            source: torch.rand(code.shape, dtype=torch.float64, generator=generator)
            for source, code in self._codes(sources).items()
        }
        found = self._run(node, values, frontier).double().reshape(-1)
        wanted = torch.cat([value.flatten() for value in values.values()])[index].reshape(-1) * factor.reshape(-1)
        if not torch.allclose(found, wanted, rtol=1e-5, atol=1e-6):
            names = ", ".join(source.name for source in sources)
            raise Unreadable(
                f"{node.name} combines {len(sources)} activations ({names}) in other ways than side by side"
            )

    def _canonical_order(self, index: Tensor, second: Tensor, weight: Tensor) -> tuple[list[int], int]:
        """Columns of a head in canonical order, and the number of rotated pairs; the same for every head."""
        rotated = weight != 0
        if bool((rotated != rotated[:1]).any()):
            raise Unreadable("heads are rotated differently")
        columns = rotated[0].nonzero().flatten().tolist()
        partner = torch.where(rotated, second / torch.where(rotated, weight, 1.0), 1.0).round().long() - 1
        firsts, seconds = [], []
        for d in columns:
            if weight[0, d] < 0:
                matches = [e for e in columns if index[0, e] == partner[0, d]]
                if len(matches) != 1 or weight[0, matches[0]] < 0:
                    raise Unreadable("rotary pairs do not match up")
                firsts.append(d)
                seconds.append(matches[0])
        paired = bool(
            (partner[:, firsts] == index[:, seconds]).all() and (partner[:, seconds] == index[:, firsts]).all()
        )
        if not paired or 2 * len(firsts) != len(columns):
            raise Unreadable("rotary pairs do not match up")
        rest = [d for d in range(index.shape[1]) if d not in set(columns)]
        return firsts + seconds + rest, len(firsts)

    def _rotation(
        self,
        node: fx.Node,
        sources: tuple[fx.Node, ...],
        frontier: tuple[fx.Node, ...],
        order: list[int],
        pairs: int,
        scale: float,
    ) -> Rotation:
        key = (frontier, tuple(order), pairs, scale)
        if key not in self._tables:
            chunks = [
                self._tables_for(node, sources, frontier, start, order, pairs)
                for start in range(0, self.graph.max_seq_len, POSITIONS_PER_CHUNK)
            ]
            cos, sin = (torch.cat(parts)[: self.graph.max_seq_len] / scale for parts in zip(*chunks, strict=True))
            self._tables[key] = Rotation(cos.contiguous(), sin.contiguous())
        return self._tables[key]

    def _tables_for(
        self,
        node: fx.Node,
        sources: tuple[fx.Node, ...],
        frontier: tuple[fx.Node, ...],
        start: int,
        order: list[int],
        pairs: int,
    ) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, start + POSITIONS_PER_CHUNK)[None]
        positions = positions.clamp(max=self.graph.max_seq_len - 1)
        given = {self.graph.positions: positions, self.graph.tokens: torch.zeros_like(positions)}
        zero = self._at_zero(frontier, cosine=True)
        only_cos, only_sin = {}, {}
        for n in frontier:
            value = evaluate(self.graph, n, given)
            if value.is_complex():
                only_cos[n] = torch.complex(value.real, torch.zeros_like(value.real))
                only_sin[n] = torch.complex(torch.zeros_like(value.imag), value.imag)
            else:
                is_sine = bool((zero[n] == 0).all())
                only_cos[n] = torch.zeros_like(value) if is_sine else value
                only_sin[n] = value if is_sine else torch.zeros_like(value)
        ones = self._ones(sources, POSITIONS_PER_CHUNK)
        cos = self._run(node, ones, only_cos)[0, 0][:, order]
        sin = self._run(node, ones, only_sin)[0, 0][:, order]
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
        if not torch.equal(cos[:, first], cos[:, second]) or not torch.equal(-sin[:, first], sin[:, second]):
            raise Unreadable("the two halves of a rotary pair turn by different angles")
        rest = cos[:, 2 * pairs :]
        if bool((rest != rest[:1]).any()):
            raise Unreadable("columns outside the rotation depend on positions")
        return cos[:, first].float(), sin[:, second].float()

    @staticmethod
    def _uniform(factor: Tensor, expected: float | None = None) -> float:
        value = factor.flatten()[0].item()
        if bool((factor != value).any()) or (expected is not None and value != expected):
            raise Unreadable("columns are scaled differently")
        return value

    @staticmethod
    def _integral(code: Tensor) -> Tensor:
        index = code.round()
        if not bool(((code - index).abs() < 1e-3).all()) or bool((index < 1).any()):
            raise Unreadable("columns are not a selection of one linear's outputs")
        return index.long() - 1


def _shape_at(source: fx.Node, num_tokens: int) -> list[int]:
    """A source's shape at a number of tokens."""
    shape = [s if isinstance(s, int) else None for s in source.meta["val"].shape]
    if shape.count(None) != 1 or shape[0] != 1:
        raise Unreadable(f"{source.name} has shape {tuple(source.meta['val'].shape)}, not one row per token")
    return [num_tokens if s is None else s for s in shape]


def _rows(index: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in index.tolist())
