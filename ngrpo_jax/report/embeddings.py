"""Rows of a model's embedding for people: nearest neighbours of given tokens, and the paper's Figure 1.

Owns these two views. The geometry is `evaluation.statistics.geometry`'s, drawing is `charts`'.
A is anchors, X points.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ngrpo_jax import flags
from ngrpo_jax.algo.neighbors import METRICS
from ngrpo_jax.errors import UserError, require
from ngrpo_jax.evaluation.statistics import geometry
from ngrpo_jax.model import decoder
from ngrpo_jax.report import charts, samples, templates
from ngrpo_jax.report.mixing import visible
from ngrpo_jax.report.numbers import number
from ngrpo_jax.runtime import console, mesh
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.setup.model_spec import open_checkpoint, open_model_spec
from ngrpo_jax.setup.resume import best_key
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo
from ngrpo_jax.tasks import prompts

SIGMA = 0.33  # of STHT's noise, arXiv 2509.19170
SAMPLES = 200  # of noise and of mixtures, for each token
BACKGROUND = 2000  # vocabulary rows among the points whose plane is drawn
DEFAULT_COUNT = 8
MOST_LISTED = 300  # tokens in the table of neighbours by metric


@dataclasses.dataclass(frozen=True)
class Anchors:
    """Tokens of the command line, and the embedding of the checkpoint in which they are looked at.

    Attributes:
      table_VD: where neighbours are searched: the embedding or the head, by `mixing.table`.
      ids: the tokens.
      count: neighbours of each token that are listed.
    """

    settings: Settings
    workdir: Path
    step: int
    tokenizer_info: TokenizerInfo
    embedding_VD: np.ndarray
    table_VD: np.ndarray
    ids: list[int]
    count: int

    def text(self, token: int) -> str:
        """A token's text, with visible spaces."""
        decoded = self.tokenizer_info.tokenizer.decode([token], skip_special_tokens=False)
        return visible(decoded) or f"<{token}>"

    def nearest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, nearness) [A, count] of the tokens' neighbours among the rows that rollouts may mix in."""
        metric, eligible = self.settings.mixing.metric, self.tokenizer_info.eligible
        return geometry.nearest_rows(self.table_VD, self.ids, count, metric=metric, eligible=eligible)


def neighbor_list(argv: Sequence[str]) -> str:
    """A table of each token's nearest neighbours; those before the stroke are mixed in by the run."""
    anchors = _read(argv)
    mixing = anchors.settings.mixing
    ids_AC, nearness_AC = anchors.nearest(anchors.count)
    spelling_V = prompts.spelling_groups(anchors.tokenizer_info.tokenizer, len(anchors.table_VD))
    rows = []
    for anchor, ids, nearness in zip(anchors.ids, ids_AC, nearness_AC, strict=True):
        near = [f"{anchors.text(i)} {value:.3f}" for i, value in zip(ids, nearness, strict=True)]
        mixed = min(mixing.k - 1, len(near))
        listed = "   ".join([*near[:mixed], "|", *near[mixed:]]).strip()
        variants = int((spelling_V[ids[:mixed]] == spelling_V[anchor]).sum())
        rows.append((anchors.text(anchor), anchor, listed, variants))
    title = (
        f"step {anchors.step}, {mixing.metric} in the {mixing.table}, k {mixing.k}: the first {mixing.k - 1} "
        "are mixed in"
    )
    return f"{title}\n{console.table(rows, ('token', 'id', 'neighbours', 'spelling variants mixed'))}"


def plane_page(argv: Sequence[str]) -> tuple[Path, str]:
    """(WORKDIR/pca.html, the page): tokens, noisy inputs and mixtures in their plane of largest variance."""
    anchors = _read(argv)
    embedding_VD, k = anchors.embedding_VD, anchors.settings.mixing.k
    require(k >= 2, f"mixing.k is {k}; without a neighbour there is no mixture to draw.")
    ids_AC, _ = anchors.nearest(k - 1)
    candidates_AC = np.concatenate([np.array(anchors.ids)[:, None], ids_AC], axis=1)
    random = np.random.default_rng(anchors.settings.seed)
    usable = np.flatnonzero(anchors.tokenizer_info.eligible.valid_V)
    background_XD = embedding_VD[random.choice(usable, min(BACKGROUND, len(usable)), replace=False)]
    noise = [geometry.noisy_points(embedding_VD[anchor], SIGMA, SAMPLES, random) for anchor in anchors.ids]
    mixed = [geometry.mixed_points(embedding_VD[ids], SAMPLES, random) for ids in candidates_AC]
    plane = geometry.principal_plane(
        np.concatenate([background_XD, embedding_VD[anchors.ids], *noise, *mixed])
    )
    clouds = [
        charts.Cloud("vocabulary", plane(background_XD), 4, 1.3),
        charts.Cloud("Gaussian noise", plane(np.concatenate(noise)), 1, 1.8),
        charts.Cloud("neighbour mixing", plane(np.concatenate(mixed)), 0, 1.8),
        charts.Cloud("neighbours", plane(embedding_VD[ids_AC.ravel()]), 2, 3.6),
    ]
    labels = [(anchors.text(token), plane(embedding_VD[token])) for token in [*anchors.ids, *ids_AC.ravel()]]
    first, second = (f"{100 * share:.1f} % of variance" for share in plane.explained)
    tokens = ", ".join(anchors.text(anchor) for anchor in anchors.ids)
    page = templates.fill(
        "plane.html",
        title="Inputs in the plane",
        model=anchors.settings.model.path,
        step=anchors.step,
        tokens=tokens,
        samples=SAMPLES,
        sigma=SIGMA,
        neighbors=k - 1,
        background=len(background_XD),
        clouds=[{"color": cloud.color, "label": cloud.label, "last": ""} for cloud in clouds],
        drawing=charts.scatter_chart(clouds, labels, (first, second), f"Tokens in a plane: {tokens}"),
        metric=anchors.settings.mixing.metric,
        mixed=k - 1,
        columns=("token", "id", *METRICS),
        neighbors_table=neighbors_by_metric(anchors),
        rows=[
            ("Gaussian noise", *_nearness(anchors, noise, candidates_AC)),
            ("neighbour mixing", *_nearness(anchors, mixed, candidates_AC)),
        ],
    )
    return anchors.workdir / "pca.html", page


