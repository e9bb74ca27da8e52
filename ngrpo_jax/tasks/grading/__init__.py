r"""Whether a response's final answer is the gold: docs/grading.md has the rules, each with its reason.

    extraction   response -> answer, from the last box
    plain        equal spelling and plain numbers, in the caller's process
    tables  unicode  tokens  forms         answer -> tokens in a normal form
    expressions  units          tokens -> expression tree, unit
    sorts  names  words  intervals  reading      tokens -> an answer of a sort: number, interval, set, ...
    comparison   two answers -> verdict, by their sorts
    values  algebra  symbolic   two expressions -> equal or not
    process      all of this behind a pipe, under a deadline and a memory limit

Nothing here imports JAX, or settings, which do.
"""

VERSION = 1  # of the rules: raised when answers are read otherwise
