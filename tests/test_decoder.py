"""The decoder against transformers' logits, against NumPy, and against itself, however it is run."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.algo.mixture import Mixture, embed, one_hot
from ngrpo_jax.model import decoder, hf, hf_weights, layers
from ngrpo_jax.model.config import ModelConfig, RopeScaling

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("qwen2_tied", "qwen2_untied", "qwen3", "llama", "llama_llama3", "llama_tied")
CLOSE = 5e-5  # of logits up to 20, where float32 rounding alone makes about 1e-5
every_architecture = pytest.mark.parametrize("name", NAMES)


@functools.cache
def golden(name):
    """(config, params, ids [2, T], logits [2, T, V]) of one golden directory."""
    config, params = hf.load(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")
    return config, params, expected["ids"], expected["logits"]


def largest(difference):
    return float(np.max(np.abs(difference)))


forward = jax.jit(decoder.forward, static_argnums=1)
hidden_states = jax.jit(decoder.hidden_states, static_argnums=1)


@every_architecture
def test_logits_equal_those_of_transformers(name):
    config, params, ids, logits = golden(name)
    got = forward(params, config, ids)
    assert got.dtype == jnp.float32
    assert largest(got - logits) <= CLOSE


@every_architecture
def test_unstacked_layers_give_the_logits_of_stacked_ones(name):
    config, params, ids, _ = golden(name)
    unstacked = decoder.unstack_layers(params)
    assert len(unstacked["layers"]) == config.num_layers
    assert decoder.unstack_layers(unstacked) is unstacked
    assert largest(forward(unstacked, config, ids) - forward(params, config, ids)) <= 1e-5


def test_packed_segments_equal_separate_rows():
    config, params, ids, logits = golden("llama_llama3")
    packed = np.concatenate([ids[:1, :7], ids[1:, :9], np.full((1, 4), 5)], axis=1)
    segments = np.array([[1] * 7 + [2] * 9 + [0] * 4])
    expected = np.concatenate([logits[0, :7], logits[1, :9]])
    restarted = np.array([[*range(7), *range(9), 0, 0, 0, 0]])
    # Rotary angles matter through differences of positions alone, so both numberings must do.
    for positions in (None, restarted):
        got = forward(params, config, packed, positions_BT=positions, segment_ids_BT=segments)
        assert largest(got[0, :16] - expected) <= CLOSE
        assert np.all(np.isfinite(got))


def test_padding_changes_nothing_wherever_it_stands():
    config, params, ids, logits = golden("qwen3")
    for left in (0, 3, 6):
        segments = np.zeros((1, 16), np.int32)
        segments[:, left : left + 10] = 1
        for filler in (0, 77):
            padded = np.full((1, 16), filler)
            padded[:, left : left + 10] = ids[:1, :10]
            got = forward(params, config, padded, segment_ids_BT=segments)
            assert largest(got[0, left : left + 10] - logits[0, :10]) <= CLOSE
            assert np.all(np.isfinite(got))


def test_an_output_depends_on_no_later_and_no_foreign_input():
    config, params, ids, _ = golden("qwen2_tied")
    segments = np.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    table = params["embed"]["embedding"]
    places = jnp.arange(8)[
        None
    ]  # every position has an embedding row of its own, so gradients tell them apart
    inputs = jnp.asarray(np.asarray(table)[ids[0, :8]])

    def output(inputs_TD, t):
        mine = params | {"embed": {"embedding": inputs_TD}}
        return hidden_states(mine, config, places, segment_ids_BT=segments)[0, t].sum()

    gradient_of = jax.jit(jax.grad(output))
    for t, seen in ((1, {0, 1}), (2, {0, 1, 2}), (4, {3, 4}), (5, {3, 4, 5})):
        gradient = gradient_of(inputs, t)
        assert set(np.flatnonzero(np.any(gradient != 0, axis=1))) == seen


@pytest.mark.parametrize(
    ("layout", "remat"), [("stacked", "full"), ("stacked", "dots"), ("unstacked", "full")]
)
def test_rematerialisation_changes_no_gradient(layout, remat):
    expected, got = gradients("stacked", "none"), gradients(layout, remat)
    if layout == "unstacked":
        expected = decoder.unstack_layers(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


@functools.cache
def gradients(layout, remat):
    config, params, ids, _ = golden("qwen2_untied")
    params = params if layout == "stacked" else decoder.unstack_layers(params)

    def loss(params):
        return jnp.square(decoder.hidden_states(params, config, ids[:, :8], remat=remat)).mean()

    return jax.jit(jax.grad(loss))(params)


def test_rematerialisation_recomputes_what_it_says():
    config, params, ids, _ = golden("qwen2_untied")

    def products(remat):
        loss = lambda params: decoder.hidden_states(params, config, ids, remat=remat).sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products("none") < products("dots") < products("full")


def test_an_unknown_remat_is_refused_by_name():
    config, params, ids, _ = golden("llama")
    with pytest.raises(ValueError, match="unknown remat 'some'; known: none, full, dots"):
        decoder.hidden_states(params, config, ids, remat="some")


def test_one_hot_mixtures_equal_ids():
    config, params, ids, _ = golden("qwen3")
    assert np.array_equal(forward(params, config, one_hot(ids, 3)), forward(params, config, ids))


def test_a_mixture_equals_its_embedding_and_reaches_every_row_of_the_table():
    config, params, _, _ = golden("qwen2_untied")
    mixture = Mixture(jnp.array([[[4, 9, 30], [7, 7, 50]]]), jnp.array([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]]))
    rows = embed(params["embed"]["embedding"], mixture)[0]
    expected = forward(params | {"embed": {"embedding": rows}}, config, jnp.arange(2)[None])
    assert largest(forward(params, config, mixture) - expected) <= CLOSE

    def loss(table):
        return forward(params | {"embed": {"embedding": table}}, config, mixture)[0, 0].sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(params["embed"]["embedding"]))
    assert set(np.flatnonzero(np.any(gradient != 0, axis=1))) == {4, 9, 30}
    np.testing.assert_allclose(gradient[9] / 0.3, gradient[4] / 0.5, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient[30] / 0.2, gradient[4] / 0.5, rtol=1e-5, atol=1e-6)


def test_rotation_equals_multiplication_of_complex_numbers():
    config = ModelConfig("llama", 10, 8, 8, 1, 1, 1, head_dim=8, rope_theta=100.0)
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 9, 100, 3, 0]])
    angles = positions[..., None] * 100.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, :, None]
    got = layers.rotate(jnp.asarray(x), layers.rope_angles(config, jnp.asarray(positions)))
    assert largest(got - np.concatenate([turned.real, turned.imag], axis=-1)) <= CLOSE


def test_llama3_frequencies_band_by_band():
    plain = ModelConfig("llama", 10, 8, 8, 1, 1, 1, head_dim=64, rope_theta=500000.0)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    before, after = layers.inverse_frequencies(plain), layers.inverse_frequencies(scaled)
    bands = set()
    for old, new in zip(before.astype(float), after, strict=True):
        wavelength = 2 * np.pi / old
        if wavelength < 8192 / 4:
            band, expected = "kept", old
        elif wavelength > 8192 / 1:
            band, expected = "stretched", old / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            band, expected = "between", (1 - smooth) * old / 8 + smooth * old
        bands.add(band)
        assert np.isclose(new, expected, rtol=1e-6)
    assert bands == {"kept", "stretched", "between"}


def test_rms_norm_in_float32_whatever_comes_in():
    x = (100 * np.random.default_rng(0).normal(size=(3, 16))).astype(np.float32)
    scale = np.linspace(0.5, 2, 16).astype(np.float32)
    x16 = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(x16, np.float64)
    exact = exact / np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-2) * scale
    got = layers.RMSNorm(1e-2, "float32").apply({"params": {"scale": scale}}, x16)
    assert largest(got - exact) <= 1e-6
    assert layers.RMSNorm(1e-2, "bfloat16").apply({"params": {"scale": scale}}, x).dtype == jnp.bfloat16


def test_bfloat16_products_with_float32_parameters_and_logits():
    config, params, ids, logits = golden("qwen2_tied")
    config = dataclasses.replace(config, dtype="bfloat16")
    got = forward(params, config, ids)
    assert got.dtype == jnp.float32
    assert 1e-4 < largest(got - logits) < 0.1 * largest(logits)


def _deviation(name, config):
    """1/sqrt(inputs), and less by sqrt(2 L) where the product is added to the residual stream."""
    if "'o'" in name:
        return (2 * config.num_layers * config.num_heads * config.head_dim) ** -0.5
    if "'down'" in name:
        return (2 * config.num_layers * config.intermediate_size) ** -0.5
    return config.hidden_size**-0.5


def test_fresh_parameters_have_the_layout_and_scale_promised():
    config = ModelConfig("qwen2", 300, 64, 96, 3, 4, 2, 16)
    params = decoder.init(jax.random.key(0), config)
    tied = dataclasses.replace(config, architecture="qwen3", tie_embeddings=True)
    hf_weights.check_params(config, params)
    hf_weights.check_params(tied, jax.eval_shape(lambda: decoder.init(jax.random.key(0), tied)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        leaf = np.asarray(leaf)
        assert leaf.dtype == np.float32
        if "scale" in name:
            assert np.all(leaf == 1)
        elif "bias" in name:
            assert np.all(leaf == 0)
        else:
            assert abs(np.std(leaf) / _deviation(name, config) - 1) < 0.1, name
    query = params["layers"]["attention"]["q"]["kernel"]
    assert largest(query[0] - query[1]) > 0.01
    other = decoder.init(jax.random.key(1), config)["layers"]["attention"]["q"]["kernel"]
    assert largest(query - other) > 0.01


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architecture": "gpt2"}, "unknown architecture 'gpt2'; known: qwen2, qwen3, llama"),
        ({"num_kv_heads": 4}, r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_layers": 0}, "num_layers must be at least 1, not 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(change, sentence):
    config = golden("llama")[0]
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(config, **change)


def test_a_rope_scaling_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="factor must be above 0, not 0"):
        RopeScaling(0.0, 1.0, 4.0, 8192)
    with pytest.raises(ValueError, match="must hold, not 4"):
        RopeScaling(8.0, 4.0, 1.0, 8192)


def test_layers_written_out_compute_each_angle_once():
    """In the gradient as well: XLA does not compute cosines anew in every layer and head."""
    config, params = hf.load(GOLDEN / "qwen2_tied")

    @jax.jit
    @jax.grad
    def gradient(params):
        return decoder.hidden_states(params, config, jnp.arange(8)[None], unroll=True).sum()

    program = gradient.lower(params).compile().as_text()
    assert program.count(" cosine(") == program.count(" sine(") == 1
