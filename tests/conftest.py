"""Eight CPU devices, no silent broadcasting of ranks, full float32 products: the same for every test.

The flags must be in the environment before JAX starts its backend, hence the order of lines here.
NGRPO_TEST_PLATFORM=cuda,cpu (or tpu,cpu) runs tests on that machine's devices, as test_accelerator.py wants.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Eight devices on two busy cores may wait for each other longer than the 40 s after which XLA would abort.
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["JAX_PLATFORMS"] = os.environ.get("NGRPO_TEST_PLATFORM", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")

# Two workers take whole files in this order: the longest first, lest one of them end the run alone.
LONGEST = ("update", "rollout", "commands", "hosts", "learner_oracle", "columns", "benchmarks", "strategies")


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
