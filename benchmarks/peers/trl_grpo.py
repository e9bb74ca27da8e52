"""TRL's GRPOTrainer as a peer: requests as JSON lines on stdin, answers as JSON lines on stdout.

Runs in an environment of its own (pip install torch transformers trl datasets); benchmarks/peer.py starts it.

    {"op": "load", "model": DIRECTORY, "threads": 2, "prompts": [[ids], ...], "samples": 4, "new_tokens": 128,
     "kl_coef": 0.001, "learning_rate": 1e-6, "recompute": true, "lora": 16}
    {"op": "step", "generate": true}

One step a request: generation (or, with `generate` false, random tokens in its place), the reference's
log-probabilities, loss, gradient, AdamW. Prompts and responses go in as ids, so that no tokenizer counts.
Settings that are not about sizes are TRL's defaults; it recomputes activations by default (`recompute`). With
`lora`, the rank, only adapters of all linear layers are trained (pip install peft).
"""

import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import defaultdict

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models

ENDLESS = 10**6  # steps: the peer ends with its requests


class Trainer(trl.GRPOTrainer):
    """The trainer, with a clock around its phases and tokens in the place of texts."""

    def prepare(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Tells the prompts that the data set's texts, their numbers, stand for."""
        self.prompts, self.new_tokens = prompts, new_tokens
        self.generate_now = True
        self.seconds: dict[str, float] = defaultdict(float)

    def _tokenize_prompts(self, prompts):
        return [self.prompts[int(text)] for text in prompts], None, {}

    def _generate_single_turn(self, prompt_ids, *arguments, **options):
        if self.generate_now:
            return self._timed("generate", super()._generate_single_turn, prompt_ids, *arguments, **options)
        vocabulary = self.model.config.vocab_size
        written = [[random.randrange(3, vocabulary) for _ in range(self.new_tokens)] for _ in prompt_ids]
        return written, None

    def _generate_and_score_completions(self, *arguments, **options):
        return self._timed("scored", super()._generate_and_score_completions, *arguments, **options)

    def _timed(self, name, work, *arguments, **options):
        start = time.perf_counter()
        try:
            return work(*arguments, **options)
        finally:
            self.seconds[name] += time.perf_counter() - start


class Requests(transformers.TrainerCallback):
    """Holds every step back until it is asked for, and answers when it is done."""

    def __init__(self, answers) -> None:
        self._answers = answers
        self.trainer: Trainer | None = None

    def on_step_begin(self, *_, **__) -> None:
        """Waits for a request; its end is the end of the process."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        request = json.loads(line)
        self.trainer.generate_now = request["generate"]
        self.trainer.seconds.clear()
        self._start = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        """Sends seconds of the step and its phases: what is neither generation nor scoring is the update."""
        total, seconds = time.perf_counter() - self._start, self.trainer.seconds
        answer(
            self._answers,
            seconds=total,
            generate=seconds["generate"],
            score=seconds["scored"] - seconds["generate"],
            update=total - seconds["scored"],
            peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def make_trainer(request: dict, requests: Requests, output: str) -> Trainer:
    """The trainer of a "load" request."""
    torch.set_num_threads(request["threads"])
    prompts, samples = request["prompts"], request["samples"]
    vocabulary = transformers.AutoConfig.from_pretrained(request["model"]).vocab_size
    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        pad_token="w0",
        eos_token="w1",
        padding_side="left",
    )
    settings = trl.GRPOConfig(
        output_dir=output,
        per_device_train_batch_size=len(prompts) * samples,
        num_generations=samples,
        max_completion_length=request["new_tokens"],
        generation_kwargs={"min_new_tokens": request["new_tokens"]},
        beta=request["kl_coef"],
        learning_rate=request["learning_rate"],
        gradient_checkpointing=request["recompute"],
        loss_type="grpo",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_steps=ENDLESS,
        logging_steps=ENDLESS,
        save_strategy="no",
        report_to="none",
        bf16=False,
        fp16=False,
        use_cpu=True,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    adapters = {}
    if request.get("lora"):
        from peft import LoraConfig

        rank = request["lora"]
        adapters["peft_config"] = LoraConfig(
            r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    trainer = Trainer(
        model=request["model"],
        reward_funcs=lambda completions, **_: [random.random() for _ in completions],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(prompts))]),
        processing_class=tokenizer,
        callbacks=[requests],
        **adapters,
    )
    trainer.prepare(prompts, request["new_tokens"])
    requests.trainer = trainer
    return trainer


def answer(answers, **content) -> None:
    """One line."""
    print(json.dumps(content), file=answers, flush=True)


def main() -> None:
    """Answers until stdin ends. What libraries print goes to stderr: stdout is for answers alone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests = Requests(answers)
    with tempfile.TemporaryDirectory() as output:
        try:
            trainer = make_trainer(json.loads(sys.stdin.readline()), requests, output)
            answer(
                answers, trl=trl.__version__, torch=torch.__version__, transformers=transformers.__version__
            )
            trainer.train()
        except Exception as error:
            answer(answers, error=f"{type(error).__name__}: {error}")
            raise


if __name__ == "__main__":
    main()
