"""Makes the golden directories beside this file: small random models and the logits of transformers.

Made with torch 2.13.0 (CPU), transformers 5.23.0 and numpy 2.4.6, in an environment of their own, since the
project needs no torch:

    python tests/golden/make_golden.py

Each directory is an ordinary Hugging Face checkpoint in float32 with an expected.npz (ids [2, T],
logits [2, T, V]) beside it. Norm scales, biases and every matrix are random, so that no part of a model can
go missing unseen; sizes differ from one another, so that no two axes can be swapped unseen.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

HERE = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN3 = {"num_attention_heads": 4, "head_dim": 20}
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}
MODELS = {
    "qwen2_tied": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=PLAIN, rms_norm_eps=1e-6),
    "qwen2_untied": Qwen2Config(**SIZES, tie_word_embeddings=False, rope_parameters=PLAIN, rms_norm_eps=1e-5),
    "qwen3": Qwen3Config(**SIZES | QWEN3, tie_word_embeddings=True, rope_parameters=PLAIN, rms_norm_eps=1e-6),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=PLAIN, rms_norm_eps=1e-5),
    "llama_llama3": LlamaConfig(
        **SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3, rms_norm_eps=1e-5
    ),
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=PLAIN, rms_norm_eps=1e-5),
}
OLDER_KEYS = ("llama_llama3", "llama_tied")  # config.json as transformers 4 wrote it


def randomise(model, generator):
    """Every parameter random: matrices keep activations near 1, norm scales lie in 0.5..1.5."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias") or "embed_tokens" in name:
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)


def use_older_keys(path):
    """Rewrites config.json with the keys of transformers 4: `rope_theta`, `rope_scaling`, `torch_dtype`."""
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    raw["torch_dtype"] = raw.pop("dtype")
    path.write_text(json.dumps(raw, indent=2) + "\n")


def main():
    """Writes every directory."""
    for seed, (name, config) in enumerate(MODELS.items()):
        generator = torch.Generator().manual_seed(seed)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        randomise(model, generator)
        ids = torch.randint(0, config.vocab_size, (2, 40), generator=generator)
        with torch.no_grad():
            logits = model(ids).logits
        if name == "llama_tied":
            model.generation_config.eos_token_id = [2, 7]
        folder = HERE / name
        model.save_pretrained(folder)
        if name in OLDER_KEYS:
            use_older_keys(folder / "config.json")
        np.savez_compressed(folder / "expected.npz", ids=ids.numpy().astype(np.int32), logits=logits.numpy())
        print(name, "logits up to", logits.abs().max().item())


if __name__ == "__main__":
    main()
