"""A public file from the Hugging Face hub; its client has mirrors, logins, resumed downloads and a cache."""

import functools
import pathlib

from ngrpo_jax.errors import UserError, explained

from .catalogue import DataSet


def fetch(entry: DataSet) -> dict[str, pathlib.Path]:
    """The local copy of each split's public file, downloaded where the hub's cache does not have it yet.

    Raises UserError for a set without a public repository, and where the hub does not give the file.
    """
    own = f"give your own file by manual_dir (tfds:{entry.full_name}?manual_dir=DIR)"
    if entry.repository is None:
        raise UserError(f"the data set {entry.full_name} has no public repository; {own}")
    import huggingface_hub  # not at the top: its import is slow, and a prepared set needs none of it
    from huggingface_hub import errors

    page = f"https://huggingface.co/datasets/{entry.repository}"
    gated = f"accept its conditions at {page} and log in with `hf auth login`, or {own}"
    unreachable = f"the data set {entry.full_name} cannot be downloaded from {page}"
    with (
        explained((errors.HfHubHTTPError, OSError), unreachable, f"check the connection, or {own}"),
        explained(errors.GatedRepoError, f"the data set {entry.full_name} is gated", gated),
    ):
        fetch_one = functools.partial(
            huggingface_hub.hf_hub_download, entry.repository, repo_type="dataset", revision=entry.revision
        )
        return {split: pathlib.Path(fetch_one(file.path)) for split, file in entry.splits.items()}
