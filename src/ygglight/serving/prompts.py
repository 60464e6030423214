"""From the body of a request to the tokens of its prompts."""

from __future__ import annotations

from typing import Any

from ygglight.serving.errors import bad_request
from ygglight.serving.schemas import ChatBody, CompletionBody

_ROLES = ("system", "developer", "user", "assistant")
_PROMPT_TYPES = "prompt: give a string, a list of strings, a list of tokens or a list of lists of tokens"


class Prompts:
    """Makes tokens of prompts and of chats.

    Args:
        tokenizer: A transformers tokenizer that no other thread works with.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = len(tokenizer)

    def of_completion(self, body: CompletionBody) -> list[list[int]]:
        """Tokens of each prompt of a completion.

        Raises:
            ApiError: 400 for another type, an empty prompt or a token that the vocabulary has not.
        """
        prompt = body.prompt
        if prompt is None:
            raise bad_request("you must give the field prompt", "prompt", "missing_required_parameter")
        if isinstance(prompt, str):
            return [self._encode(prompt)]
        if not isinstance(prompt, list):
            raise bad_request(_PROMPT_TYPES, "prompt", "invalid_value")
        if prompt and all(isinstance(part, str) for part in prompt):
            return [self._encode(part) for part in prompt]
        if prompt and all(isinstance(part, list) for part in prompt):
            return [self._checked(part) for part in prompt]
        return [self._checked(prompt)]

    def of_chat(self, body: ChatBody) -> list[list[int]]:
        """Tokens of the one prompt of a chat, by the tokenizer's chat template.

        Raises:
            ApiError: 400 when there is no template, or it refuses the messages, or they are not messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise bad_request("this model's tokenizer has no chat template: use /v1/completions", "messages")
        messages = body.messages
        if not isinstance(messages, list) or not messages:
            raise bad_request("messages: give a list of at least one message", "messages", "invalid_value")
        plain = [_message(message, index) for index, message in enumerate(messages)]
        try:
            text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything: jinja2's errors, or its own by raise_exception
            raise bad_request(f"the chat template refuses these messages: {error}", "messages") from error
        return [self._encode(text, "messages", special=False)]  # the template writes the special tokens itself

    def text(self, tokens: list[int]) -> str:
        """Text of tokens, special ones too."""
        return str(self._tokenizer.decode(tokens))

    def _encode(self, text: str, param: str = "prompt", special: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # "\ud800" is valid JSON
            raise bad_request(f"{param}: half a surrogate pair is no text", param, "invalid_value") from error
        return self._checked(list(self._tokenizer(text, add_special_tokens=special)["input_ids"]), param)

    def _checked(self, tokens: list[Any], param: str = "prompt") -> list[int]:
        if not tokens:
            raise bad_request(f"{param} has no tokens: give at least one", param, "invalid_value")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int):
                raise bad_request(_PROMPT_TYPES, param, "invalid_value")
            if not 0 <= token < self._vocabulary:
                raise bad_request(
                    f"{param}: the vocabulary ends at {self._vocabulary - 1} and has no token {token}",
                    param,
                    "invalid_value",
                )
        return tokens


def _message(message: Any, index: int) -> dict[str, str]:
    """A message with plain text, as chat templates take it."""
    param = f"messages.{index}"
    if not isinstance(message, dict):
        raise bad_request(f"{param}: give an object with role and content", param, "invalid_value")
    role = message.get("role")
    if role not in _ROLES:
        raise bad_request(f"{param}.role: give one of {', '.join(_ROLES)}", f"{param}.role", "invalid_value")
    plain = {"role": "system" if role == "developer" else role, "content": _content(message.get("content"), param)}
    if isinstance(message.get("name"), str):
        plain["name"] = message["name"]
    return plain


def _content(content: Any, param: str) -> str:
    """The text of a message, given as a string or as parts of type text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        of_type = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        parts = [text for text in of_type if isinstance(text, str)]
        if len(parts) == len(content):
            return "".join(parts)
    raise bad_request(
        f"{param}.content: give a string or a list of parts of type text", f"{param}.content", "invalid_value"
    )
