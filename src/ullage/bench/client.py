"""One streamed request to an OpenAI-compatible endpoint: when its tokens came, and what went wrong."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _

#: A line of a stream longer than this is no token of a text model.
MAX_LINE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where and what to ask. ``api`` is completions or chat; ``headers`` may hold a key."""

    url: str
    model: str
    api: str = "completions"
    headers: dict[str, str] = field(default_factory=dict)
    timeout: float = 120.0

    @property
    def address(self) -> str:
        """The URL of the endpoint that streams."""
        return self.url + ("/v1/chat/completions" if self.api == "chat" else "/v1/completions")

    def body(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        """Return the request: greedy, streamed, with the usage at the end."""
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.api == "chat" else {"prompt": prompt}
        return {
            "model": self.model,
            **asked,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back.

    Attributes:
        t: when it was sent, seconds since the start of the bench.
        seconds: until the end of the stream.
        ttft: until the first token; None when none came.
        gaps: seconds between tokens that followed.
        prompt_tokens, output_tokens: as the endpoint counts, else output_tokens by the pieces that came.
        error: a sentence; empty when the stream came to its end.
    """

    t: float
    seconds: float
    ttft: float | None = None
    gaps: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int = 0
    error: str = ""


async def ask(client: Any, endpoint: Endpoint, prompt: str, output_tokens: int, clock: float) -> Answer:
    """Send one request and read its stream to the end."""
    import httpx

    sent = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    error = ""
    try:
        async with client.stream(
            "POST",
            endpoint.address,
            json=endpoint.body(prompt, output_tokens),
            headers=endpoint.headers,
            timeout=httpx.Timeout(endpoint.timeout),
        ) as response:
            if response.status_code != 200:
                text = (await response.aread())[:300].decode("utf-8", "replace")
                error = f"HTTP {response.status_code}: {' '.join(text.split())}"
            else:
                error = await _read(response, times, usage)
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}"[:300]
    done = time.perf_counter()
    counted = usage.get("completion_tokens")
    return Answer(
        t=sent - clock,
        seconds=done - sent,
        ttft=times[0] - sent if times else None,
        gaps=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
        prompt_tokens=usage.get("prompt_tokens") if isinstance(usage.get("prompt_tokens"), int) else None,
        output_tokens=counted if isinstance(counted, int) else len(times),
        error=error or ("" if times else "no token came"),
    )


async def _read(response: Any, times: list[float], usage: dict[str, Any]) -> str:
    """Read server-sent events; note when each piece of text came. Return an error that the stream reports."""
    async for line in response.aiter_lines():
        if not line.startswith("data:") or len(line) > MAX_LINE:
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            break
        found, text = parse_event(data)
        if isinstance(found.get("error"), (dict, str)) and found["error"]:
            return str(found["error"])[:300]
        if text:
            times.append(time.perf_counter())
        if isinstance(found.get("usage"), dict):
            usage.update(found["usage"])
    return ""


def parse_event(data: str) -> tuple[dict[str, Any], str]:
    """Return an event as an object, and the text it brings; an empty object for what is none."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}, ""
    if not isinstance(found, dict):
        return {}, ""
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta: dict[str, Any] = choice["delta"] if isinstance(choice.get("delta"), dict) else {}
    pieces = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning"))
    return found, "".join(piece for piece in pieces if isinstance(piece, str))


async def first_model(client: Any, url: str, headers: dict[str, str]) -> str | None:
    """Return the first model that the endpoint lists; None when it lists none.

    Raises:
        InputError: nothing answers there.
    """
    import httpx

    try:
        response = await client.get(f"{url}/v1/models", headers=headers, timeout=10.0)
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        raise InputError(_("the endpoint cannot be reached ({why})").format(why=why[:200]), where=url[:200]) from None
    try:
        listed = response.json()["data"]
        return str(listed[0]["id"]) if response.status_code == 200 and listed else None
    except (ValueError, KeyError, IndexError, TypeError):
        return None
