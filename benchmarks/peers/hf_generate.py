"""Hugging Face `generate` as a peer: requests as JSON lines on stdin, answers as JSON lines on stdout.

Runs in an environment of its own (pip install torch transformers), started by benchmarks/peer.py.

    {"op": "load", "model": DIRECTORY, "threads": 2}
    {"op": "generate", "prompts": [[ids], ...], "samples": 4, "lengths": [...], "batch": 32,
     "temperature": 1.0, "seed": 0, "tokens": false}

`lengths`, prompt-major, forces every response's length. A row of a batch that has reached its own idles until
the longest has, which is how generate treats sequences that have ended.
"""

import resource
import time

import torch
import transformers
from answering import answer_requests


class OwnLengths(transformers.StoppingCriteria):
    """Ends each row at its own number of new tokens."""

    def __init__(self, prompt_tokens: int, lengths: list[int]) -> None:
        self._ends = prompt_tokens + torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """bool [rows]: which have ended."""
        return input_ids.shape[1] >= self._ends


class HuggingFace:
    """The model that was loaded, and what can be asked of it."""

    def load(self, model: str, threads: int) -> dict:
        """Loads a directory in float32; answers with versions and the number of parameters."""
        torch.set_num_threads(threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None
        count = sum(parameter.numel() for parameter in self._model.parameters())
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {**versions, "parameters": count, "threads": torch.get_num_threads()}

    def generate(
        self,
        prompts: list[list[int]],
        samples: int,
        lengths: list[int],
        batch: int,
        temperature: float,
        seed: int,
        tokens: bool,
    ) -> dict:
        """Responses in batches of `batch` rows, in order; temperature 0 is greedy.

        Answers with seconds, decode steps, tokens that were asked for and, where `tokens`, the tokens.
        """
        if batch % samples or len(lengths) != len(prompts) * samples:
            raise ValueError("batch must be a multiple of samples, and lengths hold one number a response")
        torch.manual_seed(seed)
        at_once, steps, responses = batch // samples, 0, []
        start = time.perf_counter()
        for first in range(0, len(prompts), at_once):
            ends = lengths[first * samples : (first + at_once) * samples]
            written = self._batch(prompts[first : first + at_once], samples, ends, temperature)
            steps += written.shape[1]
            responses += [row[:end] for row, end in zip(written, ends, strict=True)]
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"seconds": seconds, "steps": steps, "tokens": sum(lengths), "peak_rss": peak}
        return answer | ({"responses": [row.tolist() for row in responses]} if tokens else {})

    @torch.no_grad()
    def _batch(
        self, prompts: list[list[int]], samples: int, ends: list[int], temperature: float
    ) -> torch.Tensor:
        """Prompts, padded on the left -> the new tokens [rows, longest]."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        law = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
        written = self._model.generate(
            ids,
            attention_mask=mask,
            num_return_sequences=samples,
            max_new_tokens=max(ends),
            pad_token_id=0,
            use_cache=True,
            stopping_criteria=transformers.StoppingCriteriaList([OwnLengths(longest, ends)]),
            **(law if temperature > 0 else dict(do_sample=False)),
        )
        return written[:, longest:]


if __name__ == "__main__":
    peer = HuggingFace()
    answer_requests({"load": peer.load, "generate": peer.generate})
