"""Checks by hand that PEFT reads what `peft.save` writes, with the logits that this project computes.

Two steps, in two environments, since the project needs neither torch nor peft. The first puts random adapters
on golden models, and saves them, the models and the logits under OUT; the second (torch 2.13.0, transformers
5.24.0, peft 0.21.2) computes the logits of the adapter on its base and of the merged model, prints the
largest |difference| of both, and fails where one exceeds 2e-5:

    python tests/golden/check_adapter.py save OUT
    python tests/golden/check_adapter.py compare OUT
"""

import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
# Name of a case -> golden model, rank, scale, targets.
CASES = {
    "qwen2": ("qwen2_untied", 4, 2.0, "all"),
    "qwen2_tied": ("qwen2_tied", 3, 5 / 3, "mlp"),
    "qwen3": ("qwen3", 8, 16 / 8**0.5, "all"),
    "llama": ("llama", 1, 32.0, "attention/[qo]"),
}


def save(out):
    """Saves of each case its base model with a tokenizer, the adapter, the merged model and the logits."""
    sys.path.insert(0, str(HERE.parent.parent))
    import dataclasses
    import shutil

    import jax

    from ngrpo_jax.model import decoder, hf, lora, peft
    from ngrpo_jax.model.config import Lora
    from ngrpo_jax.tasks import arithmetic

    forward = jax.jit(decoder.forward, static_argnums=1)
    for case, (name, rank, scale, targets) in CASES.items():
        config, base = hf.load(HERE / name)
        shutil.copytree(HERE / name, out / case / "base")
        shutil.copytree(arithmetic.TOKENIZER, out / case / "base", dirs_exist_ok=True)
        own = Lora(rank, scale, lora.find_targets(config, targets))
        config = dataclasses.replace(config, lora=own)
        leaves, tree = jax.tree.flatten(lora.init(jax.random.key(0), config, own))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        leaves = [0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        adapters = jax.tree.unflatten(tree, leaves)
        params = lora.joined(base, adapters)
        ids = np.load(HERE / name / "expected.npz")["ids"]
        whole = dataclasses.replace(config, lora=None)
        peft.save(out / case / "adapter", config, adapters, base=out / case / "base", fingerprint="float32:0")
        hf.save(out / case / "merged", whole, jax.jit(lora.merged, static_argnums=1)(params, config))
        logits = forward(params, config, ids)
        np.savez(out / case / "ours.npz", ids=ids, logits=logits, base=forward(base, whole, ids))


def compare(out):
    """Prints the differences; exit status 1 where one is too large."""
    import peft
    import torch
    import transformers

    def logits(model, ids):
        with torch.no_grad():
            return model.eval()(torch.tensor(ids, dtype=torch.long)).logits.numpy()

    worst = 0.0
    for folder in sorted(out.iterdir()):
        ours = np.load(folder / "ours.npz")
        load = transformers.AutoModelForCausalLM.from_pretrained
        merged = load(folder / "merged", attn_implementation="eager")
        base = load(folder / "base", attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(base, folder / "adapter")
        differences = [
            float(np.max(np.abs(logits(each, ours["ids"]) - ours["logits"]))) for each in (model, merged)
        ]
        moved = float(np.max(np.abs(ours["logits"] - ours["base"])))
        worst = max(worst, *differences)
        apart, one = differences
        print(
            f"{folder.name}: adapter {apart:.1e}, merged {one:.1e}; the adapter moves logits by {moved:.1f}"
        )
    sys.exit(worst > 2e-5)


if __name__ == "__main__":
    {"save": save, "compare": compare}[sys.argv[1]](pathlib.Path(sys.argv[2]))
