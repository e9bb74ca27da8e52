"""The neighbour table of an embedding matrix, (7) of arXiv 2606.10768: exact, and kept exact through updates.

Bottom up, as the package reads best (docs/method.md has the proofs):

eligibility.py  which rows may be neighbours of which
nearness.py     the metrics, how far rounding takes their scores, how far an update moves them
search.py       given rows against the whole matrix: ranking, the certificate, brute force
tiles.py        candidates of every row from half of the score matrix
exact.py        embedding matrix -> table: tiles, ranking, brute force where the certificate fails
refresh.py      a table brought up to date after an update, with no more searching than bounds ask for
devices.py      rows divided over the devices of a mesh
"""

from ngrpo_jax.algo.neighbors.exact import TableConfig, neighbor_table
from ngrpo_jax.algo.neighbors.nearness import METRICS
