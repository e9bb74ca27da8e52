"""Self-attention of packed rows: who may see whom, and the ways to compute it.

Owns the rule of visibility (`Segments`), the implementations behind one signature, and the choice among them.
Must not know the layers around it, the rollout's cache, or where rows come from.

    plain    scores of the whole row, [T, T]; for short rows
    chunked  blocks of queries against blocks of keys with a running softmax; blocks in which nobody sees
             anybody are skipped, and the backward pass recomputes what it needs: memory grows with T
    cudnn    fused attention of NVIDIA GPUs, through jax.nn.dot_product_attention
    splash   the Pallas kernel for TPUs

A token sees the tokens up to its own place that are of its own segment or of its prefix segment: so several
responses in a row can share one prompt.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

NAMES = ("plain", "chunked", "cudnn", "splash")
SHORT_ROW = 256  # tokens up to which the whole [T, T] is cheaper than blocks
BLOCK = 64  # tokens of a block of "chunked": on two CPU cores the best of 64 … 192
_LANES = 128  # what splash attention wants rows and heads to be multiples of
_MASKED = float(np.finfo(np.float32).min)


class Segments(NamedTuple):
    """Who sees whom in rows [B, T], int32.

    `own` is each token's segment: ids rise along the row from 1, and 0 is padding, at its end. `prefix`
    is the segment that it sees besides its own, 0 for none. What attention gives at padding has no
    meaning but is finite.
    """

    own: Any
    prefix: Any


Attend = Callable[[jax.Array, jax.Array, jax.Array, Segments], jax.Array]


def choose(name: str, *, platform: str, row_tokens: int, shared_prefixes: bool) -> str:
    """The implementation that "auto" stands for, or `name` if the machine can run it.

    Args:
      platform: of the devices, as jax.Device.platform has it.
      row_tokens: T.
      shared_prefixes: whether rows use `Segments.prefix`.

    Raises:
      ValueError: one sentence naming the setting train.attention.
    """
    if name == "auto":
        if row_tokens <= SHORT_ROW:
            return "plain"
        best = {"tpu": "chunked" if shared_prefixes else "splash", "gpu": "cudnn"}
        return best.get(platform, "chunked")
    if name not in NAMES:
        raise ValueError(f"train.attention is {name!r}; it must be one of auto, {', '.join(NAMES)}.")
    needs = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}
    if name in needs and needs[name][0] != platform:
        raise ValueError(
            f"train.attention is {name!r}, which needs {needs[name][1]}, but this run is on {platform}; "
            "choose auto, plain or chunked."
        )
    if name == "splash" and shared_prefixes:
        raise ValueError(
            "train.attention is 'splash', whose kernel cannot let responses share a prompt; set "
            "train.share_prompts to false, or choose chunked."
        )
    return name


def make(name: str, mesh: Mesh | None = None, *, block: int = BLOCK, interpret: bool = False) -> Attend:
    """attend(q [B, T, N, H], k [B, T, K, H], v [B, T, K, H], segments) -> [B, T, N, H].

    Args:
      name: one of NAMES.
      mesh: where rows are split over data × fsdp and heads over tensor; each device then goes through its own
        rows, and through as many blocks as those need. None: one device.
      block: tokens of a block of "chunked".
      interpret: run the kernel of "splash" without a TPU, for tests.
    """
    if name in ("plain", "cudnn"):
        return plain if name == "plain" else cudnn
    local: Attend = (
        functools.partial(chunked, block=block)
        if name == "chunked"
        else functools.partial(splash, interpret=interpret)
    )
    if mesh is None or mesh.size == 1:
        return local
    heads, rows = P(("data", "fsdp"), None, "tensor", None), P(("data", "fsdp"), None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, Segments(rows, rows)),
        out_specs=heads,
        check_vma=False,  # the loops over blocks differ between devices, and have no collectives
    )


def visible(segments: Segments) -> jax.Array:
    """The rule itself, bool [B, T, T]: whether token t (second axis) sees token s (third)."""
    own_BT, prefix_BT = segments
    T = own_BT.shape[1]
    return jnp.tril(jnp.ones((T, T), bool))[None] & _sees(own_BT, prefix_BT, own_BT)


def plain(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments: Segments) -> jax.Array:
    """Attention by the whole matrix of scores, in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKNH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btknh,bskh->bknts", q_BTKNH, k_BTKH, preferred_element_type=jnp.float32)
    scores = jnp.where(visible(segments)[:, None, None], scores * H**-0.5, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("bknts,bskh->btknh", weights, v_BTKH).reshape(B, T, N, H)


def cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments: Segments) -> jax.Array:
    """cuDNN's fused attention: scores are never formed; the mask is, once a row for all heads."""
    mask_B1TS = visible(segments)[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TS, implementation="cudnn")


def splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments: Segments, *, interpret: bool = False
) -> jax.Array:
    """The TPU kernel, on rows and heads filled up to its lanes; blind to `segments.prefix`."""
    # Imported here: the kernels need Pallas, which a CPU run has no use for.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, N, H = q_BTNH.shape
    time, width = -T % _LANES, -H % _LANES

    def lanes(x_BTNH: jax.Array) -> jax.Array:
        return jnp.pad(x_BTNH, ((0, 0), (0, time), (0, 0), (0, width))).swapaxes(1, 2)

    causal = masks.MultiHeadMask([masks.CausalMask((T + time, T + time))] * N)
    kernel = kernels.make_splash_mha(causal, head_shards=1, q_seq_shards=1, interpret=interpret)
    ids_BT = jnp.pad(segments.own, ((0, 0), (0, time)))
    out = jax.vmap(kernel)(
        lanes(q_BTNH * H**-0.5), lanes(k_BTKH), lanes(v_BTKH), kernels.SegmentIds(ids_BT, ids_BT)
    )
    return out.swapaxes(1, 2)[:, :T, :, :H].astype(q_BTNH.dtype)


def chunked(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments: Segments, *, block: int = BLOCK
) -> jax.Array:
    """Blocks of queries against blocks of keys with a running softmax (arXiv 2205.14135), empty ones skipped.

    The arrays are on one device: loops run over rows, and over as many blocks of keys as each block of
    queries may see. Scores exist for one pair of blocks at a time, forward and backward.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    chex.assert_equal_shape([k_BTKH, v_BTKH])
    block = min(block, T)
    pad = -T % block
    count = (T + pad) // block
    # A block of queries holds, for each key head, the queries of its group one after the other: [K, G·b, H].
    q = _pad_time(q_BTNH, pad).reshape(B, count, block, K, N // K, H)
    q = q.transpose(0, 1, 3, 4, 2, 5).reshape(B, count, K, N // K * block, H)
    k, v = (
        _pad_time(x, pad).reshape(B, count, block, K, H).transpose(0, 1, 3, 2, 4) for x in (k_BTKH, v_BTKH)
    )
    own, prefix = (_pad_time(ids, pad).reshape(B, count, block) for ids in segments)
    out = _blockwise(q, k, v, own, prefix)
    out = out.reshape(B, count, K, N // K, block, H).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(B, T + pad, N, H)[:, :T]


def _pad_time(x_BT: jax.Array, pad: int) -> jax.Array:
    return jnp.pad(x_BT, ((0, 0), (0, pad), *((0, 0),) * (x_BT.ndim - 2)))


def _sees(own_Bt: jax.Array, prefix_Bt: jax.Array, keys_Bs: jax.Array) -> jax.Array:
    """bool [..., t, s]: same segment, or the key's segment is the query's prefix. Padding sees padding."""
    keys = keys_Bs[..., None, :]
    return (own_Bt[..., None] == keys) | ((prefix_Bt[..., None] == keys) & (keys > 0))


def _needed_blocks(own: jax.Array, prefix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each block of queries the blocks of keys that it may see: (indices [B, n, n], how many [B, n]).

    Ids rise along the row, so a block's segments lie between its least and its largest; ranges that do not
    overlap have nothing to say to each other. Blocks of padding alone need none.
    """
    count = own.shape[1]
    last = jnp.iinfo(jnp.int32).max
    low, high = jnp.min(jnp.where(own > 0, own, last), axis=2), jnp.max(own, axis=2)
    prefix_low, prefix_high = jnp.min(jnp.where(prefix > 0, prefix, last), axis=2), jnp.max(prefix, axis=2)

    def overlap(from_Bn: jax.Array, to_Bn: jax.Array) -> jax.Array:
        return (from_Bn[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= to_Bn[:, :, None])

    causal = jnp.tril(jnp.ones((count, count), bool))[None]
    needed = causal & (overlap(low, high) | overlap(prefix_low, prefix_high))
    return jnp.argsort(~needed, axis=2, stable=True), jnp.sum(needed, axis=2)


def _scores(q: jax.Array, k: jax.Array, own, prefix, keys, i: jax.Array, j: jax.Array) -> jax.Array:
    """float32 [K, G·b, b] of one pair of blocks, masked."""
    K, queries, H = q.shape
    block = own.shape[0]
    scores = jnp.einsum("kqh,kth->kqt", q, k, preferred_element_type=jnp.float32) * H**-0.5
    places = jnp.arange(block)
    earlier = (i * block + places)[:, None] >= (j * block + places)[None, :]
    mask = earlier & _sees(own, prefix, keys)
    scores = scores.reshape(K, queries // block, block, block)
    return jnp.where(mask[None, None], scores, -jnp.inf).reshape(K, queries, block)


@jax.custom_vjp
def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array, prefix: jax.Array) -> jax.Array:
    return _blockwise_forward(q, k, v, own, prefix)[0]


def _blockwise_forward(q, k, v, own, prefix):
    """q [B, n, K, G·b, H], k and v [B, n, K, b, H], ids [B, n, b] -> (out like q, what backward needs)."""
    order, needed = _needed_blocks(own, prefix)
    B, count, K, queries, H = q.shape

    def of_block(_, index):
        row, i = index // count, index % count

        def step(n, carry):
            high, total, out = carry
            j = order[row, i, n]
            scores = _scores(q[row, i], k[row, j], own[row, i], prefix[row, i], own[row, j], i, j)
            higher = jnp.maximum(high, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(high - higher)
            add = jnp.einsum(
                "kqt,kth->kqh", weights.astype(v.dtype), v[row, j], preferred_element_type=jnp.float32
            )
            return higher, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + add

        # Starting from a finite least score keeps queries that see nothing in a block free of inf - inf.
        start = (
            jnp.full((K, queries), _MASKED),
            jnp.zeros((K, queries)),
            jnp.zeros((K, queries, H), jnp.float32),
        )
        high, total, out = jax.lax.fori_loop(0, needed[row, i], step, start)
        total = jnp.where(total > 0, total, 1.0)
        return None, ((out / total[..., None]).astype(q.dtype), high + jnp.log(total))

    _, (out, log_total) = jax.lax.scan(of_block, None, jnp.arange(B * count))
    out, log_total = out.reshape(q.shape), log_total.reshape(B, count, K, queries)
    return out, (q, k, v, own, prefix, out, log_total)


def _blockwise_backward(saved, grad):
    q, k, v, own, prefix, out, log_total = saved
    order, needed = _needed_blocks(own, prefix)
    B, count, K, queries, H = q.shape
    inner = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # of Σ_s weight · d weight

    def of_block(to_keys_values, index):
        row, i = index // count, index % count

        def step(n, carry):
            to_q, to_k, to_v = carry
            j = order[row, i, n]
            scores = _scores(q[row, i], k[row, j], own[row, i], prefix[row, i], own[row, j], i, j)
            weights = jnp.exp(scores - log_total[row, i][..., None])
            to_weights = jnp.einsum(
                "kqh,kth->kqt", grad[row, i], v[row, j], preferred_element_type=jnp.float32
            )
            to_scores = (weights * (to_weights - inner[row, i][..., None]) * H**-0.5).astype(q.dtype)

            def of_keys(x, y):
                return jnp.einsum("kqt,kqh->kth", x, y, preferred_element_type=jnp.float32)

            to_q += jnp.einsum("kqt,kth->kqh", to_scores, k[row, j], preferred_element_type=jnp.float32)
            to_k = to_k.at[row, j].add(of_keys(to_scores, q[row, i]))
            to_v = to_v.at[row, j].add(of_keys(weights.astype(q.dtype), grad[row, i]))
            return to_q, to_k, to_v

        start = (jnp.zeros((K, queries, H), jnp.float32), *to_keys_values)
        to_q, *to_keys_values = jax.lax.fori_loop(0, needed[row, i], step, start)
        return tuple(to_keys_values), to_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (to_k, to_v), to_q = jax.lax.scan(of_block, (zeros, zeros), jnp.arange(B * count))
    return to_q.reshape(q.shape), to_k.astype(k.dtype), to_v.astype(v.dtype), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
