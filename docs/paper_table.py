"""The table of settings in docs/paper.md: what each config of configs/ sets apart from configs/base.py.

    python -m docs.paper_table

replaces the table between its marks. Run it from the root of the repository. tests/test_paper.py fails where
the table is not what the configs set.
"""

import pathlib
import sys
from typing import Any

from ngrpo_jax import flags, schema

DOCUMENT = pathlib.Path(__file__).parent / "paper.md"
CONFIGS = DOCUMENT.parent.parent / "configs"
BEGIN = "<!-- written by python -m docs.paper_table -->"
END = "<!-- end of what docs.paper_table writes -->"
OWN = (
    "base",
    "tiny",
    "smollm2",
    "lora_1_5b_16gb",
    "lora_1_5b_24gb",
    "lora_7b_80gb",
    "lora_7b_v5e_8",
)  # not of the paper


def values(path: pathlib.Path) -> dict[str, Any]:
    """Setting -> value of a config file."""
    return schema.flatten(flags.load_config(str(path)).to_dict())


def differences(path: pathlib.Path) -> dict[str, Any]:
    """The settings of a config whose values are not those of configs/base.py."""
    base = values(CONFIGS / "base.py")
    return {leaf: value for leaf, value in values(path).items() if value != base[leaf]}


def paper_configs() -> list[pathlib.Path]:
    """The files of all runs and evaluations of the paper, the release's after the paper's."""
    files = [*sorted(CONFIGS.glob("*.py")), *sorted((CONFIGS / "released").glob("*.py"))]
    return [path for path in files if path.stem not in OWN]


def name_of(path: pathlib.Path) -> str:
    """`ngrpo_7b`, `released/ngrpo_7b`."""
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def table() -> str:
    """Markdown: one row a config."""
    lines = ["| config | apart from configs/base.py |", "|---|---|"]
    for path in paper_configs():
        changed = ", ".join(f"`{leaf}={value}`" for leaf, value in differences(path).items())
        lines.append(f"| {name_of(path)} | {changed} |")
    return "\n".join(lines)


def rewritten(document: str) -> str:
    """The document with an up-to-date table. Raises ValueError where its marks are missing."""
    if BEGIN not in document or END not in document:
        raise ValueError(f"{DOCUMENT} has lost the marks of its table, {BEGIN} and {END}")
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the table of {len(paper_configs())} configs in {DOCUMENT}", file=sys.stderr)