def neighbors_by_metric(anchors: Anchors) -> list[list[str]]:
    """(token, id, neighbours by each of METRICS) of the anchors and of the tokens that the run mixed most."""
    ids = list(dict.fromkeys([*anchors.ids, *_mixed_most(anchors)]))[:MOST_LISTED]
    columns = []
    for metric in METRICS:
        found = geometry.nearest_rows(
            anchors.table_VD, ids, anchors.count, metric=metric, eligible=anchors.tokenizer_info.eligible
        )
        columns.append(
            [
                "  ".join(f"{anchors.text(i)} {number(float(x))}" for i, x in zip(near, values, strict=True))
                for near, values in zip(*found, strict=True)
            ]
        )
    return [[anchors.text(token), str(token), *cells] for token, *cells in zip(ids, *columns, strict=True)]


def _mixed_most(anchors: Anchors) -> list[int]:
    """The anchors of the run's kept mixtures, the most frequent first, as far as a text is one token."""
    path = anchors.workdir / "samples.jsonl"
    found = samples.read(path).mixtures.anchors if path.is_file() else {}
    tokenizer = anchors.tokenizer_info.tokenizer
    encoded = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in sorted(found, key=lambda text: -found[text][0])[:MOST_LISTED]
    )
    return [int(ids[0]) for ids in encoded if len(ids) == 1]


def _nearness(anchors: Anchors, points_AXD: Sequence[np.ndarray], candidates_AC: np.ndarray) -> list[str]:
    """Means over points: cosine to the anchor, cosine to the nearest token, whether that is a candidate."""
    usable = np.flatnonzero(anchors.tokenizer_info.eligible.valid_V)
    means = []
    for points_XD, candidates in zip(points_AXD, candidates_AC, strict=True):
        # An anchor may be a special token: no other token's neighbour, but near to its own points.
        pool = np.union1d(usable, candidates)
        cosines_XV = geometry.pairwise_cosines(points_XD, anchors.embedding_VD[pool])
        to_anchor_X = cosines_XV[:, np.searchsorted(pool, candidates[0])]
        own_X = np.isin(pool[cosines_XV.argmax(axis=1)], candidates)
        means.append([to_anchor_X.mean(), cosines_XV.max(axis=1).mean(), own_X.mean()])
    return [f"{mean:.4f}" for mean in np.mean(means, axis=0)]


def _read(argv: Sequence[str]) -> Anchors:
    config, options = flags.parse_flags(argv, of_run=True, tokens=None, step="best", count=str(DEFAULT_COUNT))
    settings, workdir, count = resolve(config), Path(options["workdir"]), options["count"]
    require(count.isdigit() and int(count) > 0, f"--count={count} must be a whole number above 0.")
    require(bool(options["tokens"]), '--tokens is missing; write --tokens="7, the, Wait".')
    model_spec = open_model_spec(settings, workdir)
    info, config = model_spec.tokenizer_info, model_spec.config
    ids = [_token(info.tokenizer, piece) for piece in options["tokens"].split(",") if piece.strip()]
    require(bool(ids), f"--tokens={options['tokens']!r} names no token.")
    devices = mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    step, params = open_checkpoint(model_spec, workdir, devices, options["step"], best_key(settings))
    embedding_VD, table_VD = (
        np.asarray(decoder.table_rows(params, config, name), np.float32)
        for name in ("embedding", settings.mixing.table)
    )
    return Anchors(settings, workdir, step, info, embedding_VD, table_VD, ids, int(count))


def _token(tokenizer: Any, piece: str) -> int:
    """The one token that `piece` encodes to: as written, with its leading space, or else without it."""
    for text in (piece, piece.strip()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            return int(ids[0])
    cut = "|".join(tokenizer.decode([i]) for i in tokenizer.encode(piece.strip(), add_special_tokens=False))
    raise UserError(f"--tokens: {piece.strip()!r} is several tokens to this tokenizer ({cut}); name one.")
