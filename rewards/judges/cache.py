"""Answers kept on disk, in one SQLite file that several processes may use at once.

An answer is kept under the hash of the whole request, so that any other prompt, model, sampling setting or server is
another answer. The requests themselves are not kept, and no key ever comes here.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

from rlft.types import InputError

PATIENCE = 60  # seconds to wait for another process that writes


def key_of(*request: Any) -> str:
    """The name of a request: a hash over everything that it consists of."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Cache:
    """A file of answers. Raises InputError where it cannot be had."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=PATIENCE, check_same_thread=False, isolation_level=None)
            # A log beside the file: readers never wait for a writer. Not for a network's file system.
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"cache: {path} cannot be used as a file of answers ({error}). Name a file on a local disk that may be "
                "written, or remove `cache`."
            ) from error

    def get(self, key: str) -> Any:
        """The answer kept under a key; None without one."""
        with self._lock:
            row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, answer: Any) -> Any:
        """Keep an answer, unless another process was first; what is kept now."""
        text = json.dumps(answer, ensure_ascii=False)
        with self._lock:
            self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, text))
            row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0])
