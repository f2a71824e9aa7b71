"""Plain text, such as C4, in its three roles: seeds of the scheduler's training, perplexity, calibration.

The roles share one file and no row. Knows token ids, through an ``encode`` that is given, but no tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmpd.tasks.base import text
from pmpd.tasks.source import DataError

log = logging.getLogger(__name__)

COLUMNS = ("text",)

ROLES = {"seeds": 0, "perplexity": 1, "calibration": 2}
"""Row i belongs to the role of i mod 3, so that no budget makes two roles overlap."""

_WINDOWS_FIELD = {"perplexity": "budget.search_window", "calibration": "budget.calibration_window"}

Encode = Callable[[str], Sequence[int]]
"""Token ids of a text, without special tokens."""


def role_rows(rows: Sequence[dict[str, Any]], role: str) -> list[str]:
    """The texts of one role, in the order of the rows.

    Raises:
        DataError: no rows for this role, or a text that is empty.
        ValueError: no such role.
    """
    if role not in ROLES:
        raise ValueError(f"role={role!r} is not one of {', '.join(ROLES)}")
    texts = [text(rows[i]["text"], "text", f"row {i}") for i in range(ROLES[role], len(rows), len(ROLES))]
    if not texts:
        raise DataError(
            f"{len(rows)} rows of text leave none for {role}; give at least {len(ROLES)} (budget.text_rows)"
        )
    return texts


def windows(
    texts: Iterable[str],
    encode: Encode,
    num_windows: int,
    window_tokens: int,
    *,
    role: str,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Consecutive windows of the documents, end to end.

    The stream is ``[bos] document [eos] [bos] document ...``, each special token only if it is given; a window
    may start anywhere in it. No more texts are encoded than needed.

    Args:
        role: ``perplexity`` or ``calibration``; it names the budget in the error.

    Returns:
        int64 ``[num_windows, window_tokens]``.

    Raises:
        DataError: too little text; says how much there is and what to lower.
    """
    needed = num_windows * window_tokens
    stream: list[int] = []
    num_texts = 0
    for document in texts:
        if len(stream) >= needed:
            break
        if stream and eos_id is not None:
            stream.append(eos_id)
        if bos_id is not None:
            stream.append(bos_id)
        stream.extend(encode(document))
        num_texts += 1
    if len(stream) < needed:
        field = _WINDOWS_FIELD[role]
        raise DataError(
            f"{num_windows} windows of {window_tokens} tokens for {role} need {needed} tokens, the {num_texts} texts "
            f"have {len(stream)}: lower {field}s (at most {len(stream) // window_tokens} are possible) or "
            f"{field}_tokens (at most {len(stream) // num_windows}), or give more text (budget.text_rows, data.root)"
        )
    return torch.tensor(stream[:needed], dtype=torch.int64).view(num_windows, window_tokens)


def seed_prompts(
    texts: Iterable[str], encode: Encode, count: int, *, max_tokens: int, seed: int, min_tokens: int = 32
) -> list[list[int]]:
    """Beginnings of texts, each cut at a random length of ``min_tokens`` to ``max_tokens``, as in the paper.

    A cut depends on the seed, the text's position and its length alone, so a larger ``count`` only adds prompts.
    Texts shorter than ``min_tokens`` are skipped.

    Returns:
        At most ``count`` lists of token ids.

    Raises:
        DataError: no text is long enough.
        ValueError: ``max_tokens`` below ``min_tokens``.
    """
    if max_tokens < min_tokens:
        raise ValueError(f"max_tokens={max_tokens} must be at least min_tokens={min_tokens}")
    prompts: list[list[int]] = []
    num_short = 0
    for index, document in enumerate(texts):
        if len(prompts) == count:
            break
        ids = list(encode(document))
        if len(ids) < min_tokens:
            num_short += 1
            continue
        longest = min(len(ids), max_tokens)
        length = np.random.default_rng([seed, index]).integers(min_tokens, longest, endpoint=True)
        prompts.append(ids[:length])
    if not prompts:
        raise DataError(f"none of {num_short} texts has {min_tokens} tokens; give longer ones (data.root)")
    if len(prompts) < count:
        log.warning(
            "%d seed prompts asked for, %d found (%d texts have fewer than %d tokens); for more, "
            "raise budget.text_rows or give more text",
            count,
            len(prompts),
            num_short,
            min_tokens,
        )
    return prompts
