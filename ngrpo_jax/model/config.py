"""The configuration of a decoder: sizes, positions, tokens.

Frozen and hashable, so that it can be a static argument of a compiled program. Must not know any file format
(hf_format.py), and holds no arrays.
"""

import dataclasses

from ngrpo_jax.errors import require

ARCHITECTURES = ("qwen2", "qwen3", "llama")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The "llama3" scaling of rotary frequencies (Llama 3.1): low frequencies are divided by `factor`.

    Wavelengths above original_max_position_embeddings / low_freq_factor are scaled in full, those below
    original_max_position_embeddings / high_freq_factor not at all, those between in proportion.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        ordered = "0 < low_freq_factor < high_freq_factor must hold"
        require(self.factor > 0, f"rope scaling: factor must be above 0, not {self.factor}")
        require(0 < low < high, f"rope scaling: {ordered}, not {low} and {high}")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters of some matrices (lora.py).

    Attributes:
      rank: R, the width between the two factors.
      scale: s, by which the product of the factors is multiplied.
      targets: paths of the matrices that have one, such as "layers/attention/q".
      init: how the first factor is drawn, one of `choices.LORA_INITS`.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    init: str = "uniform"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder of the Qwen2, Qwen3 or Llama family.

    `vocab_size` counts the rows of the embedding, which may be more than the tokenizer has tokens. `dtype` is
    the type of matrix products; parameters of any type are cast to it where they are used. `max_positions` is
    the length that the model was trained for; callers check against it, and nothing here enforces it.
    `eos_token_ids` is the union of those in the checkpoint's own files; the tokenizer may add to it. With
    `lora` the parameters have adapters beside the base's, which are in `dtype` then and never change.

    Raises:
      UserError: on construction, for an unknown architecture or sizes that do not fit one another.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_positions: int = 32768
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    lora: Lora | None = None

    def __post_init__(self) -> None:
        known, heads, kv_heads = self.architecture in ARCHITECTURES, self.num_heads, self.num_kv_heads
        require(known, f"unknown architecture {self.architecture!r}; known: {', '.join(ARCHITECTURES)}")
        for name in (field.name for field in dataclasses.fields(self) if field.type is int):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        require(heads % kv_heads == 0, f"num_heads ({heads}) must be a multiple of num_kv_heads ({kv_heads})")
        require(self.head_dim % 2 == 0, f"head_dim must be even, to be rotated in pairs, not {self.head_dim}")

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value projections add a bias."""
        return self.architecture == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head before they are rotated."""
        return self.architecture == "qwen3"
