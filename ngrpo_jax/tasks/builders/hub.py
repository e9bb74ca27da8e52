"""One public file from the Hugging Face hub, whose client brings mirrors, logins, resuming and a cache."""

import pathlib

from ngrpo_jax.errors import UserError, is_storage_failure

from .catalogue import DataSet


def fetch(entry: DataSet, split: str) -> pathlib.Path:
    """The local copy of a split's public file, downloaded where it is not in the hub's cache yet.

    Raises ValueError for a set without a public home, FileNotFoundError where the hub does not give the file.
    """
    own = f"give your own file by manual_dir (tfds:{entry.full_name}?manual_dir=DIR)"
    if entry.repository is None:
        raise UserError(f"the data set {entry.full_name} has no public home; {own}")
    import huggingface_hub  # here alone: its import is slow, and a prepared set needs none of it
    from huggingface_hub import errors

    path = entry.splits[split].path
    page = f"https://huggingface.co/datasets/{entry.repository}"
    try:
        return pathlib.Path(
            huggingface_hub.hf_hub_download(
                entry.repository, path, repo_type="dataset", revision=entry.revision
            )
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"the data set {entry.full_name} stands behind a gate: accept its conditions at {page} and log "
            f"in with `hf auth login`, or {own}"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        if is_storage_failure(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the data set {entry.full_name} cannot be downloaded from {page} ({reason}); check the "
            f"connection, or {own}"
        ) from error
