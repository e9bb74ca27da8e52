"""`evaluate --prompt`: responses to one prompt, printed with their mixed tokens marked."""

import numpy as np

from ngrpo_jax.errors import require
from ngrpo_jax.runtime import console
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.policy import (
    EVAL_STREAM,
    Policy,
    evaluation_mixes,
    evaluation_request,
    sequence_keys,
    write_responses,
)
from ngrpo_jax.tasks import prompts


def print_responses(settings: Settings, policy: Policy, text: str, step: int) -> None:
    """Prints `eval.samples` responses of the checkpoint of `step` to `text`."""
    tokenizer, data = policy.tokenizer_info.tokenizer, settings.data
    chat = data.chat_template, data.system_prompt, data.template_options
    prompt = prompts.encode_prompt(tokenizer, prompts.user_text(text, data.prompt), *chat)
    require(
        len(prompt) <= data.max_prompt_tokens,
        f"--prompt has {len(prompt)} tokens, more than data.max_prompt_tokens = {data.max_prompt_tokens}.",
    )
    request = evaluation_request(policy, settings)
    keys_B = sequence_keys(settings.seed, EVAL_STREAM, np.arange(request.samples))
    with console.Progress("response", request.samples, "sequences", keep=False) as progress:
        trajectories = write_responses(policy, request, [prompt], keys_B, progress=progress)
    on = f"mixing on (rate {settings.mixing.rate}; mixed tokens ⟦so⟧)"
    mixing = on if evaluation_mixes(settings) else "mixing off"
    print(f"step {step}, temperature {request.sampling.temperature}, {mixing}")
    print(f"prompt: {tokenizer.decode(prompt)}")
    for index in range(request.samples):
        tokens = trajectories.response(index)
        ended = "" if trajectories.stopped_B[index] else ", cut off at eval.max_new_tokens"
        print(f"\n--- response {index + 1} ({len(tokens)} tokens{ended})")
        print(prompts.marked_text(tokenizer, tokens, trajectories.mixed_BT[index, : len(tokens)]))
