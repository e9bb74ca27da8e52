"""Where `analysis.passk` is still imported from; the code is in `ngrpo_jax/evaluation/statistics/`."""
