"""A controlled study: does mixing neighbours into rollouts help, and because the neighbours are near?

search.py      search problems: numbers that are to be joined to a target, and their checker
spelling.py    concepts and their words; tokenizers of these vocabularies
tasks.py       the tasks of the study: problems, rewards, settings, base models
bases.py       the base models: warm-up text, and supervised training on it
strategies.py  mixing strategies that only a study needs: random rows in the place of neighbours
arms.py        the arms: what each changes of a task's settings
trial.py       one run of (task, arm, seed), and what is recorded of it
store.py       the records on disk: which are there, which are missing
analysis.py    differences between arms, their intervals and verdicts
report.py      records -> docs/study.md
cases.py       single responses that one mixed step turned

`plan.md` was written before the first counted run. `results/` and `pilot/` hold the raw records.
"""
