"""The import path `ngrpo_jax.analysis.passk`, kept for programs that use it; the code is in evaluation/."""

from ngrpo_jax.evaluation.statistics.passk import best_at_k_bootstrap, mean_at_n, pass_at_k

__all__ = ["best_at_k_bootstrap", "mean_at_n", "pass_at_k"]
