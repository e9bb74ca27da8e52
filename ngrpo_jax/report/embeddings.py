"""A model's embedding rows, read for people: the neighbours of given tokens, and Figure 1 as a page.

Owns these two views. The geometry is `analysis.geometry`'s, drawing is `charts`'.

A is anchors, S points.
"""

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ngrpo_jax import flags
from ngrpo_jax.errors import UserError, require
from ngrpo_jax.evaluation.statistics import geometry
from ngrpo_jax.model import decoder
from ngrpo_jax.report import charts
from ngrpo_jax.report.style import CSS
from ngrpo_jax.runtime import console, mesh
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.setup.model_spec import open_checkpoint, open_model_spec
from ngrpo_jax.setup.resume import best_key
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo

SIGMA = 0.33  # of STHT's noise, arXiv 2509.19170
DRAWS = 200  # of noise and of mixtures, for each token
BACKGROUND = 2000  # rows of the vocabulary that the plane is laid through
DEFAULT_COUNT = 8


@dataclasses.dataclass(frozen=True)
class Rows:
    """The embedding of a checkpoint and the tokens that were asked for."""

    settings: Settings
    workdir: Path
    step: int
    tokenizer_info: TokenizerInfo
    embedding_VD: np.ndarray
    table_VD: np.ndarray  # where neighbours are sought: the embedding or the head, as `mixing.table` says
    anchors: list[int]
    count: int

    def text(self, token: int) -> str:
        """A token as it reads, spaces visible."""
        return (
            visible(self.tokenizer_info.tokenizer.decode([token], skip_special_tokens=False)) or f"<{token}>"
        )

    def nearest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of the anchors among the rows that rollouts may mix in."""
        return geometry.nearest_rows(
            self.table_VD,
            self.anchors,
            count,
            metric=self.settings.mixing.metric,
            valid_V=self.tokenizer_info.usable_V,
            group_V=self.tokenizer_info.spelling_V,
        )


def visible(text: str) -> str:
    """Text with a sign for each space, line break and tab, and `\\x0c` for what else would not be seen."""
    signs = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in signs)


def neighbor_list(argv: Sequence[str]) -> str:
    """Each token's nearest neighbours, nearest first; those that the run mixes in before a stroke."""
    rows = _read(argv)
    mixing = rows.settings.mixing
    ids_AC, scores_AC = rows.nearest(rows.count)
    lines = []
    for anchor, ids, scores in zip(rows.anchors, ids_AC, scores_AC, strict=True):
        near = [f"{rows.text(i)} {score:.3f}" for i, score in zip(ids, scores, strict=True)]
        mixed = min(mixing.k - 1, len(near))
        spelling = sum(_same_word(rows.text(anchor), rows.text(i)) for i in ids[:mixed])
        lines.append(
            (rows.text(anchor), anchor, "   ".join([*near[:mixed], "|", *near[mixed:]]).strip(), spelling)
        )
    title = (
        f"step {rows.step}, {mixing.metric} in the {mixing.table}, k {mixing.k}: the first {mixing.k - 1} "
        "are mixed in"
    )
    return f"{title}\n{console.table(lines, ('token', 'id', 'neighbours', 'spelling variants mixed'))}"


def plane_page(argv: Sequence[str]) -> tuple[Path, str]:
    """(WORKDIR/pca.html, the page): tokens, noise and mixtures in the plane of most variance."""
    rows = _read(argv)
    random = np.random.default_rng(rows.settings.seed)
    k = rows.settings.mixing.k
    require(k >= 2, f"mixing.k is {k}; without a neighbour there is no mixture to draw.")
    ids_AC, _ = rows.nearest(k - 1)
    embedding_VD = rows.embedding_VD
    usable = np.flatnonzero(rows.tokenizer_info.usable_V)
    background = random.choice(usable, min(BACKGROUND, len(usable)), replace=False)
    anchors_AD = embedding_VD[rows.anchors]
    noise = [geometry.noisy_points(row, SIGMA, DRAWS, random) for row in anchors_AD]
    mixed = [
        geometry.mixed_points(embedding_VD[[anchor, *ids]], DRAWS, random)
        for anchor, ids in zip(rows.anchors, ids_AC, strict=True)
    ]
    plane = geometry.principal_plane(np.concatenate([embedding_VD[background], anchors_AD, *noise, *mixed]))
    clouds = [
        charts.Cloud("vocabulary", plane(embedding_VD[background]), "#c6ccd4", 4.0),
        charts.Cloud("Gaussian noise", plane(np.concatenate(noise)), charts.COLORS[1], 7.0),
        charts.Cloud("neighbour mixing", plane(np.concatenate(mixed)), charts.COLORS[0], 7.0),
        charts.Cloud("neighbours", plane(embedding_VD[ids_AC.ravel()]), charts.COLORS[2], 26.0),
    ]
    labels = [(rows.text(a), point) for a, point in zip(rows.anchors, plane(anchors_AD), strict=True)]
    labels += [(rows.text(i), plane(embedding_VD[i])) for i in ids_AC.ravel()]
    first, second = (f"{100 * share:.1f} % of variance" for share in plane.explained)
    drawing = charts.scatter_chart(clouds, labels, (first, second))
    candidates = [{anchor, *map(int, ids)} for anchor, ids in zip(rows.anchors, ids_AC, strict=True)]
    lines = [
        _off_the_tokens("Gaussian noise", noise, rows, candidates),
        _off_the_tokens("neighbour mixing", mixed, rows, candidates),
    ]
    return rows.workdir / "pca.html", _page(rows, drawing, clouds, lines)


