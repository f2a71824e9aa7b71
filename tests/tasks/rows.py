"""Small rows in the columns of each data set, and files of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

PROMPT = "Do it {now}:\n{document}\nDone:"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSONL, gzipped if the name says so."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def cnn(index: int, **changes: Any) -> dict[str, Any]:
    return {"article": f"Article {index}.", "highlights": f"High {index} .\nLight .", "id": f"{index:040x}"} | changes


def dialogue(row_id: str, of: str, summary: str = "They talk.") -> dict[str, Any]:
    return {"id": row_id, "dialogue": f"#Person1#: {of}\n#Person2#: Yes.", "summary": summary, "topic": "talk"}


def pair(english: str, french: str = "Bonjour à tous.") -> dict[str, Any]:
    return {"translation": {"en": english, "fr": french}}


def question(index: int, **changes: Any) -> dict[str, Any]:
    row = {"prompt": [f"What is {index}?", "And why?"], "reference": [], "prompt_id": index, "category": "math"}
    return row | changes


def own(index: int, **changes: Any) -> dict[str, Any]:
    return {"document": f"Text {index}.", "reference": f"Reference {index}."} | changes
