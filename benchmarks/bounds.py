"""What a machine allows: a decode step's matrix products alone, memory bandwidth, large matrix products.

Measured, never looked up. Knows sizes of models and nothing of how this project computes.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import measure, shapes
from ngrpo_jax.model.config import ModelConfig

ORDERS = ("x·W", "x·Wᵀ", "W·x")  # kernels stored [in, out], [out, in], and [out, in] with x as columns


class Products(NamedTuple):
    """A decode step's weight products and nothing else, ready to be timed."""

    run: Callable[[], float]  # seconds of one step
    flops: int  # of one step
    arrangement: str
    tried: dict[str, float]  # arrangement -> seconds of one step, by a first look


def weight_products(config: ModelConfig, rows: int, steps: int) -> Products:
    """The fastest arrangement that was found of one step's weight products, each weight read once.

    Every product of every layer and of the head for `rows` rows, each fed by the one before as in the model:
    no attention, norms, cache or sampling. Six arrangements are tried: three orders of the operands, with
    query, key and value as well as gate and up joined into one matrix or apart.
    """
    tried: dict[tuple[str, bool], float] = {}
    for order, fused in itertools.product(ORDERS, (False, True)):
        run = _products(config, rows, steps, order, fused)
        run()
        tried[order, fused] = min(run() for _ in range(2))
        del run  # its weights, before the next ones are made
    order, fused = min(tried, key=lambda arrangement: tried[arrangement])
    return Products(
        run=_products(config, rows, steps, order, fused),
        flops=2 * rows * shapes.matrix_parameters(config),
        arrangement=_name(order, fused),
        tried={_name(*arrangement): seconds for arrangement, seconds in tried.items()},
    )


def cache_reading(config: ModelConfig, rows: int, tokens: int, passes: int) -> Callable[[], float]:
    """A function that returns the seconds of reading once the keys and values of `tokens` tokens a row.

    A floor for the two products of a step's attention, which multiply each entry once for every query.
    """
    shape = (rows, config.num_kv_heads, tokens, config.head_dim)
    cache = [jnp.ones(shape, config.dtype) for _ in range(2 * config.num_layers)]
    read = jax.jit(lambda arrays: [jnp.sum(array) for array in arrays])
    jax.block_until_ready(read(cache))

    def run() -> float:
        start = time.perf_counter()
        for _ in range(passes):
            jax.block_until_ready(read(cache))
        return (time.perf_counter() - start) / passes

    return run


def copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written, of adding 1 to `size` bytes in place.

    Many times in one program: a call of its own for each would count the time that it takes to start.
    """
    passes = 20
    array = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda _, x: x + 1.0, x), donate_argnums=0)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        array = jax.block_until_ready(add(array))
        seconds.append(time.perf_counter() - start)
    return 2 * passes * array.nbytes / measure.interval(seconds[1:]).median


def product_rate(rows: int, inner: int, columns: int, dtype: str) -> float:
    """Operations a second of [rows, inner] · [inner, columns], float32 in full precision."""
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    left, right = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    jax.block_until_ready(product(left, right))
    seconds = [measure.seconds_of(lambda: product(left, right)) for _ in range(5)]
    return 2 * rows * inner * columns / measure.interval(seconds).median


def _name(order: str, fused: bool) -> str:
    return f"{order} {'joined' if fused else 'apart'}"


def _products(config: ModelConfig, rows: int, steps: int, order: str, fused: bool) -> Callable[[], float]:
    """A function that returns the seconds of one step in one arrangement."""
    weights = _weights(config, order, fused)
    D = config.hidden_size
    first = jnp.ones((D, rows) if order == "W·x" else (rows, D), config.dtype)
    logits = jnp.zeros(
        (config.vocab_size, rows) if order == "W·x" else (rows, config.vocab_size), config.dtype
    )
    chain = functools.partial(_chain, order=order, config=config, steps=steps)
    chain = jax.jit(chain, donate_argnums=2)

    def run() -> float:
        nonlocal logits
        start = time.perf_counter()
        logits = jax.block_until_ready(chain(weights, first, logits))
        return (time.perf_counter() - start) / steps

    return run


def _chain(weights: Any, first: jax.Array, logits: jax.Array, *, order: str, config: ModelConfig, steps: int):
    """`steps` steps; the whole of the logits is carried, so that no product can be left out or cut short."""
    multiply = {
        "x·W": jnp.matmul,
        "x·Wᵀ": lambda x, w: jnp.einsum("bd,fd->bf", x, w),
        "W·x": lambda x, w: w @ x,
    }
    mul, axis = multiply[order], 0 if order == "W·x" else 1
    heads = config.num_heads * config.head_dim
    sizes = [heads, config.num_kv_heads * config.head_dim, config.num_kv_heads * config.head_dim]

    def parts(x: jax.Array, kernels: list[jax.Array], sizes: list[int]) -> list[jax.Array]:
        if len(kernels) > 1:
            return [mul(x, kernel) for kernel in kernels]
        ends = list(itertools.accumulate(sizes))[:-1]
        return jnp.split(mul(x, kernels[0]), ends, axis=axis)

    def step(logits: jax.Array, _: None) -> tuple[jax.Array, None]:
        x = first + 1e-20 * jax.lax.slice_in_dim(logits, 0, config.hidden_size, axis=axis)
        for layer in weights["layers"]:
            q, k, v = parts(x, layer["qkv"], sizes)
            repeats = config.num_heads // config.num_kv_heads
            x = mul(q + jnp.concatenate([k + v] * repeats, axis=axis), layer["o"])
            gate, up = parts(x, layer["gate_up"], [config.intermediate_size] * 2)
            x = mul(gate + up, layer["down"])
        return mul(x, weights["head"]), None

    return jax.lax.scan(step, logits, None, length=steps)[0]


def _weights(config: ModelConfig, order: str, fused: bool) -> Any:
    """Kernels of all layers; deviations such that values neither grow nor vanish along the chain."""
    D, F = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    salts = itertools.count(1)

    def kernel(inputs: int, outputs: int) -> jax.Array:
        shape = (inputs, outputs) if order == "x·W" else (outputs, inputs)
        return _noise(next(salts), shape, 0.8 * inputs**-0.5, config.dtype)

    def layer() -> dict[str, Any]:
        return {
            "qkv": [kernel(D, heads + 2 * kv)] if fused else [kernel(D, n) for n in (heads, kv, kv)],
            "o": kernel(heads, D),
            "gate_up": [kernel(D, 2 * F)] if fused else [kernel(D, F), kernel(D, F)],
            "down": kernel(F, D),
        }

    layers = [layer() for _ in range(config.num_layers)]
    return {"layers": layers, "head": kernel(D, config.vocab_size)}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _noise(salt: int, shape: tuple[int, int], deviation: float, dtype: str) -> jax.Array:
    """Entries of mean 0 that look random enough for a product, at the price of one pass."""
    rows, columns = (jax.lax.iota(jnp.uint32, size) for size in shape)
    bits = (rows[:, None] * jnp.uint32(0x9E3779B1)) ^ (columns[None, :] * jnp.uint32(0x85EBCA77))
    bits = (bits ^ jnp.uint32(salt) ^ (bits >> 15)) * jnp.uint32(0x2C1B3C6D)
    bits = (bits ^ (bits >> 12)) * jnp.uint32(0x297A2D39)
    uniform = (bits ^ (bits >> 15)).astype(jnp.float32) * 2.0**-31 - 1.0
    return (3**0.5 * deviation * uniform).astype(dtype)
