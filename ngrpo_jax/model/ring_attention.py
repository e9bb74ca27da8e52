"""Attention of a decode step over the columns that rows hold, and no others: Pallas kernels for TPU and GPU.

Owns which blocks of the ring (cache.py) a step visits, and the kernels that read them. Must not know meshes,
layers, or how a column is written.

The columns of a ring are cut into J blocks of W. A row that holds n tokens is read from the block at the
cursor backwards, round the end of the ring, to the block of its oldest token; the order does not matter to a
softmax, which runs over the blocks in float32.

On a TPU one instance of the kernel after the other visits a block, with all of its heads; the next block is
copied meanwhile. A grid of rows times J would begin an instance for each block that holds nothing, so the
grid is as long as the list of the blocks that hold something, made once a step (`visits`). On a GPU instances
run side by side: each row's blocks are dealt to PARTS instances a head, whose sums are joined at the end.

Letters of this file: Q query heads of a key/value head; J blocks of a ring, W columns of a block; I visits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from ngrpo_jax.model.blockwise import MASKED

# Columns of a block, of which the widest is taken: on a TPU an instance has to take longer to copy its block
# than to begin.
WIDTHS = {"tpu": (512, 256, 128), "gpu": (64,)}
HEAD_DIMS = {"tpu": (64, 128), "gpu": (64, 128)}
PARTS = 8  # instances that share the blocks of a row and a head on a GPU
_LANE = 128  # entries that a TPU keeps side by side
_LEAST_QUERIES = 16  # rows of a product on a GPU's tensor cores

Sums = tuple[jax.Array, jax.Array, jax.Array]  # Σ weight · value [Q, H], largest score and Σ weight [Q, 1]


class Visits(NamedTuple):
    """The blocks that a step reads, row after row, each row's newest block first.

    Attributes:
      count_1: int32, how many there are; entries from there on have no meaning.
      row_I, block_I: int32 [B · J].
    """

    count_1: jax.Array
    row_I: jax.Array
    block_I: jax.Array


def block_width(platform: str, head_dim: int, columns: int) -> int | None:
    """Columns of a block of such a ring; None where no kernel takes it, and plain attention is to be used."""
    return next((width for width in _widths(platform, head_dim) if columns % width == 0), None)


def grain(platform: str, head_dim: int, capacity: int) -> int | None:
    """What the columns of a ring for so many tokens are to be a multiple of; None where no kernel takes any.

    The widest block that wastes at most a sixteenth of a ring, else the narrowest one.
    """
    widths = _widths(platform, head_dim)
    return next((width for width in widths if 16 * width <= capacity), min(widths, default=None))


def _widths(platform: str, head_dim: int) -> tuple[int, ...]:
    return WIDTHS[platform] if head_dim in HEAD_DIMS.get(platform, ()) else ()


def visits(lengths_B: jax.Array, cursor: jax.Array, *, columns: int, width: int) -> Visits:
    """Which blocks hold a token of which row, once the column at the cursor is written as well."""
    blocks = columns // width
    last_B = jnp.cumsum(_held_blocks(lengths_B, cursor, blocks, width))  # visits up to and with the row's
    visit_I = jnp.arange(len(lengths_B) * blocks, dtype=jnp.int32)
    row_I = jnp.searchsorted(last_B, visit_I, side="right", method="compare_all").astype(jnp.int32)
    row_I = jnp.minimum(row_I, len(lengths_B) - 1)
    first_B = jnp.pad(last_B[:-1], (1, 0))
    return Visits(last_B[-1:], row_I, _block_back(visit_I - first_B[row_I], cursor, blocks, width))


def attend(
    q_BKQH: jax.Array,
    keys_BKHS: jax.Array,
    values_BKSH: jax.Array,
    visited: Visits,
    lengths_B: jax.Array,
    cursor: jax.Array,
    *,
    platform: str,
) -> jax.Array:
    """One query per row over the tokens that it holds and the one at the cursor: [B, K, Q, H] as the values.

    Interpreted where the program is compiled for a CPU.

    Args:
      visited: of `visits`, for these lengths and this cursor.
      platform: "tpu" or "gpu", whose kernel is used.
    """
    kernel = _attend_on_tpu if platform == "tpu" else _attend_on_gpu
    compiled, interpreted = (functools.partial(kernel, interpret=interpret) for interpret in (False, True))
    arguments = q_BKQH, keys_BKHS, values_BKSH, visited, lengths_B, cursor
    return jax.lax.platform_dependent(*arguments, cpu=interpreted, default=compiled)


def _block_of(column: jax.Array, width: int) -> jax.Array:
    """The block that a column is in, counted on below 0; a width is a power of 2."""
    return column >> (width.bit_length() - 1)


def _block_back(turn: jax.Array, cursor: jax.Array, blocks: int, width: int) -> jax.Array:
    """A row's blocks from the one at the cursor (turn 0) backwards, round the end of the ring."""
    block = _block_of(cursor, width) - turn
    return jnp.where(block < 0, block + blocks, block)


