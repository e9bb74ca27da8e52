"""What pyproject.toml cannot say: configs/ is at the root of a clone, and inside the package in a wheel."""

from setuptools import find_packages, setup

CONFIGS = {"ngrpo_jax.configs": "configs", "ngrpo_jax.configs.released": "configs/released"}

setup(
    packages=[*find_packages(include=["ngrpo_jax*"]), *CONFIGS],
    package_dir=CONFIGS,
)
