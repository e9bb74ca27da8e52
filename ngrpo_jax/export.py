"""The export command: a checkpoint of a workdir as a Hugging Face directory.

python -m ngrpo_jax.export --config=configs/NAME.py --workdir=DIR [--step=N|best|latest] [--out=DIR]
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax

from ngrpo_jax.commands import commandline, composition
from ngrpo_jax.commands.run import best_key, open_checkpoint
from ngrpo_jax.model import hf
from ngrpo_jax.runtime import console, distributed, mesh, preflight
from ngrpo_jax.settings import resolve


def main(argv: Sequence[str]) -> None:
    """Writes WORKDIR/export (or --out) from the chosen checkpoint, in `model.dtype`."""
    config, flags = commandline.parse_flags(argv, step="latest", out=None)
    settings = resolve(config)
    workdir = pathlib.Path(flags["workdir"])
    out = pathlib.Path(flags["out"] or workdir / "export")
    distributed.require_alone("export")
    devices = mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    source = composition.open_source(settings, workdir)
    step, params = open_checkpoint(source, workdir, devices, flags["step"], best_key(settings))
    hf.save(
        out,
        source.config,
        jax.device_get(params),
        tokenizer_from=source.directory,
        dtype=source.config.dtype,
    )
    size = sum(file.stat().st_size for file in out.iterdir())
    count = console.format_count(preflight.parameter_count(source.config))
    print(f"exported   step {step} of {workdir}: {count} parameters in {source.config.dtype}")
    print(f"directory  {out} ({console.format_bytes(size)}); transformers reads it with from_pretrained")


if __name__ == "__main__":
    commandline.run_command(main)
