"""The neighbour table of an embedding matrix (7) of arXiv 2606.10768: exact, and kept exact through updates.

exact.py        embedding matrix -> table, for all rows from nothing or for a few given ones
tiles.py        candidates of every row from half of the score matrix
nearness.py     the metrics, and how far rounding takes their scores
eligibility.py  which rows may be neighbours of which
refresh.py      a table that is brought up to date after an update, searching no more than it must
"""

from ngrpo_jax.algo.neighbors.exact import neighbor_table
from ngrpo_jax.algo.neighbors.nearness import METRICS

__all__ = ["METRICS", "neighbor_table"]
