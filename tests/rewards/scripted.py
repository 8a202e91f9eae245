"""A server on a real socket that answers as a test says, and remembers what it was asked."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


@dataclass
class Answer:
    """One reply as it goes over the wire. wait: seconds before it; drip: seconds before each of its bytes."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    drip: float = 0.0


@dataclass
class Asked:
    """One request."""

    at: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        return self.body["messages"][-1]["content"]


class Scripted:
    """asked: the requests so far. most: how many were under way at once at most. wait: seconds for each.

    close: shuts the server down, as the end of the block does that it was made for.
    """

    def __init__(self, script: Callable[[Asked], str | Answer], wait: float) -> None:
        self.script, self.wait = script, wait
        self.asked: list[Asked] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        self.port = 0
        self.close: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def judge(self, **more: Any) -> dict[str, Any]:
        """A judge's block that asks here; it does not wait long between tries."""
        return {"url": self.url, "model": "m", "backoff": 0.01, **more}

    def respond(self, asked: Asked) -> Answer:
        with self._lock:
            self.asked.append(asked)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            time.sleep(self.wait)
            said = self.script(asked)
            return said if isinstance(said, Answer) else chat(said)
        finally:
            with self._lock:
                self._now -= 1


def chat(text: str, usage: Any = USAGE, finish: str = "stop", logprobs: Any = None) -> Answer:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
    return Answer(json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode())


def scored(value: Any) -> str:
    return json.dumps({"reason": "so", "score": value})


def texts(prompt: str) -> list[str]:
    """What stands between the tags that mark what is judged, in order."""
    found = re.findall(r"<([\w-]+-[0-9a-f]{8})>\n(.*?)\n</\1>", prompt, re.S)
    return [text for _, text in found]


@contextmanager
def serving(script: Callable[[Asked], str | Answer], wait: float = 0.0) -> Iterator[Scripted]:
    """The server, while the block runs."""
    scripted = Scripted(script, wait)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = scripted.respond(Asked(time.monotonic(), self.path, dict(self.headers), body))
            time.sleep(answer.wait)
            try:
                self.send_response(answer.status)
                for key, value in answer.headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                for piece in [answer.body] if not answer.drip else [bytes([byte]) for byte in answer.body]:
                    time.sleep(answer.drip)
                    self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client has given up, as some tests want

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    scripted.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    scripted.close = close
    try:
        yield scripted
    finally:
        close()
