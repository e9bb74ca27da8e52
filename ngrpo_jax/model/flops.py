"""Floating-point operations that a model needs, for utilisation and estimates.

Must not know how the model is computed.
"""

from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import parameter_count


def forward_flops(config: ModelConfig, prompt_tokens: int, response_tokens: int) -> float:
    """Operations of the matrix products of one forward pass over a sequence: two for each weight and token.

    The head counts at response positions alone, the embedding's look-up not at all, and attention with the
    scores that a causal mask leaves.
    """
    tokens = prompt_tokens + response_tokens - 1
    head = config.vocab_size * config.hidden_size
    tables = head * (1 if config.tie_embeddings else 2)
    body = 2 * (parameter_count(config) - tables) * tokens
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * tokens * (tokens + 1)
    return float(body + attention + 2 * head * response_tokens)
