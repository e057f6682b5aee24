"""A weight in its stack over layers, so that kernels can read it where it lies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moejax.layout import CHUNK_COLUMNS, CHUNK_WORDS, DTYPES, GROUPS, MatrixLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A matrix [rows, cols] or a vector [cols], alone or as one layer of a stack."""

    data: jax.Array  # [layers, ...] in the held type, or [...] without a layer
    layer: jax.Array | None = None  # [] i32
    layout: MatrixLayout = dataclasses.field(metadata={"static": True})
    vector: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def format(self) -> str:
        """One of `layout.FORMATS`."""
        return self.layout.format

    def at(self, layer: jax.Array) -> "Weight":
        """The weight of one layer of the stack."""
        return dataclasses.replace(self, layer=layer)

    def array(self) -> jax.Array:
        """The weight as floats [rows, cols] or [cols]; f32 if it is quantised."""
        data = self.data
        if self.layer is not None:
            data = jax.lax.dynamic_index_in_dim(data, self.layer, keepdims=False)
        floats = decode(self.layout, data)
        return floats.reshape(self.layout.cols) if self.vector else floats


def decode(layout: MatrixLayout, data: jax.Array) -> jax.Array:
    """The floats [rows, cols] of a matrix held as bits (or already as floats)."""
    shape = (layout.rows, layout.cols)
    if not layout.quantised:
        dtype = jnp.dtype(DTYPES[layout.format])
        return jax.lax.bitcast_convert_type(data, dtype).reshape(shape)
    data = data.reshape(-1)
    weights = jax.lax.slice(data, (0,), (layout.rows * layout.row_bytes,))
    scales = _scales(layout, data)
    if layout.format == "int8":
        whole = jax.lax.bitcast_convert_type(weights, jnp.int8).reshape(shape)
        return whole.astype(jnp.float32) * scales
    chunks = layout.columns // CHUNK_COLUMNS
    words = weights.reshape(layout.rows, chunks, CHUNK_WORDS, 4)
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)[:, :, None]
    shifts = jnp.arange(8, dtype=jnp.uint32)[:, None] * 4
    whole = ((words >> shifts) & 15).astype(jnp.float32) - 8
    grouped = whole.reshape(layout.rows, -1, GROUPS[layout.format]) * scales[:, :, None]
    return grouped.reshape(layout.rows, -1)[:, : layout.cols]


def _scales(layout: MatrixLayout, data: jax.Array) -> jax.Array:
    """[rows, scales per row] f32."""
    size = layout.rows * layout.scale_row_bytes
    part = jax.lax.slice(data, (layout.scales_at,), (layout.scales_at + size,))
    part = part.reshape(layout.rows, layout.scales_per_row, np.dtype(layout.scale_dtype).itemsize)
    return jax.lax.bitcast_convert_type(part, jnp.dtype(layout.scale_dtype)).astype(jnp.float32)
