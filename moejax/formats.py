"""Which weights are quantised, and how those that are lie in arrays of bytes."""

from moejax.errors import InputError
from moejax.layout import GROUPS, QUANTISED, MatrixLayout

QUANTS = ("int8", "int4")
# Linear maps: every other dense parameter stays a float. The router decides which experts run and
# is small; one row of the embedding is read per token; norms, biases and the shared expert's gate
# are vectors; MLA's kv_b is used transposed and cut per head, so that its rows are no dot products.
LINEAR = {
    "attention": ("q", "k", "v", "o", "q_a", "q_b", "kv_a"),
    "mlp": ("gate_up", "down"),
    "shared": ("gate_up", "down"),
    "head": ("weight",),
    "experts": ("gate_up", "down"),
}


def quant_format(quant: str | None, group: int = 32) -> str | None:
    """The format of "int8" or "int4" (in groups of 32 or 64 columns); None stays None.

    Raises:
        InputError: neither, or another group.
    """
    if quant is None or quant in QUANTISED:
        return quant
    if quant not in QUANTS:
        raise InputError(f"quant {quant!r:.80} is not one of {', '.join(QUANTS)}")
    if quant == "int8":
        return quant
    for name, columns in GROUPS.items():
        if columns == group:
            return name
    raise InputError(f"group {group!r:.80} is not one of {', '.join(map(str, GROUPS.values()))}")


def parameter_format(path: str, dtype: str, quant: str | None, tied: bool = False) -> str:
    """Format of the parameter at `path`: one of `layout.FORMATS`.

    Args:
        path: "group/name" as in `parameter_shapes`, or "experts/gate_up", "experts/down".
        dtype: format of what is not quantised, "bfloat16" or "float32".
        quant: a quantised format or None.
        tied: the head is the embedding, which stays a float.
    """
    group, name = path.split("/")
    if quant is None or name not in LINEAR.get(group, ()) or (tied and group == "head"):
        return dtype
    # Errors of the head go straight into the logits.
    return "int8" if group == "head" else quant


def matrix_layout(shape: tuple[int, ...], format: str) -> MatrixLayout:
    """Layout of each matrix of a parameter [..., rows, cols]."""
    return MatrixLayout(shape[-2], shape[-1], format)


def held_shape(shape: tuple[int, ...], format: str) -> tuple[int, ...]:
    """Shape in which a parameter is held: a quantised [..., rows, cols] is u8 [..., bytes]."""
    return (*shape[:-2], matrix_layout(shape, format).bytes) if format in QUANTISED else shape
