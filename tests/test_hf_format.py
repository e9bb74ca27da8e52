"""The tables of the Hugging Face format against the published checkpoints of the paper."""

import jax
import numpy as np
import pytest

from ngrpo_jax.model import decoder, hf_format, hf_weights
from ngrpo_jax.model.config import ModelConfig, RopeScaling

# config.json of the checkpoints that must load, as they are on the hub (keys that nothing reads left out).
R1_DISTILL_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
R1_DISTILL_7B = R1_DISTILL_1_5B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
QWEN3_1_7B_BASE = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


@pytest.mark.parametrize(
    ("raw", "parameters"),
    [
        (R1_DISTILL_1_5B, 1_777_088_000),
        (R1_DISTILL_7B, 7_615_616_512),
        (LLAMA_3_2_1B, 1_235_814_400),
        (QWEN3_1_7B_BASE, 1_720_574_976),
        (SMOLLM2_135M, 134_515_008),
    ],
    ids=["r1-distill-1.5b", "r1-distill-7b", "llama-3.2-1b", "qwen3-1.7b-base", "smollm2-135m"],
)
def test_the_papers_checkpoints_have_their_published_number_of_parameters(raw, parameters):
    config = hf_format.config_from_json(raw, {}, "bfloat16")
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    hf_weights.check_params(config, shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    stored = {name: t.hf_shape for t in hf_format.tensors(config) for name in t.names(config)}
    assert sum(int(np.prod(shape)) for shape in stored.values()) == parameters
    assert config.dtype == "bfloat16"


def test_config_keys_arrive_where_they_belong():
    config = hf_format.config_from_json(LLAMA_3_2_1B, {"eos_token_id": [128001, 128008, 128009]}, "float32")
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16}
    heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64}
    rope = {"rope_theta": 500000.0, "rope_scaling": scaling, "max_positions": 131072}
    rest = {"norm_eps": 1e-5, "tie_embeddings": True, "bos_token_id": 128000}
    eos = (128001, 128008, 128009)
    assert config == ModelConfig("llama", **sizes, **heads, **rope, **rest, eos_token_ids=eos)


def test_what_config_json_leaves_out_has_transformers_defaults():
    bare = {
        k: v
        for k, v in LLAMA_3_2_1B.items()
        if not k.startswith(("rope", "head_dim", "rms", "tie", "num_key"))
    }
    config = hf_format.config_from_json(bare, {}, "float32")
    assert (config.head_dim, config.num_kv_heads, config.rope_theta) == (64, 32, 10000.0)
    assert (config.rope_scaling, config.norm_eps, config.tie_embeddings) == (None, 1e-6, False)
    bare = {k: v for k, v in (QWEN3_1_7B_BASE | {"num_attention_heads": 8}).items() if k != "head_dim"}
    assert hf_format.config_from_json(bare, {}, "float32").head_dim == 128
