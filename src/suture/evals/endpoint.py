"""A judge behind an OpenAI-compatible address: bounded in time, size and number of questions."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from suture.errors import RecipeError

A = TypeVar("A")

LIMIT = 1 << 20
"""Bytes of an answer that are read."""
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""States of a server that may pass."""
PATIENCE = 3
"""Questions in a row without any answer, after which nothing more is asked."""


@dataclass(frozen=True)
class Endpoint:
    """Where a judge answers, and how long it is waited for."""

    url: str
    """Up to and without ``/chat/completions``."""
    model: str
    timeout: float = 60.0
    """Seconds for one question."""
    retries: int = 2
    wait: float = 1.0
    """Seconds before the first retry; doubled each time."""
    concurrency: int = 4
    """Questions at once."""
    key_env: str = ""
    """The environment variable that holds the key, where one is needed."""
    max_tokens: int = 16

    def problem(self) -> str | None:
        """What is wrong with it, before anything is asked; ``None`` when nothing is."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return f"url: {self.url!r} is no http or https address"
        if not self.model:
            return "model: missing: which model of the server judges"
        if not 0 < self.timeout <= 3600 or not 0 <= self.retries <= 20 or not 0 <= self.wait <= 60:
            return "timeout is up to 3600 seconds, retries up to 20, wait up to 60 seconds"
        if not 1 <= self.concurrency <= 64:
            return f"concurrency: 1 to 64 questions at once, not {self.concurrency}"
        if self.key_env and not os.environ.get(self.key_env):
            return f"key_env: the environment variable {self.key_env} is not set"
        return None


class _Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: prompts, answers and the key are for the address that was given."""

    def redirect_request(self, *_: object) -> None:
        """No request; the state of the server is an error then."""


class Silent(RecipeError):
    """The server did not answer one question; another may be answered."""


def ask(endpoint: Endpoint, question: str) -> str:
    """What the server says to one question.

    Raises:
        Silent: it did not answer in time, or not as a chat completion.
        RecipeError: it refuses to be asked: no such address, no permission.
    """
    body = json.dumps({
        "model": endpoint.model, "temperature": 0, "max_tokens": endpoint.max_tokens,
        "messages": [{"role": "user", "content": question}],
    }).encode()  # fmt: skip
    headers = {"Content-Type": "application/json"}
    if endpoint.key_env:
        headers["Authorization"] = f"Bearer {os.environ[endpoint.key_env]}"
    address = endpoint.url.rstrip("/") + "/chat/completions"
    reason, opener = "", urllib.request.build_opener(_Stay)
    for attempt in range(endpoint.retries + 1):
        if attempt:
            time.sleep(endpoint.wait * 2 ** (attempt - 1))
        request = urllib.request.Request(address, body, headers)
        try:
            with opener.open(request, timeout=endpoint.timeout) as answer:
                return _said(_read(answer, time.monotonic() + endpoint.timeout))
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"HTTP {error.code}"
            if error.code not in RETRIED:
                raise RecipeError(f"judge {address}: {reason}; is it the right address, model "
                                  "and key?") from None  # fmt: skip
        except (OSError, ValueError) as error:  # timeouts, refusals, broken connections, no JSON
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise Silent(f"judge {address}: no answer in {endpoint.retries + 1} attempts: {reason}")


def _read(answer: http.client.HTTPResponse, until: float) -> bytes:
    """What comes in time: a socket's own timeout begins anew with every byte."""
    found = b""
    while len(found) < LIMIT and (part := answer.read1(LIMIT - len(found))):
        found += part
        if time.monotonic() > until:
            raise TimeoutError("timed out")
    return found


def _said(raw: bytes) -> str:
    try:
        text = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise ValueError("it is no chat completion") from None
    if not isinstance(text, str):
        raise ValueError("it is no chat completion: no text")
    return text


def ask_all(
    endpoint: Endpoint, questions: Sequence[str], parse: Callable[[str], A | None],
    got: Callable[[int, A | None], None],
) -> None:  # fmt: skip
    """Ask all questions, several at once; ``got`` takes each verdict as soon as it is there.

    A question without an answer, or with one that cannot be read, has the verdict ``None``.

    Raises:
        RecipeError: the server refuses to be asked, or is silent ``PATIENCE`` times in a row; what
            ``got`` has taken before stays.
    """
    silent, stop = 0, threading.Event()

    def one(number: int) -> str | Silent | None:
        if stop.is_set():
            return None
        try:
            return ask(endpoint, questions[number])
        except Silent as error:
            return error
        except RecipeError:
            stop.set()
            raise

    with ThreadPoolExecutor(endpoint.concurrency) as pool:
        waiting = {pool.submit(one, number): number for number in range(len(questions))}
        try:
            for done in as_completed(waiting):
                said = done.result()
                if isinstance(said, str):
                    silent = 0
                    got(waiting[done], parse(said))
                    continue
                silent += 1
                if isinstance(said, Silent):
                    got(waiting[done], None)
                    if silent >= min(PATIENCE, len(questions)):
                        raise RecipeError(f"{said}; {silent} questions in a row. The same command "
                                          "goes on with what has been judged")  # fmt: skip
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
