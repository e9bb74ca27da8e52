"""The paper's settings: N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B (arXiv 2606.10768), on one device.

`ngrpo_jax/settings.py` declares every setting with its default and meaning; these are the defaults. The other
files of this folder start from here and change what they are about. On the command line any setting is
`--config.SECTION.NAME=VALUE`, such as `--config.rollout.temperature=1.0`; None means "not set".
"""

from ngrpo_jax.schema import as_config_dict
from ngrpo_jax.settings import Settings


def get_config():
    return as_config_dict(Settings())
