"""Offline runs, made and read back: what W&B's files hold, by its own protocol buffers."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from pmpd import tracking
from pmpd.tracking import Identity, open_tracker


def wandb_records(path: Path) -> list[Any]:
    """The protocol buffers of a finished run's file; W&B's service writes its end after ``finish`` has returned."""
    deadline = time.monotonic() + 20
    while not (records := read_records(path)) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)
    return records


def read_records(path: Path) -> list[Any]:
    """The protocol buffers of a .wandb file: a LevelDB log of 32 KiB blocks after a 7-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, records, parts = path.read_bytes(), 7, [], b""
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too short for a record's header: padding
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def items(update: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


def open_offline(tmp_path: Path, **extra: Any) -> tracking.Tracker:
    config = {"model": {"name": "tiny"}, "seed": 0}
    return open_tracker("offline", project="pmpd-test", dir=str(tmp_path), config=config, **extra)


def tell(folder: Path, run_id: str, content: str, *, end: bool = True) -> None:
    tracker = open_offline(folder, identity=Identity(run_id, content), job_type="quantize", group="sweep")
    tracker.metrics("quantize", {"x": 1.0})
    tracker.lineage(*run_id.split("-"), {"model": "source/m0", "sensitivity": "sensitivity/k0"}, "store/q")
    if end:
        tracker.finish()


def only_warning(caplog: pytest.LogCaptureFixture) -> str:
    # W&B's own records stay in its debug.log: its logger does not propagate, but pytest listens to it.
    (record,) = [
        record
        for record in caplog.records
        if record.name.startswith("pmpd.tracking") and record.levelno >= logging.WARNING
    ]
    return record.getMessage()
