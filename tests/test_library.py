"""The names that a notebook uses: no jax before it is needed, the documented example, the loss by hand."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngrpo_jax as ng
from ngrpo_jax.tasks import arithmetic

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a small random model and the tokenizer of the arithmetic task."""
    from ngrpo_jax.model import decoder
    from ngrpo_jax.model.config import ModelConfig

    tokenizer = ng.load_tokenizer(arithmetic.TOKENIZER)
    config = ModelConfig("qwen2", len(tokenizer), 16, 32, 2, 4, 2, 4, eos_token_ids=(tokenizer.eos_token_id,))
    params = decoder.init(jax.random.key(0), config)
    folder = tmp_path_factory.mktemp("model") / "export"
    ng.save(str(folder), config, params, tokenizer_from=arithmetic.TOKENIZER)
    return folder


def test_importing_the_package_imports_no_jax():
    code = "import ngrpo_jax, sys; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ng.__all__:
        assert callable(getattr(ng, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ng.nothing()


def test_the_documented_example_runs(model, capsys):
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    example = re.search("```python\n(.*?)```", text, re.DOTALL)[1].replace("runs/tiny/export", str(model))
    statements = [line for line in example.splitlines() if line.strip() and not line.startswith((" ", ")"))]
    assert len(statements) <= 15
    names = {}
    exec(example, names)
    assert np.isfinite(names["loss"])
    assert "MixedToken(" in capsys.readouterr().out
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(names["gradient"])]
    assert all(map(np.isfinite, norms))


def test_the_loss_is_the_policy_gradient_of_the_first_step(model):
    """By hand: the ratio is 1, so the loss is minus the mean advantage of the responses, and its gradient is
    that of minus the mean over responses of A times the mean log-probability of its tokens."""
    config, params = ng.load(str(model))
    prompts, rewards = [[3, 4, 5], [6, 7]], [[1.0, 0.0], [0.0, 1.0]]
    sampled = ng.generate(
        params,
        config,
        prompts,
        samples=2,
        max_new_tokens=5,
        temperature=0.8,
        stop_ids=(),
        mixing=ng.Mixing(rate=0.5),
    )
    assert sampled.mixed_BT.any()
    loss, gradient = jax.value_and_grad(ng.grpo_loss)(
        params, config, prompts, sampled, rewards, temperature=0.8
    )
    advantages_B = np.array([1, -1, -1, 1]) * 0.5 / (np.sqrt(0.5) + 1e-6)
    assert float(loss) == pytest.approx(-advantages_B.mean(), abs=1e-5)

    from ngrpo_jax.algo.mixture import Mixture, one_hot
    from ngrpo_jax.model import decoder

    def by_hand(params):
        total = 0.0
        for index, advantage in enumerate(advantages_B):
            prompt = one_hot(np.array(prompts[index // 2], np.int32), 3)
            own = sampled.mixtures
            fed = Mixture(
                jnp.concatenate([prompt.ids, own.ids[index, :-1]])[None],
                jnp.concatenate([prompt.weights, own.weights[index, :-1]])[None],
            )
            length = fed.ids.shape[1]
            hidden = decoder.hidden_states(
                params,
                config,
                fed,
                positions_BT=jnp.arange(length)[None],
                segment_ids_BT=jnp.ones((1, length), int),
            )
            logits = hidden[0] @ decoder.head(params, config).T / 0.8
            start = len(prompts[index // 2]) - 1
            chosen = jax.nn.log_softmax(logits)[start + np.arange(5), sampled.tokens_BT[index]]
            total -= advantage * chosen.mean() / 4
        return total

    for ours, expected in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(jax.jit(jax.grad(by_hand))(params)), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-6)


def test_what_the_loss_cannot_do_is_said(model):
    config, params = ng.load(str(model))
    sampled = ng.generate(params, config, [[3]], samples=2, max_new_tokens=2, temperature=1.0, stop_ids=())
    with pytest.raises(ValueError, match=r"need \[prompts, samples\]"):
        ng.grpo_loss(params, config, [[3]], sampled, [1.0, 0.0], temperature=1.0)
    with pytest.raises(ValueError, match="give reference="):
        ng.grpo_loss(
            params, config, [[3]], sampled, [[1.0, 0.0]], temperature=1.0, objective=ng.ObjectiveSettings()
        )
    rewarded = ng.grpo_loss(params, config, [[3]], sampled, [[1.0, 0.0]], temperature=1.0, reference=params)
    assert np.isfinite(rewarded)
