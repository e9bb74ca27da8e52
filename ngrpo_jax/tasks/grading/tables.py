"""The tables of tables.toml: LaTeX commands, words, units, characters. Plain data, read once."""

from ngrpo_jax import files

_TABLES = files.toml_beside(__file__)


def _words(name: str) -> frozenset[str]:
    return frozenset(_TABLES[name].split())


def _meanings(name: str) -> dict[str, str]:
    """name -> what it stands for, from rows meaning = "names"."""
    return {name: meaning for meaning, names in _TABLES[name].items() for name in names.split()}


FUNCTIONS, DECORATION, TEXT_MODE = map(_words, ("functions", "decoration", "text_mode"))
DROPPED_WITH_ARGUMENT, ALPHABETS = map(_words, ("dropped_with_argument", "alphabets"))
MATRICES, ROWS = map(_words, ("matrices", "rows"))
NO_UNIT, FILLERS, ITALIC_PAIRS = map(_words, ("no_unit", "fillers", "italic_pairs"))
GREEK_VARIANTS = _words("greek_variants")
SYMBOLS, RENAMED = map(_meanings, ("symbols", "renamed"))
UNITS: str = _TABLES["units"]
BOXES: dict[str, int] = _TABLES["boxes"]
NUMBER_WORDS: dict[str, int] = _TABLES["number_words"]  # the power of ten
ABBREVIATIONS: dict[str, str] = _TABLES["abbreviations"]
GREEK: dict[str, str] = _TABLES["greek"]
UNICODE = str.maketrans({letter: f"\\{name} " for letter, name in GREEK.items()} | _TABLES["unicode"])
