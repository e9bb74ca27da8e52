"""Makes the golden adapters NAME_lora beside this file: what PEFT saves, computes and differentiates.

Made with torch 2.13.0 (CPU), transformers 5.24.0, peft 0.21.2 and numpy 2.4.6, in an environment of their
own, since the project needs none of the first three:

    python tests/golden/make_lora.py

Each directory is one of PEFT for the golden model NAME, with random factors on all seven matrices of each
layer, and an expected.npz beside it: ids [2, T], logits [2, T, V], the mean cross-entropy `loss` of each next
token, and its gradients by the names of the tensors in adapter_model.safetensors.
"""

import pathlib

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
NAMES = ("qwen2_untied", "qwen3", "llama")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 8


def randomise(model, generator):
    """Both factors random: their product, scaled, has about a third of the size of a model's matrix."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            elif "lora_B" in name:
                parameter.normal_(0.0, 0.08, generator=generator)


def main():
    """Writes every directory."""
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(100 + seed)
        base = transformers.AutoModelForCausalLM.from_pretrained(HERE / name, attn_implementation="eager")
        ids = torch.randint(0, base.config.vocab_size, (2, 24), generator=generator)
        with torch.no_grad():
            before = base(ids).logits
        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, lora).eval()
        randomise(model, generator)
        output = model(ids)
        logits = output.logits
        laws = logits[:, :-1].reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(laws, ids[:, 1:].reshape(-1))
        loss.backward()
        gradients = {
            parameter_name.replace(".default", ""): parameter.grad.numpy()
            for parameter_name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        folder = HERE / f"{name}_lora"
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()
        np.savez_compressed(
            folder / "expected.npz",
            ids=ids.numpy().astype(np.int32),
            logits=logits.detach().numpy(),
            loss=loss.detach().numpy(),
            **gradients,
        )
        moved = (logits - before).abs().max().item()
        least = min(np.abs(gradient).max() for gradient in gradients.values())
        print(
            f"{name}: logits up to {logits.abs().max().item():.1f}, moved by up to {moved:.1f}; "
            f"{len(gradients)} gradients, each up to {least:.1e} or more"
        )


if __name__ == "__main__":
    main()
