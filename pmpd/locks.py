"""A lock that works on a network filesystem and is taken over when its holder is gone. Knows nothing of what it guards.

The protocol needs three things of a filesystem: exclusive creation, atomic rename, and that a file's modification time
changes for others when it is set; NFS from version 3 on, Lustre, CephFS and local disks have them. ``flock`` is not
used: where it works across hosts at all, a server decides when a dead client's locks end.

- A lock is a row of generations ``<name>.<n>.lock``, never reused. Who creates generation n + 1 exclusively holds the
  lock; it may be tried only while generation n, the highest, is released or abandoned. So of many that find a holder
  gone exactly one takes over, and a file that somebody holds is never removed.
- The file says who holds it. The holder touches it every :data:`HEARTBEAT_S` seconds from a thread, and when it is done
  replaces it by a released one.
- Abandoned means: the holder is of this machine and its process is gone (at once); or its file has not been touched for
  :data:`ABANDONED_AFTER_S` seconds of the *waiter's* clock. Clocks of two hosts are never compared.
- A holder that was only slow, say suspended with its host, may wake up and go on writing. So what a lock guards must be
  named by the generation and renamed on a take-over (``artifacts.Store`` does): the late writer's paths are gone, and
  it fails instead of mixing its bytes with its successor's.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
ABANDONED_AFTER_S = 180.0
"""Many heartbeats: compiled code may hold Python's interpreter lock, and with it the heartbeat, for a minute."""
POLL_S = (0.05, 2.0)
"""A waiter looks this often, first and at most."""


@dataclass(frozen=True)
class Patience:
    """How often a holder says that it lives, and how long a waiter believes one that does not.

    Raises:
        ValueError: a holder would be given up between two heartbeats.
    """

    heartbeat_s: float = HEARTBEAT_S
    abandoned_after_s: float = ABANDONED_AFTER_S

    def __post_init__(self) -> None:
        if not 0 < 2 * self.heartbeat_s <= self.abandoned_after_s:
            raise ValueError(
                f"abandoned_after_s={self.abandoned_after_s} is not possible: at least twice heartbeat_s "
                f"({self.heartbeat_s})"
            )


@contextmanager
def hold(
    folder: Path, name: str, settled: Callable[[], bool], patience: Patience | None = None
) -> Iterator[int | None]:
    """The lock ``name`` in ``folder``, as the generation held; None if ``settled()`` came true while waiting."""
    patience = patience or Patience()
    generation = _acquire(folder, name, settled, patience)
    if generation is None:
        yield None
        return
    path = _path(folder, name, generation)
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, stop, patience.heartbeat_s), daemon=True)
    heart.start()
    try:
        yield generation
    finally:
        stop.set()
        heart.join()
        _release(path)


def is_latest(folder: Path, name: str, generation: int) -> bool:
    """Whether nobody took the lock over from who holds (or held) it as ``generation``."""
    return _highest(folder, name) == generation


def holder(folder: Path, name: str) -> dict[str, Any] | None:
    """Who holds the lock, as far as its file says: host, pid and heartbeat's age by this clock; None if nobody does.

    For people: an age is wrong by what two hosts' clocks differ. A holder of this machine that is gone is none.
    """
    found = _highest(folder, name)
    if found is None:
        return None
    path = _path(folder, name, found)
    said = _read(path)
    if said.get("released") or _gone(said):
        return None
    try:
        age_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    return {"host": said.get("host"), "pid": said.get("pid"), "age_s": max(age_s, 0.0)}


def _acquire(folder: Path, name: str, settled: Callable[[], bool], patience: Patience) -> int | None:
    watched: tuple[int, int] | None = None  # generation and the time of its last touch, in its filesystem's words
    since = time.monotonic()
    pause, said = POLL_S[0], False
    while True:
        if settled():
            return None
        highest = _highest(folder, name)
        free = highest is None
        if highest is not None:
            path = _path(folder, name, highest)
            owner = _read(path)
            try:
                touched = (highest, path.stat().st_mtime_ns)
            except FileNotFoundError:  # replaced at this moment
                continue
            if touched != watched:
                watched, since = touched, time.monotonic()
            silent_s = time.monotonic() - since
            free = bool(owner.get("released")) or _gone(owner) or silent_s > patience.abandoned_after_s
            if free and not owner.get("released"):
                log.warning(
                    "%s: its holder, process %s of %s, is gone%s; taken over",
                    name,
                    owner.get("pid"),
                    owner.get("host"),
                    "" if _gone(owner) else f" (silent for {silent_s:.0f} s)",
                )
        if free:
            generation = 0 if highest is None else highest + 1
            if _create(_path(folder, name, generation)):
                return generation
            continue
        if not said:
            log.info("%s is held by process %s of %s; waiting for it", name, owner.get("pid"), owner.get("host"))
            said = True
        time.sleep(pause)
        pause = min(2 * pause, POLL_S[1], patience.abandoned_after_s / 4)


def _create(path: Path) -> bool:
    """Whether this process, and no other, made ``path``."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(_myself(), stream)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:  # a full disk: nobody may wait for a lock that nobody knows to be theirs
        path.unlink(missing_ok=True)
        raise
    return True


def _release(path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(json.dumps(_myself() | {"released": True}), encoding="utf-8")
        temporary.replace(path)
    except OSError:  # a full disk, say; removing a file needs no room, and the generation before it is over
        temporary.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _beat(path: Path, stop: threading.Event, every_s: float) -> None:
    while not stop.wait(every_s):
        try:
            os.utime(path)
        except OSError as error:
            log.debug("heartbeat of %s: %s", path, error)  # a server that is away for a while: tried again


def _path(folder: Path, name: str, generation: int) -> Path:
    return folder / f"{name}.{generation}.lock"


def _highest(folder: Path, name: str) -> int | None:
    start, end = f"{name}.", ".lock"
    found = [e[len(start) : -len(end)] for e in os.listdir(folder) if e.startswith(start) and e.endswith(end)]  # noqa: PTH208
    return max((int(n) for n in found if n.isdigit()), default=None)


def _read(path: Path) -> dict[str, Any]:
    """What a lock's file says; nothing where it is just being written, or was cut off."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _gone(owner: dict[str, Any]) -> bool:
    """Whether the holder's process can be looked for from here, and is not there."""
    if owner.get("machine") != machine() or not isinstance(owner.get("pid"), int):
        return False
    started = _started(owner["pid"])
    return started is None or started != owner.get("started")


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid(), "started": _started(os.getpid())}


@cache
def machine() -> str:
    """Where a process number means the same process: this boot of this kernel, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()  # not Linux


def _started(pid: int) -> str | None:
    """When process ``pid`` began, in the kernel's words; None if there is none, or a dead one not yet collected."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return _started_without_proc(pid)
    fields = line.rpartition(")")[2].split()  # the name before it may hold blanks
    return None if fields[0] in ("Z", "X") else fields[19]


def _started_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
