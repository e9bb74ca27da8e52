"""Self-attention of packed rows: which tokens attend to which, and four ways to compute it.

Owns the rule of segments (`Segments`, `attention_mask`), the implementations behind one signature, and the
choice among them. Must not know the layers around it, the rollout's cache, or where rows come from.

    plain    scores of the whole row, [T, T]; for short rows
    chunked  blocks of queries against blocks of keys with a running softmax (blockwise.py): memory grows
             with T, and pairs of blocks without a common segment are skipped
    cudnn    fused attention of NVIDIA GPUs, through jax.nn.dot_product_attention
    splash   the Pallas kernel for TPUs

A token attends to the tokens up to its own position in the row whose segment is its own or its prefix. A
prefix lets several responses in a row share one prompt.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax import choices
from ngrpo_jax.errors import UserError
from ngrpo_jax.model.blockwise import BANDS, BLOCK, MASKED, attends, chunked

SHORT_ROW = 256  # tokens up to which the whole [T, T] is cheaper than blocks
_LANES = 128  # the lengths of rows and heads that splash attention takes are multiples of it
# Queries of a block of splash attention, with as many keys or twice as many: the largest that compile for
# heads of 128 on every TPU. With its own blocks of 128 a row of 12288 takes 56,000 grid steps a layer.
_SPLASH_BLOCK = 512


class Segments(NamedTuple):
    """Segments of rows, int32 [B, T] each.

    Attributes:
      own: each token's segment. Ids rise along the row from 1; 0 is padding, which may be anywhere. The
        output at padding is finite, but has no meaning.
      prefix: the segment that a token attends to besides its own, 0 for none.
    """

    own: Any
    prefix: Any


# (q [B, T, N, H], k [B, T, K, H], v [B, T, K, H], segments) -> [B, T, N, H]
Attend = Callable[[jax.Array, jax.Array, jax.Array, Segments], jax.Array]


def choose(name: str, *, platform: str, row_tokens: int, shared_prefixes: bool, dtype: str) -> str:
    """The implementation that "auto" stands for, or `name` if the machine can run it.

    Args:
      platform: of the devices, as jax.Device.platform has it.
      row_tokens: T.
      shared_prefixes: whether rows use `Segments.prefix`.
      dtype: of queries, keys and values.

    Raises:
      UserError: one sentence naming the setting train.attention.
    """
    fused = dtype != "float32" and row_tokens % 2 == 0  # what cuDNN's backward pass takes
    if name == "auto":
        if row_tokens <= SHORT_ROW:
            return "plain"
        best = {"tpu": "chunked" if shared_prefixes else "splash", "gpu": "cudnn" if fused else "chunked"}
        return best.get(platform, "chunked")
    if name not in choices.ATTENTION:
        raise UserError(f"train.attention is {name!r}; it must be one of {', '.join(choices.ATTENTION)}.")
    needs = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}
    if name in needs and needs[name][0] != platform:
        raise UserError(
            f"train.attention is {name!r}, which needs {needs[name][1]}, but this run is on {platform}; "
            "choose auto, plain or chunked."
        )
    if name == "cudnn" and not fused:
        raise UserError(
            f"train.attention is 'cudnn', which takes bfloat16 and rows of even length, not {dtype} and "
            f"{row_tokens}; choose auto, plain or chunked, or change model.dtype or train.row_tokens."
        )
    if name == "splash" and shared_prefixes:
        raise UserError(
            "train.attention is 'splash', whose kernel cannot let responses share a prompt; set "
            "train.share_prompts to false, or choose chunked."
        )
    return name


def make(name: str, platform: str, *, block: int = BLOCK, interpret: bool = False) -> Attend:
    """The implementation of this name, for the rows and heads of one device.

    Args:
      name: "plain", "chunked", "cudnn" or "splash".
      platform: of the device, as jax.Device.platform has it.
      block: tokens of a block of "chunked".
      interpret: run the kernel of "splash" without a TPU, for tests.
    """
    made: dict[str, Attend] = {
        "plain": plain,
        "chunked": functools.partial(chunked, block=block, width=BANDS[platform]),
        "cudnn": cudnn,
        "splash": functools.partial(splash, interpret=interpret),
    }
    return made[name]


def attention_mask(segments: Segments) -> jax.Array:
    """The rule itself, bool [B, T, T]: whether token t (second axis) attends to token s (third)."""
    own_BT, prefix_BT = segments
    T = own_BT.shape[1]
    return jnp.tril(jnp.ones((T, T), bool))[None] & attends(own_BT, prefix_BT, own_BT)


def plain(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments: Segments) -> jax.Array:
    """Attention by the whole matrix of scores, in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btknh,bskh->bknts", q, k_BTKH, preferred_element_type=jnp.float32)
    scores = jnp.where(attention_mask(segments)[:, None, None], scores * H**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("bknts,bskh->btknh", weights, v_BTKH).reshape(B, T, N, H)


def cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments: Segments) -> jax.Array:
    """cuDNN's fused attention: it never forms the scores; the mask exists once a row, for all heads.

    `is_causal` repeats what the mask says already: with it cuDNN skips the half of the blocks above the
    diagonal.
    """
    mask_B1TT = attention_mask(segments)[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TT, is_causal=True, implementation="cudnn"
    )


def splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments: Segments, *, interpret: bool = False
) -> jax.Array:
    """The TPU kernel, on rows and heads padded to its lanes; it ignores `segments.prefix`."""
    # Imported here: the kernels need Pallas, which a CPU run has no use for.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, N, H = q_BTNH.shape
    block = min(_SPLASH_BLOCK, T + -T % _LANES)
    time, width = -T % block, -H % _LANES

    def pad(x_BTNH: jax.Array) -> jax.Array:
        return jnp.pad(x_BTNH, ((0, 0), (0, time), (0, 0), (0, width))).swapaxes(1, 2)

    causal = masks.MultiHeadMask([masks.CausalMask((T + time, T + time))] * N)
    keys = 2 * block if (T + time) % (2 * block) == 0 else block
    blocks = kernels.BlockSizes(
        block_q=block,
        block_kv=keys,
        block_q_dkv=block,
        block_kv_dkv=keys,
        block_q_dq=block,
        block_kv_dq=keys,
    )
    kernel = kernels.make_splash_mha(
        causal, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    ids_BT = jnp.pad(segments.own, ((0, 0), (0, time)))
    out = jax.vmap(kernel)(
        pad(q_BTNH * H**-0.5), pad(k_BTKH), pad(v_BTKH), kernels.SegmentIds(ids_BT, ids_BT)
    )
    return out.swapaxes(1, 2)[:, :T, :, :H].astype(q_BTNH.dtype)
