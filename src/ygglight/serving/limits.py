"""How much a client may ask for, and the key that lets it in."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Limits of the HTTP front. How many requests may wait is the engine's: it answers with ``QueueFull``.

    Args:
        max_body_bytes: Largest body of a request; more is a 413.
        max_prompt_tokens: Longest prompt in tokens; None: what the engine's context allows.
        max_answer_tokens: Longest answer in tokens; more is a 400, and an answer of no stated length gets this. None:
            what the context leaves.
        max_choices: Most answers of one HTTP request, prompts times ``n``.
        max_stop: Most stop strings.
    """

    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    max_choices: int = 64
    max_stop: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            optional = field.default is None
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{field.name} is {value!r}: give a whole number from 1{' or null' if optional else ''}"
                )


def api_key_from_env(name: str | None) -> str | None:
    """The API key that an environment variable holds.

    Args:
        name: Name of the variable; None: no key is asked for.

    Raises:
        ValueError: The variable is not set or is empty: that would serve everybody where a key was meant.
    """
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key.strip():
        raise ValueError(f"api_key_env={name!r}, but that environment variable is not set: export it, or leave it out")
    return key.strip()
