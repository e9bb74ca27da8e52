"""The warm start: the small model of `model.path = "warm-start"`, trained on worked solutions before a run.

Owns its size, its examples, and the record of the settings that made it. Must not know when a run needs one.
"""

import pathlib
from typing import Any

from ngrpo_jax import files
from ngrpo_jax.learner.supervised import train_supervised
from ngrpo_jax.model import hf
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.runtime import console
from ngrpo_jax.settings import Settings, WarmStartSettings
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.tasks import arithmetic
from ngrpo_jax.tasks.datasets import Problem

RECIPE = "warm_start.json"  # beside warm_start/: the settings that made it


def warm_start(
    settings: Settings,
    config: ModelConfig,
    tokenizer: Any,
    training: ProblemSet,
    directory: pathlib.Path,
) -> None:
    """Trains the small model on worked solutions of the problems.

    Writes a Hugging Face directory, with the tokenizer's files, and the record of its settings beside it.
    """
    pairs = zip(training.prompts, training.problems, strict=True)
    examples = [(prompt, _worked_ids(tokenizer, problem)) for prompt, problem in pairs]
    with console.Progress("warm start", settings.warm_start.steps, "steps") as progress:
        params = train_supervised(
            config,
            examples,
            settings.warm_start,
            seed=settings.seed,
            progress=lambda done, loss: progress.update(done, f"loss {loss:.3f} nats/token"),
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(directory.parent / RECIPE, recipe(settings))
    hf.save(str(directory), config, params, tokenizer_from=arithmetic.TOKENIZER)


def warm_start_config(settings: WarmStartSettings, tokenizer: Any) -> ModelConfig:
    """A Qwen2 decoder of the size that the settings give, with a vocabulary row for each token."""
    return ModelConfig(
        architecture="qwen2",
        vocab_size=len(tokenizer),
        **settings.select(ModelConfig),
        head_dim=settings.hidden_size // settings.num_heads,
        tie_embeddings=True,
        max_positions=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
    )


def recipe(settings: Settings) -> dict[str, Any]:
    """The settings that a warm start depends on, by dotted name."""
    held_out = ("data.eval", "data.overlap_with", "data.drop_overlap")  # never of an arithmetic problem
    return {
        name: value
        for name, value in files.as_json(settings.leaves()).items()
        if name.startswith(("seed", "data.", "warm_start.")) and name not in held_out
    }


def _worked_ids(tokenizer: Any, problem: Problem) -> list[int]:
    response = tokenizer.encode(arithmetic.worked_response(problem.problem), add_special_tokens=False)
    return [*response, tokenizer.eos_token_id]
