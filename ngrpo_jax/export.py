"""The export command: a checkpoint of a workdir as a Hugging Face directory.

    python -m ngrpo_jax.export --workdir=DIR [--step=N|best|latest] [--out=DIR] [--merge]
        [--push=ORG/NAME] [--config=configs/NAME.py] [--config.a.b=value]

The step is that of the best checkpoint by default, the directory WORKDIR/export. The settings are those of
the run, by WORKDIR/config.json; `--config` takes others. Of a run with `lora.rank` it is the adapter that is
written, as a directory of PEFT; `--merge` writes the whole model, adapter included. `--push` uploads the
directory to the Hugging Face hub, as the user of `hf auth login`; a repository that it makes is private.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from ngrpo_jax import flags
from ngrpo_jax.errors import UserError, explained, require
from ngrpo_jax.model import decoder
from ngrpo_jax.runtime import console, distributed, mesh
from ngrpo_jax.settings import resolve
from ngrpo_jax.setup.model_spec import open_checkpoint, open_model_spec, save_model
from ngrpo_jax.setup.resume import best_key

# For --help: beginnings of the names of the settings that this command reads.
SETTINGS_READ = ("model.", "lora.", "mesh.", "checkpoint.best_metric")


def main(argv: Sequence[str]) -> None:
    """Writes WORKDIR/export (or --out) from the chosen checkpoint, in `model.dtype`."""
    config, options = flags.parse_flags(argv, of_run=True, step="best", out=None, push=None, merge=False)
    settings = resolve(config)
    workdir = pathlib.Path(options["workdir"])
    out = pathlib.Path(options["out"] or workdir / "export")
    distributed.require_alone("export")
    push, merge = options["push"], options["merge"]
    require(
        not merge or settings.lora.rank is not None, "--merge is of runs with lora.rank; this one has none."
    )
    require(push is None or push.count("/") == 1, f"--push={push} must be ORG/NAME.")
    devices = mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    model_spec = open_model_spec(settings, workdir)
    step, params = open_checkpoint(model_spec, workdir, devices, options["step"], best_key(settings))
    save_model(model_spec, params, out, merge=merge)
    size = sum(file.stat().st_size for file in out.iterdir())
    config = model_spec.config
    adapter = config.lora is not None and not merge
    count = console.format_count((decoder.trained_count if adapter else decoder.parameter_count)(config))
    what = "adapter parameters in float32" if adapter else f"parameters in {config.dtype}"
    reader = "PEFT reads it with PeftModel" if adapter else "transformers reads it with from_pretrained"
    print(f"exported   step {step} of {workdir}: {count} {what}")
    print(f"directory  {out} ({console.format_bytes(size)}); {reader}")
    if push is not None:
        print(f"hub        {upload(out, push, step)}")


def upload(directory: pathlib.Path, repository: str, step: int) -> str:
    """Uploads a directory to a model repository of the hub, made where it is missing; the commit's address.

    UserError where the hub refuses (no login, no right) or is not reached.
    """
    import huggingface_hub

    # HTTPError: that of the HTTP library, whichever this version of the hub's client has.
    refused = (OSError, huggingface_hub.errors.HTTPError)
    fault = f"{repository} cannot be written on the hub"
    remedy = "log in by hf auth login, and check the name and your rights"
    with explained(refused, fault, remedy), _reached(directory):
        huggingface_hub.create_repo(repository, private=True, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=repository, folder_path=directory, commit_message=f"step {step}"
        )
    return str(commit)


@contextlib.contextmanager
def _reached(directory: pathlib.Path) -> Iterator[None]:
    """UserError where no answer of the hub comes: no network, no name server, a time-out."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError:  # an answer
        raise
    except (ConnectionError, TimeoutError, errors.HTTPError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the hub was not reached ({reason}); check the connection. The export is in {directory}."
        ) from error


def cli() -> None:
    """The console script ngrpo-export."""
    flags.run_command(main)


if __name__ == "__main__":
    cli()
