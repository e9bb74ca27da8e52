"""Files that are replaced whole: whoever reads one, at any time, finds the old text or the new, never half.

Must not know what is in them.
"""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Puts `text` (UTF-8) in the place of what `path` held, if anything; an interruption leaves the old."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of an indented JSON document."""
    write_text(path, json.dumps(value, indent=1) + "\n")
