"""Language models that can be asked: an endpoint that speaks OpenAI's protocol, or a file of recorded responses."""

import email.utils
import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from vlmjax.errors import DataError

_MOST_BYTES = 4 << 20  # of a response
_LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
_LONGEST_ASKED = 600.0  # what a server may ask for


class Answer(NamedTuple):
    """What a model wrote, and whether it was cut at its limit of tokens."""

    text: str
    cut: bool = False


class Unanswered(Exception):
    """No response to one request, in spite of all tries; the run asks again when it is started anew."""


@runtime_checkable
class Model(Protocol):
    """Anything that answers."""

    def __call__(self, messages: Sequence[dict[str, str]], key: str, kind: str) -> Answer:
        """The response to {"role", "content"} messages about the image `key`.

        Raises:
            Unanswered: none for this one.
            DataError: none for any.
        """


@dataclass(frozen=True)
class Endpoint:
    """A server with OpenAI's `/chat/completions`: OpenAI itself, vLLM, SGLang, llama.cpp, Ollama.

    Tries again after a time-out, a broken connection, a 408, 409, 429 or 5xx, and a response that is not what the
    protocol says, waiting twice as long each time, or as long as the server asks (Retry-After).

    Attributes:
        url: up to and including the version, such as http://localhost:8000/v1.
        model: its name there.
        api_key: sent as a bearer token where it is not empty.
        timeout: seconds for one try.
        attempts: tries for one request.
        temperature, max_tokens, seed: of sampling.
        wait: seconds before the second try.
        sleep: how to wait.
    """

    url: str
    model: str
    api_key: str = field(default="", repr=False)
    timeout: float = 120.0
    attempts: int = 6
    temperature: float = 0.7
    max_tokens: int = 1024
    seed: int = 0
    wait: float = 1.0
    sleep: Callable[[float], None] = time.sleep

    def __call__(self, messages: Sequence[dict[str, str]], key: str, kind: str) -> Answer:
        """See `Model`."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        data, told = json.dumps(body).encode(), ""
        for attempt in range(self.attempts):
            try:
                return _answer(self._post(data))
            except _Again as error:
                told = str(error)
                if attempt + 1 < self.attempts:
                    self.sleep(self._pause(attempt, error.after))
        raise Unanswered(f"{self.attempts} tries: {told}")

    def _pause(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, _LONGEST_ASKED)
        # Spread, so that many workers turned away together do not come back together.
        return min(_LONGEST_WAIT, self.wait * 2**attempt) * random.uniform(0.75, 1.25)

    def _post(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                read = reply.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from error
        except (
            OSError,
            http.client.HTTPException,
        ) as error:  # time-outs and urllib's own errors are OSErrors
            raise _Again(f"{type(error).__name__}: {error}") from error
        if len(read) > _MOST_BYTES:
            raise _Again(f"more than {_MOST_BYTES >> 20} MiB")
        return read

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        try:
            told = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            told = ""
        if error.code in (408, 409, 429) or error.code >= 500:
            return _Again(f"HTTP {error.code} {told[:200]}", _seconds(error.headers.get("Retry-After")))
        return DataError(
            f"{self.url} refuses model {self.model!r}: HTTP {error.code} {' '.join(told.split())[:300]}; check "
            "--endpoint, --model and the key"
        )


class _Again(Exception):
    """Try again, `after` so many seconds where the server said so."""

    def __init__(self, told: str, after: float | None = None):
        super().__init__(told)
        self.after = after


def _seconds(header: str | None) -> float | None:
    """Retry-After in its two forms, seconds or a date; None for neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        parsed = email.utils.parsedate_tz(header)
        return None if parsed is None else max(0.0, email.utils.mktime_tz(parsed) - time.time())


def _answer(data: bytes) -> Answer:
    try:
        choice = json.loads(data)["choices"][0]
        text, why = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Again(f"not a chat completion ({type(error).__name__}): {data[:80]!r}") from error
    if text is not None and not isinstance(text, str):
        raise _Again(f"the content is a {type(text).__name__}")
    return Answer(text or "", why == "length")


class Recorded:
    """Responses from a jsonl file of {"id", "kind", "response"}: those that `--record` kept, or made elsewhere."""

    def __init__(self, path: str):
        """Read all of it. Raises DataError."""
        self._known: dict[tuple[str, str], Answer] = {}
        for number, row in enumerate(_rows(path), 1):
            try:
                self._known[str(row["id"]), row["kind"]] = Answer(row["response"], bool(row.get("cut")))
            except (TypeError, KeyError, AttributeError) as error:
                raise DataError(f"{path}: row {number} lacks id, kind or response") from error

    def __call__(self, messages: Sequence[dict[str, str]], key: str, kind: str) -> Answer:
        """See `Model`."""
        if (key, kind) not in self._known:
            raise Unanswered(f"no response of kind {kind} is recorded")
        return self._known[key, kind]


def _rows(path: str) -> list[Any]:
    try:
        with open(path, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path} is no jsonl file: {error}") from error
