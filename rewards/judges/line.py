"""The line to a server: JSON posted over HTTP, within its limits, and posted again where that may help.

What is worth another try is a connection that fails, an answer that does not come in time, and the statuses by which a
server says "later" (429, 5xx and the like). A server that says how long to wait (Retry-After, RFC 9110, 10.2.3) is left
alone for so long by all requests on the line. Lines live on one background thread with an event loop of its own: so
requests go on while a run's own loop is busy sampling, and limits hold for every loop that a program starts.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import threading
import time
from collections.abc import Coroutine
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rlft.types import InputError

if TYPE_CHECKING:
    import httpx

LATER = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
REFUSED = {401, 403, 404, 405}  # a wrong key, model or address: no request will fare better
SHOWN = 500  # characters of a server's answer in a message
CHANCE = random.SystemRandom()  # the global one belongs to the run, which resumes it bit for bit


def _variable(name: str | None) -> str | None:
    if name is not None and not all(
        letter.isascii() and (letter.isupper() or letter in "_0123456789") for letter in name
    ):
        # The message must not repeat it: it may be the key itself.
        raise ValueError(
            "name the environment variable that holds the key, in capitals, such as JUDGE_KEY; not the key"
        )
    return name


def _address(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("it must begin with http:// or https://")
    if "@" in url.split("/")[2]:
        raise ValueError("a password does not belong into a config; name the variable that holds a key in api_key_env")
    return url.rstrip("/")


Variable = Annotated[str | None, AfterValidator(_variable)]
Url = Annotated[str, AfterValidator(_address)]


class Server(BaseModel):
    """Where a server is, and how it is to be treated."""

    model_config = ConfigDict(extra="forbid")

    url: Url = Field(description="The server's address.")
    api_key_env: Variable = Field(
        default=None, description="Name of the environment variable that holds the key. None: no key is sent."
    )
    timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False, description="Seconds for one try, all in all.")
    retries: int = Field(default=5, ge=0, description="Further tries after one that failed in a way that may pass.")
    backoff: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds before the second try; each next wait is twice that.",
    )
    longest_wait: float = Field(
        default=60.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that a wait may last. A server that asks for a longer one has failed.",
    )
    concurrent: int = Field(default=16, ge=1, description="Requests under way at once.")
    per_minute: float | None = Field(
        default=None, gt=0, description="Requests begun in a minute, evenly spaced, retries included. None: any number."
    )

    def line(self) -> Line:
        """The line to this server. Those with the same address, key and limits share one.

        Raises InputError where the environment lacks the key, or httpx is missing.
        """
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise InputError(
                f"api_key_env: the environment variable {self.api_key_env} is not set, and {self.url} is to be given "
                f"the key in it. Set it (export {self.api_key_env}=...), or remove `api_key_env` if no key is needed."
            )
        own = {"url", "api_key_env", "timeout", "retries", "backoff", "longest_wait", "concurrent", "per_minute"}
        return _line(self.model_dump_json(include=own), os.environ.get(self.api_key_env or "", ""))


class Refused(Exception):
    """The server answered with an error. status: the HTTP status. body: what it said, whole."""

    def __init__(self, message: str, status: int, body: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class Line:
    """A server, its key, and its limits. Made by `Server.line`.

    tries: attempts so far, over all requests.
    """

    def __init__(self, server: Server, key: str) -> None:
        try:
            import httpx
        except ImportError as error:
            raise InputError("a reward that asks a server needs the package httpx: pip install httpx") from error
        self._httpx = httpx
        self._server = server
        self._key = key
        self._client: httpx.AsyncClient | None = None
        self._places = asyncio.Semaphore(server.concurrent)
        self._next = 0.0  # when the next request may begin, by time.monotonic
        self.tries = 0

    async def post(self, path: str, body: bytes) -> Any:
        """What the server answers to JSON posted to <url>/<path>, read as JSON.

        Raises TimeoutError, Refused, ConnectionError or ValueError (no JSON) after the last try; InputError where no
        request can succeed (key, model or address refused).
        """
        return await in_background(self.send(path, body))

    async def send(self, path: str, body: bytes) -> Any:
        """`post` for what runs in the background already."""
        for left in reversed(range(self._server.retries + 1)):
            async with self._places:
                await self._turn()
                self.tries += 1
                outcome = await self._once(path, body)
            if not isinstance(outcome, _Again):
                return outcome
            wait = outcome.wait
            if left == 0 or (wait or 0) > self._server.longest_wait:
                raise outcome.error
            if wait is not None:  # the server's word counts for every request on this line
                self._next = max(self._next, time.monotonic() + wait)
                continue
            doubled = self._server.backoff * 2 ** (self._server.retries - left)
            await asyncio.sleep(min(doubled, self._server.longest_wait) * CHANCE.uniform(0.5, 1))
        raise AssertionError("the last try returns or raises")

    async def _turn(self) -> None:
        """Wait for the time at which this request may begin."""
        while (wait := self._next - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        if self._server.per_minute is not None:
            self._next = time.monotonic() + 60 / self._server.per_minute

    async def _once(self, path: str, body: bytes) -> Any:
        """The answer, or why another try may help. Raises what no try would mend."""
        client = self._client = self._client or self._httpx.AsyncClient(
            timeout=None, limits=self._httpx.Limits(max_connections=None)
        )
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            # httpx limits each read, so that a server which drips could hold a request for ever.
            async with asyncio.timeout(self._server.timeout):
                answer = await client.post(f"{self._server.url}/{path}", content=body, headers=headers)
        except TimeoutError:
            return _Again(TimeoutError(f"{self._server.url} did not answer within {self._server.timeout:g} s"))
        except self._httpx.TransportError as error:
            said = self._without_key(f"{type(error).__name__}: {error}")
            return _Again(ConnectionError(f"{self._server.url} cannot be reached ({said})"))
        if answer.status_code == 200:
            return self._read(answer)
        return self._unwelcome(answer)

    def _read(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError:
            said = self._without_key(answer.text)[:SHOWN]
            raise ValueError(f"{self._server.url} answered something that is no JSON: {said!r}") from None

    def _unwelcome(self, answer: httpx.Response) -> _Again:
        said = self._without_key(answer.text)
        status = answer.status_code
        message = f"{self._server.url} answered with status {status}: {said[:SHOWN]}"
        if status in REFUSED:
            hint = "`api_key_env`" if status in (401, 403) else "`url` (and `model`)"
            raise InputError(f"{message}. Every request would fare so: check {hint}.")
        refused = Refused(message, status, said)
        if status not in LATER:
            raise refused
        return _Again(refused, _asked(answer.headers))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, f"${self._server.api_key_env}") if self._key else text


class _Again:
    """A try that failed, and may be made again. wait: seconds that the server asks for."""

    def __init__(self, error: Exception, wait: float | None = None) -> None:
        self.error = error
        self.wait = wait


def _asked(headers: httpx.Headers) -> float | None:
    """Seconds that a server wants to be left alone: Retry-After as a number or a date, or OpenAI's retry-after-ms."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        return max(0.0, float(headers["retry-after"]))
    except KeyError:
        return None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


@cache
def _line(server: str, key: str) -> Line:
    return Line(Server.model_validate_json(server), key)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all lines, started when first needed."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="rlft-lines").start()
    return loop


def in_background(work: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
    """Run a coroutine on the loop of the lines; the future belongs to the loop that asks."""
    return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _loop()))
