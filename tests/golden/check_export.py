"""Checks by hand that transformers reads what `hf.save` writes, with the logits of the original checkpoint.

Two steps, in two environments, since the project needs no torch. The first loads every golden directory and
saves it under OUT; the second (torch 2.13.0; transformers 5.23.0, and 4.57.6) computes the logits of what was
saved, prints the largest |difference| per model and fails where one exceeds 1e-6:

    python tests/golden/check_export.py save OUT
    python tests/golden/check_export.py compare OUT
"""

import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
NAMES = sorted(folder.name for folder in HERE.iterdir() if (folder / "config.json").is_file())


def save(out):
    """Saves every golden model twice: as one file, and in shards of at most 60 kB."""
    sys.path.insert(0, str(HERE.parent.parent))
    from ngrpo_jax.model import hf

    for name in NAMES:
        config, params = hf.load(HERE / name)
        hf.save(out / name / "single", config, params)
        hf.save(out / name / "shards", config, params, max_shard_bytes=60_000)


def compare(out):
    """Prints the differences; exit status 1 where one is too large."""
    import torch
    import transformers

    worst = 0.0
    for folder in sorted(out.glob("*/*")):
        expected = np.load(HERE / folder.parent.name / "expected.npz")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(torch.tensor(expected["ids"], dtype=torch.long)).logits.numpy()
        difference = float(np.max(np.abs(logits - expected["logits"])))
        worst = max(worst, difference)
        files = len(list(folder.glob("*.safetensors")))
        print(
            f"{folder.parent.name}: {type(model).__name__}, {model.dtype}, {files} file(s): {difference:.1e}"
        )
    sys.exit(worst > 1e-6)


if __name__ == "__main__":
    {"save": save, "compare": compare}[sys.argv[1]](pathlib.Path(sys.argv[2]))
