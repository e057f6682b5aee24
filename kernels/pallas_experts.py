"""Expert FFN over slots as two Pallas kernels, for Triton's part of a GPU backend.

One program multiplies a tile of rows of one expert with all the tokens of one block, so that a
block reads each weight once. Programs of blocks that are not to be computed end at once.

Scalar prefetch does not exist there: a program reads the record's row from a small array.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moejax.kernels import pallas_weights as tiles
from moejax.kernels.reference import Blocks
from moejax.layout import GROUPS, MatrixLayout, RecordLayout

SMALLEST = 16  # sides of a matrix product on tensor cores
MOST_SPREAD = 4  # tokens of a block: beyond, copies cost more products than scales cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """The work of one program, and how Triton compiles it."""

    rows: int  # of the matrix (of gate and of up each)
    step: int  # positions per turn of the loop
    warps: int
    stages: int  # turns whose loads are under way at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Of both kernels; None = `default_tile`."""

    gate_up: Tile | None = None
    down: Tile | None = None


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def default_tile(matrix: MatrixLayout, lanes: "Lanes") -> Tile:
    """A tile for activations in `lanes`: long rows for few columns, square ones for many.

    Few are bound by memory: up to 256 bytes of every row are under way per stage. A warp multiplies
    16 rows; with more warps than that some would repeat the dequantising of others. Stages fit the
    99 KB of shared memory of consumer GPUs.
    """
    few, int4 = lanes.count <= 32 or lanes.spread > 1, matrix.format in GROUPS
    step = {"float32": 32, "bfloat16": 128 if few else 64, "int8": 256 if few else 128}
    step = tiles.CHUNK_BYTES if int4 else step[matrix.format]
    step = min(step, max(_power_of_two(tiles.positions(matrix)), SMALLEST))
    rows = max(min(32 if few else 64, _power_of_two(matrix.rows)), SMALLEST)
    if not few:
        return Tile(rows=rows, step=step, warps=8, stages=2)
    if lanes.count > 32:
        return Tile(rows=rows, step=step, warps=4, stages=4)
    return Tile(rows=rows, step=step, warps=rows // 16, stages=6 if int4 else 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanes:
    """The columns of activations that a program multiplies: copies of tokens, and zeros."""

    tokens: int  # M
    parts: int
    spread: int  # copies of each part: groups of scales, or 1

    @classmethod
    def of(cls, matrix: MatrixLayout, tokens: int) -> "Lanes":
        spread = matrix.format in GROUPS and tokens <= MOST_SPREAD
        groups = tiles.scale_groups(matrix) if spread else 1
        return cls(tokens=tokens, parts=tiles.activation_parts(matrix.format), spread=groups)

    @property
    def copies(self) -> int:
        """Copies of a token that there are."""
        return self.parts * self.spread

    @property
    def groups(self) -> int:
        """Copies that there is room for."""
        return (tiles.LANES if self.parts > 1 else 1) * self.spread

    @property
    def each(self) -> int:
        """Columns of one copy."""
        return max(self.tokens, SMALLEST // self.groups)

    @property
    def count(self) -> int:
        return self.groups * self.each

    def columns(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(copy, token, whether there is one) of each column."""
        lane = jnp.arange(self.count, dtype=jnp.int32)
        copy, token = lane // self.each, lane % self.each
        there = (copy < self.copies) & (token < self.tokens)
        return copy, jnp.minimum(token, self.tokens - 1), there

    def summed(self, products: jax.Array) -> jax.Array:
        """Products [rows, columns] summed over copies: [rows, `each`]."""
        if self.groups == 1:
            return products
        return products.reshape(products.shape[0], self.groups, self.each).sum(axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Product:
    """Dot products of some sets of rows of one record's matrix with activations."""

    matrix: MatrixLayout
    base: int  # element of the record at which the matrix begins
    lanes: Lanes
    tile: Tile
    interpret: bool
    source: Any  # ref [*, R] bits
    at: jax.Array  # the record's row
    sets: list[jax.Array]  # [rows] each
    activations: Any  # ref, flat
    starts: jax.Array  # [columns] where each column's activation begins
    there: jax.Array  # [columns] whether there is one

    def sums(self) -> list[jax.Array]:
        """For each set of rows: [rows, tokens] f32."""
        turns = pl.cdiv(tiles.positions(self.matrix), self.tile.step)
        spread = self.lanes.spread > 1
        zeros = [jnp.zeros((self.tile.rows, self.lanes.count), jnp.float32) for _ in self.sets]

        def turn(i: Any, carry: tuple) -> tuple:
            totals, scales = carry
            # Loads that no product takes are not pipelined, so these begin a turn ahead.
            ahead = self._scales(jnp.minimum(i + 1, turns - 1)) if spread else scales
            sums = self._turn(i * self.tile.step)
            if spread:
                sums = [one * scale for one, scale in zip(sums, scales, strict=True)]
            return [a + b for a, b in zip(totals, sums, strict=True)], ahead

        first = self._scales(0) if spread else []
        totals, _ = jax.lax.fori_loop(0, turns, turn, (zeros, first))
        if self.matrix.format == "int8":
            scales = [self._load(tiles.row_scales, rows) for rows in self.sets]
            totals = [one * scale[:, None] for one, scale in zip(totals, scales, strict=True)]
        return [self.lanes.summed(one) for one in totals]

    def _load(self, load: Any, rows: jax.Array, *more: Any) -> Any:
        return load(self.matrix, self.source, self.at, self.base, rows, *more)

    def _scales(self, chunk: Any) -> list[jax.Array]:
        """[rows, columns] of each set of rows."""
        lanes, height = self.lanes, self.tile.rows
        group = jnp.arange(lanes.spread, dtype=jnp.int32)
        shape = (height, lanes.groups // lanes.spread, lanes.spread, lanes.each)
        return [
            jnp.broadcast_to(
                self._load(tiles.chunk_scales, rows, chunk, group)[:, None, :, None], shape
            ).reshape(height, lanes.count)
            for rows in self.sets
        ]

    def _turn(self, first: Any) -> list[jax.Array]:
        """Products over the positions of one turn."""
        length, step = tiles.positions(self.matrix), self.tile.step
        position = first + jnp.arange(step, dtype=jnp.int32)
        inside = self.there[:, None]
        if length % step:
            inside = inside & (position < length)[None, :]
        inside = jnp.broadcast_to(inside, (self.lanes.count, step))
        how = (first, step, self.lanes.spread > 1, self.interpret)
        weights = [self._load(tiles.weight_tile, rows, *how) for rows in self.sets]
        totals = [None] * len(weights)
        for half in range(len(weights[0])):
            x = plgpu.load(
                self.activations.at[self.starts[:, None] + (half * length + position)[None, :]],
                mask=inside,
                other=jnp.zeros((), self.activations.dtype),
            )
            for i, halves in enumerate(weights):
                for part in halves[half]:
                    product = self._dot(part, x)
                    totals[i] = product if totals[i] is None else totals[i] + product
        return totals

    def _dot(self, weights: jax.Array, x: jax.Array) -> jax.Array:
        exact = jax.lax.Precision.HIGHEST if self.matrix.format == "float32" else None
        dimensions = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(
            weights, x, dimensions, precision=exact, preferred_element_type=jnp.float32
        )


def _rows(program: Any, tile: Tile, limit: int) -> tuple[jax.Array, jax.Array]:
    """The rows of a program, and clamped to those there are."""
    rows = program * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    return rows, jnp.minimum(rows, limit - 1)


def _gate_up(at_ref, tokens_ref, x_ref, source_ref, h_ref, *, layout, lanes, tile, interpret, n):
    """h = silu(gate) * up of one block and some channels, as the down projection takes it."""
    block, program, blocks = pl.program_id(0), pl.program_id(1), pl.num_programs(0)
    at, matrix, down = at_ref[block], layout.matrices["gate_up"], layout.matrices["down"]

    @pl.when(at >= 0)
    def _():
        copy, token, there = lanes.columns()
        held = plgpu.load(tokens_ref.at[block * lanes.tokens + token])
        channels, clamped = _rows(program, tile, layout.expert_width)
        product = _Product(
            matrix=matrix,
            base=_base(layout, "gate_up"),
            lanes=lanes,
            tile=tile,
            interpret=interpret,
            source=source_ref,
            at=at,
            sets=[clamped, clamped + layout.expert_width],
            activations=x_ref,
            starts=(copy * n + held) * tiles.activation_width(matrix),
            there=there,
        )
        gate, up = product.sums()
        y = gate / (1.0 + jnp.exp(-gate)) * up
        # Padded channels of int4 are read: they must be zeros, not what was in memory.
        y = jnp.where((channels < layout.expert_width)[:, None], y, 0.0)
        _store_h(h_ref, y, channels, block, blocks, down, lanes)


def _store_h(h_ref, y, channels, block, blocks, down, lanes):
    """Every copy of y [rows, `each`] f32 where the down projection reads it."""
    width = tiles.activation_width(down)
    place = tiles.place(down, channels)
    column = jnp.arange(lanes.each, dtype=jnp.int32)
    mask = (channels < width)[:, None] & (column < lanes.tokens)[None, :]
    row = block * lanes.tokens + column
    for i, part in enumerate(tiles.split(y, down.format)):
        for group in range(lanes.spread):
            piece = part
            if lanes.spread > 1:
                own = tiles.group_of(down, place) == group
                piece = jnp.where(own[:, None], part, jnp.zeros((), part.dtype))
            first = (i * lanes.spread + group) * blocks * lanes.tokens
            offsets = (first + row)[None, :] * width + place[:, None]
            plgpu.store(h_ref.at[offsets], piece, mask=mask)


def _down(at_ref, h_ref, source_ref, kept_ref, out_ref, *, layout, lanes, tile, interpret):
    """Rows of one block and some channels; what is not computed is what `kept_ref` aliases."""
    del kept_ref
    block, program, blocks = pl.program_id(0), pl.program_id(1), pl.num_programs(0)
    at, matrix = at_ref[block], layout.matrices["down"]

    @pl.when(at >= 0)
    def _():
        copy, token, there = lanes.columns()
        channels, clamped = _rows(program, tile, layout.width)
        row = (copy * blocks + block) * lanes.tokens + token
        product = _Product(
            matrix=matrix,
            base=_base(layout, "down"),
            lanes=lanes,
            tile=tile,
            interpret=interpret,
            source=source_ref,
            at=at,
            sets=[clamped],
            activations=h_ref,
            starts=row * tiles.activation_width(matrix),
            there=there,
        )
        (y,) = product.sums()
        column = jnp.arange(lanes.each, dtype=jnp.int32)
        mask = (channels < layout.width)[:, None] & (column < lanes.tokens)[None, :]
        offsets = (block * lanes.tokens + column)[None, :] * layout.width + channels[:, None]
        plgpu.store(out_ref.at[offsets], y, mask=mask)


def _base(layout: RecordLayout, part: str) -> int:
    return layout.offsets[part] // layout.bits.itemsize


def experts(
    layout: RecordLayout,
    source: jax.Array,
    index: jax.Array,
    blocks: Blocks,
    x: jax.Array,
    rows: jax.Array,
    *,
    interpret: bool,
    tiles_of: Tiles | None = None,
) -> jax.Array:
    """Rows [NB, M, D] with those of the blocks whose expert has a record computed."""
    tiles_of = tiles_of or Tiles()
    count, size = blocks.tokens.shape
    gate_up, down = layout.matrices["gate_up"], layout.matrices["down"]
    lanes = Lanes.of(gate_up, size)
    at = jnp.where(blocks.expert >= 0, index[jnp.maximum(blocks.expert, 0)], -1)
    half = dataclasses.replace(gate_up, rows=layout.expert_width)
    tile = tiles_of.gate_up or default_tile(half, lanes)
    width = tiles.activation_width(down)
    call = functools.partial(pl.pallas_call, interpret=interpret)
    common = {"layout": layout, "lanes": lanes, "interpret": interpret}
    h = call(
        functools.partial(_gate_up, **common, tile=tile, n=x.shape[0]),
        out_shape=jax.ShapeDtypeStruct(
            (lanes.copies * count * size * width,), tiles.activation_dtype(layout.dtype)
        ),
        grid=(count, pl.cdiv(width, tile.rows)),
        compiler_params=_params(tile),
        name="expert_gate_up",
    )(
        at,
        blocks.tokens.reshape(-1),
        tiles.arrange(gate_up, x, lanes.spread > 1).reshape(-1),
        source,
    )
    tile = tiles_of.down or default_tile(down, lanes)
    y = call(
        functools.partial(_down, **common, tile=tile),
        out_shape=jax.ShapeDtypeStruct((rows.size,), rows.dtype),
        grid=(count, pl.cdiv(layout.width, tile.rows)),
        input_output_aliases={3: 0},
        compiler_params=_params(tile),
        name="expert_down",
    )(at, h, source, rows.reshape(-1))
    return y.reshape(rows.shape)


def _params(tile: Tile) -> plgpu.CompilerParams:
    # Named, because plain parameters would choose another backend in some versions of JAX.
    return plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
