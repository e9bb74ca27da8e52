"""Eight CPU devices, no silent broadcasting of ranks, full float32 products: the same for every test.

The flags must be in the environment before JAX starts its backend, hence the order of lines here.
NGRPO_TEST_PLATFORM=cuda,cpu (or tpu,cpu) runs tests on that machine's devices, as test_accelerator.py wants;
NGRPO_TEST_OPTIMIZED=1 compiles as users do.
"""

import importlib.metadata
import logging
import os
import re
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Eight devices on two busy cores may wait for each other longer than the 40 s after which XLA would abort.
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
# XLA's older emitters compile a program of the learner in a fourth of the time; later versions have none.
if importlib.metadata.version("jaxlib").startswith("0.10.") and os.environ.get("NGRPO_TEST_OPTIMIZED") != "1":
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Nearly all of the suite's time is XLA compiling small programs. LLVM's passes, half of that, are left out,
# also in commands that tests start. make test repeats goldens and oracle with all, .ci/run every command.
if os.environ.get("NGRPO_TEST_OPTIMIZED") != "1":
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PLATFORMS"] = os.environ.get("NGRPO_TEST_PLATFORM", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")

# Two workers take whole files in this order: the longest first, lest one of them end the run alone.
LONGEST = ("update", "rollout", "hosts", "commands", "inference", "refresh", "benchmarks", "learner_oracle")

OWN_CACHE = pytest.StashKey[str]()
CACHE_OPTIONS = {
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def pytest_configure(config):
    """A compilation cache as old as this run: what one worker or command has compiled, the others read.

    In the environment for those that are started from here, where JAX is not imported yet.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = config.stash[OWN_CACHE] = tempfile.mkdtemp(prefix="ngrpo_jax_tests_")
    for name, value in {"jax_compilation_cache_dir": folder, **CACHE_OPTIONS}.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def pytest_unconfigure(config):
    if OWN_CACHE in config.stash:
        shutil.rmtree(config.stash[OWN_CACHE], ignore_errors=True)


class _Compilations(logging.Handler):
    """Records the names of the programs that XLA compiles, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        found = re.search(r"Finished XLA compilation of jit\((.*?)\)", record.getMessage())
        if found:
            self.names.append(found[1])


@pytest.fixture
def compiled():
    """Names of the programs that XLA has compiled since the test began, as jax.log_compiles tells them."""
    logging.disable(logging.NOTSET)  # a test that loads math-verify in this process has disabled all of it
    handler, logger = _Compilations(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield handler.names
    finally:
        logger.removeHandler(handler)


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
