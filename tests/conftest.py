"""Eight CPU devices, no silent broadcasting of ranks, full float32 products: the same for every test.

The flags must be in the environment before JAX starts its backend, hence the order of lines here.
NGRPO_TEST_PLATFORM=cuda,cpu (or tpu,cpu) runs tests on that machine's devices, as test_accelerator.py wants.
"""

import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Eight devices on two busy cores may wait for each other longer than the 40 s after which XLA would abort.
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["JAX_PLATFORMS"] = os.environ.get("NGRPO_TEST_PLATFORM", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Nearly all of the suite's time is XLA compiling small programs. What one worker or command that a test starts
# has compiled, the others read: from a folder that lives as long as this run.
CACHE = "JAX_COMPILATION_CACHE_DIR"
OWN_CACHE = None if CACHE in os.environ else tempfile.mkdtemp(prefix="ngrpo_jax_tests_")
if OWN_CACHE:
    os.environ[CACHE] = OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")
# XLA's own passes stay; LLVM's are left out in this process, which halves its part. Commands that tests start,
# and the runs of .ci/run, have them all.
jax.config.update("jax_disable_most_optimizations", True)

# Two workers take whole files in this order: the longest first, lest one of them end the run alone.
LONGEST = ("update", "rollout", "commands", "hosts", "learner_oracle", "columns", "benchmarks", "strategies")


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_unconfigure():
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)