def _held_blocks(lengths: jax.Array, cursor: jax.Array, blocks: int, width: int) -> jax.Array:
    """How many blocks hold a token of a row; at most each once, though the first may hold both ends."""
    return jnp.minimum(_block_of(cursor, width) - _block_of(cursor - lengths, width) + 1, blocks)


def _held(block: jax.Array, length: jax.Array, cursor: jax.Array, columns: int, width: int) -> jax.Array:
    """bool [1, W]: columns of a block that hold a token, as `cache.valid_columns`."""
    age = cursor - block * width - jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
    return jnp.where(age < 0, age + columns, age) <= length


def _with_block(
    sums: Sums, q_QH: jax.Array, keys_HW: jax.Array, values: jax.Array, held_1W: jax.Array, turned: bool
) -> Sums:
    """The running softmax with one more block; `values` [W, H], or `turned` [H, W]."""
    sum_QH, largest_Q1, weight_Q1 = sums
    scores_QW = jnp.dot(q_QH, keys_HW, preferred_element_type=jnp.float32) * q_QH.shape[1] ** -0.5
    scores_QW = jnp.where(held_1W, scores_QW, MASKED)
    new_Q1 = jnp.maximum(largest_Q1, jnp.max(scores_QW, axis=1, keepdims=True))
    weights_QW, kept_Q1 = jnp.exp(scores_QW - new_Q1), jnp.exp(largest_Q1 - new_Q1)
    products_QH = jax.lax.dot_general(
        weights_QW.astype(values.dtype),
        values,
        (((1,), (1 if turned else 0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    weight_Q1 = weight_Q1 * kept_Q1 + jnp.sum(weights_QW, axis=1, keepdims=True)
    return sum_QH * kept_Q1 + products_QH, new_Q1, weight_Q1


def _attend_on_tpu(
    q_BKQH: jax.Array,
    keys_BKHS: jax.Array,
    values_BKSH: jax.Array,
    visited: Visits,
    lengths_B: jax.Array,
    cursor: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    B, K, Q, H = q_BKQH.shape
    columns = keys_BKHS.shape[3]
    width = columns * B // len(visited.row_I)
    # Heads of fewer entries than a lane has are kept with the columns last by XLA for TPU, whatever the order
    # of the dimensions; in another order the kernel would be given a copy.
    turned = H < _LANE
    values = jnp.swapaxes(values_BKSH, 2, 3) if turned else values_BKSH
    of_row = pl.BlockSpec((1, K, Q, H), lambda i, row_I, block_I, *_: (row_I[i], 0, 0, 0))
    columns_last = pl.BlockSpec((1, K, H, width), lambda i, row_I, block_I, *_: (row_I[i], 0, 0, block_I[i]))
    heads_last = pl.BlockSpec((1, K, width, H), lambda i, row_I, block_I, *_: (row_I[i], 0, block_I[i], 0))
    specs = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(visited.count_1[0],),
        in_specs=[of_row, columns_last, columns_last if turned else heads_last],
        out_specs=of_row,
        scratch_shapes=[pltpu.VMEM((K, Q, last), jnp.float32) for last in (H, 1, 1)],
    )
    return pl.pallas_call(
        functools.partial(_visit_on_tpu, columns=columns, turned=turned),
        out_shape=jax.ShapeDtypeStruct(q_BKQH.shape, values_BKSH.dtype),
        grid_spec=specs,
        interpret=interpret,
        name="ring_attention",
    )(visited.row_I, visited.block_I, lengths_B, cursor[None], q_BKQH, keys_BKHS, values)


def _visit_on_tpu(
    row_I, block_I, lengths_B, cursor_1, q_1KQH, keys_1KHW, values_1K, out_1KQH, *sums_K, columns, turned
) -> None:
    visit, cursor, width = pl.program_id(0), cursor_1[0], keys_1KHW.shape[3]
    block = block_I[visit]

    @pl.when(block == _block_of(cursor, width))  # the first one of the row
    def _() -> None:
        for sums, empty in zip(sums_K, (0.0, MASKED, 0.0), strict=True):
            sums[...] = jnp.full(sums.shape, empty, jnp.float32)

    held_1W = _held(block, lengths_B[row_I[visit]], cursor, columns, width)
    for head in range(q_1KQH.shape[1]):
        of_head = q_1KQH[0, head], keys_1KHW[0, head], values_1K[0, head]
        new = _with_block(tuple(sums[head] for sums in sums_K), *of_head, held_1W, turned)
        for sums, array in zip(sums_K, new, strict=True):
            sums[head] = array
        # Of a row's visits the last one's is kept.
        out_1KQH[0, head] = (new[0] / new[2]).astype(out_1KQH.dtype)


def _attend_on_gpu(
    q_BKQH: jax.Array,
    keys_BKHS: jax.Array,
    values_BKSH: jax.Array,
    visited: Visits,
    lengths_B: jax.Array,
    cursor: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    B, K, Q, H = q_BKQH.shape
    columns = keys_BKHS.shape[3]
    width = columns * B // len(visited.row_I)
    rows = max(_LEAST_QUERIES, pl.next_power_of_2(Q))
    q_BKQH = jnp.pad(q_BKQH, ((0, 0), (0, 0), (0, rows - Q), (0, 0)))

    def of_head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda row, head, part: (row, head, 0, 0))

    def of_part(last: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, rows, last), lambda row, head, part: (row, head, part, 0, 0))

    whole = pl.BlockSpec(memory_space=pl.ANY)
    sums = pl.pallas_call(
        functools.partial(_visit_on_gpu, columns=columns, width=width),
        out_shape=[jax.ShapeDtypeStruct((B, K, PARTS, rows, last), jnp.float32) for last in (H, 1, 1)],
        grid=(B, K, PARTS),
        in_specs=[whole, whole, of_head(rows, H), of_head(H, columns), of_head(columns, H)],
        out_specs=[of_part(last) for last in (H, 1, 1)],
        interpret=interpret,
        name="ring_attention",
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
    )(lengths_B, cursor[None], q_BKQH, keys_BKHS, values_BKSH)
    sum_BKPQH, largest_BKPQ1, weight_BKPQ1 = (array[:, :, :, :Q] for array in sums)
    share_BKPQ1 = jnp.exp(largest_BKPQ1 - jnp.max(largest_BKPQ1, axis=2, keepdims=True))
    sum_BKQH, weight_BKQ1 = (jnp.sum(array * share_BKPQ1, axis=2) for array in (sum_BKPQH, weight_BKPQ1))
    return (sum_BKQH / weight_BKQ1).astype(values_BKSH.dtype)


def _visit_on_gpu(
    lengths_B, cursor_1, q_QH, keys_HS, values_SH, sum_QH, largest_Q1, weight_Q1, *, columns: int, width: int
) -> None:
    blocks, length, cursor = columns // width, lengths_B[pl.program_id(0)], cursor_1[0]
    query_QH, part = q_QH[...], pl.program_id(2)

    def visit(turn: jax.Array, sums: Sums) -> Sums:
        block = _block_back(part + turn * PARTS, cursor, blocks, width)
        at = pl.ds(block * width, width)
        held_1W = _held(block, length, cursor, columns, width)
        return _with_block(sums, query_QH, keys_HS[:, at], values_SH[at, :], held_1W, turned=False)

    turns = (_held_blocks(length, cursor, blocks, width) - part + PARTS - 1) // PARTS
    ones_Q1 = jnp.ones((query_QH.shape[0], 1), jnp.float32)
    empty = jnp.zeros(query_QH.shape, jnp.float32), MASKED * ones_Q1, 0.0 * ones_Q1
    sum_QH[...], largest_Q1[...], weight_Q1[...] = jax.lax.fori_loop(0, turns, visit, empty)