def _off_the_tokens(
    name: str, points: Sequence[np.ndarray], rows: Rows, candidates: Sequence[set[int]]
) -> tuple[str, float, float, float]:
    """How far a kind of input lies from its anchor and from any token: means over all draws."""
    usable = np.flatnonzero(rows.tokenizer_info.usable_V)
    to_anchor, to_any, own = [], [], []
    for anchor, of_anchor, allowed in zip(rows.anchors, points, candidates, strict=True):
        row = rows.embedding_VD[anchor]
        norms = np.linalg.norm(of_anchor, axis=1) * np.linalg.norm(row)
        to_anchor.append(of_anchor @ row / np.where(norms > 0, norms, 1.0))
        # The anchor may be a special token, which is nobody's neighbour but is near itself.
        pool = np.union1d(usable, [anchor])
        ids_S, cosines_S = geometry.nearest_cosine(of_anchor, rows.embedding_VD[pool])
        to_any.append(cosines_S)
        own.append([int(pool[i]) in allowed for i in ids_S])
    return name, float(np.mean(to_anchor)), float(np.mean(to_any)), float(np.mean(own))


def _page(
    rows: Rows, drawing: str, clouds: Sequence[charts.Cloud], lines: Sequence[tuple[str, float, float, float]]
) -> str:
    legend = "".join(
        f'<span><i style="background:{cloud.color}"></i>{escape(cloud.label)}</span>' for cloud in clouds
    )
    cells = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{value:.4f}</td>" for value in values) + "</tr>"
        for name, *values in lines
    )
    tokens = ", ".join(rows.text(anchor) for anchor in rows.anchors)
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="Tokens in a plane: {escape(tokens)}"', 1)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Inputs in the plane · N-GRPO</title><style>{CSS}</style></head><body><main>"
        '<div class="eyebrow">N-GRPO, Figure 1</div><h1>Noise and mixtures among the tokens</h1>'
        f'<p class="soft">{escape(rows.settings.model.path)}, step {rows.step}; tokens {escape(tokens)}. '
        f"{DRAWS} draws a token of Gaussian noise (σ = {SIGMA} of the row's root mean square) and of "
        f"mixtures with its {rows.settings.mixing.k - 1} nearest neighbours, the anchor weighing most. "
        f"The plane is that of most variance through these and {len(clouds[0].points)} rows of the "
        "vocabulary.</p>"
        f'<figure class="panel"><div class="legend">{legend}</div>{drawing}</figure>'
        '<div class="box scroll"><table><thead><tr><th>input</th><th>cosine to its anchor</th>'
        "<th>cosine to the nearest token</th><th>nearest token is a candidate</th></tr></thead>"
        f"<tbody>{cells}</tbody></table></div></main></body></html>\n"
    )


def _read(argv: Sequence[str]) -> Rows:
    config, options = flags.parse_flags(["report", *argv], tokens=None, step="best", count=str(DEFAULT_COUNT))
    settings, workdir = resolve(config), Path(options["workdir"])
    count = options["count"]
    require(count.isdigit() and int(count) > 0, f"--count={count} must be a whole number above 0.")
    require(bool(options["tokens"]), '--tokens is missing; write --tokens="7, the, Wait".')
    model_spec = open_model_spec(settings, workdir)
    anchors = [
        _token(model_spec.tokenizer_info.tokenizer, piece)
        for piece in options["tokens"].split(",")
        if piece.strip()
    ]
    require(bool(anchors), f"--tokens={options['tokens']!r} names no token.")
    devices = mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    step, params = open_checkpoint(model_spec, workdir, devices, options["step"], best_key(settings))
    rows = (
        decoder.table_rows(params, model_spec.config, name) for name in ("embedding", settings.mixing.table)
    )
    embedding_VD, table_VD = (np.asarray(table, np.float32) for table in rows)
    return Rows(
        settings, workdir, step, model_spec.tokenizer_info, embedding_VD, table_VD, anchors, int(count)
    )


def _token(tokenizer: Any, piece: str) -> int:
    """The one token that `piece` is: as written, its leading space included, or else without it."""
    for text in (piece, piece.strip()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            return int(ids[0])
    cut = "|".join(tokenizer.decode([i]) for i in tokenizer.encode(piece.strip(), add_special_tokens=False))
    raise UserError(f"--tokens: {piece.strip()!r} is several tokens to this tokenizer ({cut}); name one.")


def _same_word(a: str, b: str) -> bool:
    """Whether two tokens differ by case or a leading space at most."""
    return a.lstrip("␣").casefold() == b.lstrip("␣").casefold()
