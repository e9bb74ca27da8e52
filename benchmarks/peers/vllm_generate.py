"""vLLM as a peer of rollouts, for CPU in float32; the requests of hf_generate.py.

Runs in an environment of its own (benchmarks/README.md), started by benchmarks/peer.py. `load` takes the
sequences that vLLM decodes side by side and the most tokens of one as well.
"""

import os
import resource
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import torch
import vllm
from answering import answer_requests


class Engine:
    """The model that was loaded, and what can be asked of it."""

    def load(self, model: str, threads: int, slots: int, tokens: int) -> dict:
        """Loads a directory in float32, without its tokenizer; answers with versions."""
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._slots = slots
        self._llm = vllm.LLM(
            model=model,
            dtype="float32",
            max_model_len=tokens,
            max_num_seqs=slots,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
        )
        return {"vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}

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
        """Responses of just these lengths, prompt-major; the samples of a prompt share its prefill.

        Nothing is kept from one call to the next: between two rollouts of a training the weights change.
        """
        if batch > self._slots:
            raise ValueError("the engine was loaded with fewer slots than the batch has rows")
        self._llm.reset_prefix_cache()
        torch.manual_seed(seed)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(samples)]
        laws = [
            vllm.SamplingParams(
                temperature=temperature,
                max_tokens=length,
                min_tokens=length,
                ignore_eos=True,
                detokenize=False,
            )
            for length in lengths
        ]
        start = time.perf_counter()
        written = self._llm.generate(requests, laws, use_tqdm=False)
        seconds = time.perf_counter() - start
        responses = [list(response.outputs[0].token_ids) for response in written]
        if [len(response) for response in responses] != lengths:
            raise RuntimeError("vLLM did not write the number of tokens that was asked for")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"seconds": seconds, "steps": None, "tokens": sum(lengths), "peak_rss": peak}
        return answer | ({"responses": responses} if tokens else {})


if __name__ == "__main__":
    engine = Engine()
    answer_requests({"load": engine.load, "generate": engine.generate})
