"""The base models of a task: small decoders trained on solutions of its training problems, to partial skill.

A base is a function of the task, the settings of `warm_start` and its number alone, so that one which is
missing is made again as it was. Must not know arms.
"""

import dataclasses
import hashlib
import json
import pathlib
import random

from benchmarks.study import search, spelling
from benchmarks.study.tasks import Search, Task
from ngrpo_jax import files
from ngrpo_jax.learner.supervised import train_supervised
from ngrpo_jax.model import hf
from ngrpo_jax.runtime import console
from ngrpo_jax.settings import WarmStartSettings
from ngrpo_jax.setup.warm_start import warm_start_config
from ngrpo_jax.tasks import prompts

EXAMPLES = 32768  # worked solutions of a base, drawn with replacement


def base_directory(task: Task, settings: WarmStartSettings, number: int, work: pathlib.Path) -> pathlib.Path:
    """The Hugging Face directory of a base model, which is trained first where it is missing."""
    assert task.search is not None
    recipe = files.as_json([dataclasses.asdict(settings), dataclasses.asdict(task.search), EXAMPLES])
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    directory = work / "bases" / f"{task.name}-{digest}-{number}"
    if not directory.is_dir():
        _make(task.search, settings, number, directory)
    return directory


def _make(task: Search, settings: WarmStartSettings, number: int, directory: pathlib.Path) -> None:
    words = directory.parent / f"{directory.name}-tokenizer"
    spelling.write_tokenizer(task.language, words)
    tokenizer = prompts.load_tokenizer(words)
    config = warm_start_config(settings, tokenizer)
    with console.Progress(f"base {directory.name}", settings.steps, "steps") as progress:
        params = train_supervised(
            config,
            worked_examples(task, EXAMPLES, number),
            settings,
            seed=number,
            progress=lambda done, loss: progress.update(done, f"loss {loss:.3f} nats/token"),
        )
    hf.save(directory, config, params, tokenizer_from=words)


def worked_examples(task: Search, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of problems that are not held out; a response is a random solution."""
    rng = random.Random(f"warm-up {seed}")
    ids = {word: at for at, word in enumerate(task.language.vocabulary)}
    end = ids[spelling.SPECIAL[1]]
    found = list[tuple[list[int], list[int]]]()
    while len(found) < count:
        problem, steps = search.play(task.family, rng)
        if not problem.held_out:
            prompt, response = task.prompt(problem, rng).split(), task.response(steps, rng).split()
            found.append(([ids[word] for word in prompt], [*(ids[word] for word in response), end]))
    return found
