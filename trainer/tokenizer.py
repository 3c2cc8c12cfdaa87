"""Text to token ids and back: raw bytes, or any Hugging Face tokenizer by the same interface."""

from functools import lru_cache
from typing import Any, Protocol

Prompt = str | list[dict[str, str]]  # text, or messages {"role", "content"}


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer. Ids are in [0, vocab_size)."""

    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with no special token put before or after it."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out."""

    def render(self, prompt: Prompt) -> str:
        """The prompt as one text, ready for `encode`, where the assistant's answer comes next."""

    def ids(self) -> dict[str, int]:
        """The id of every token."""


class ByteTokenizer:
    """UTF-8 bytes and one end-of-text id: needs no file and no network."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids above 255 nothing."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def render(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else _transcript(prompt)

    def ids(self) -> dict[str, int]:
        return {f"<{i:02x}>": i for i in range(256)}


class HuggingFaceTokenizer:
    """A tokenizer of `transformers`, from a local folder or by its hub name."""

    def __init__(self, name: str) -> None:
        # seconds to import, and the byte tokenizer needs none
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"tokenizer {name!r}: {reason}") from error
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer {name!r} has no end-of-text token (eos_token)")
        self.vocab_size = len(self._tokenizer)  # its own vocab_size leaves added tokens out
        self.eos_id: int = self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def render(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        if self._tokenizer.chat_template is None:
            return _transcript(prompt)
        return self._tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )

    def ids(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()


@lru_cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "bytes", a local folder, or a name on the Hugging Face hub.

    Raises ValueError when it cannot be loaded or has no end-of-text token.
    """
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)


def are_same(one: str, other: str) -> bool:
    """Whether two tokenizers, by name, give the same ids: copies of one lie in several folders."""
    if one == other:
        return True
    a, b = load_tokenizer(one), load_tokenizer(other)
    return (a.ids(), a.eos_id) == (b.ids(), b.eos_id)


def _transcript(messages: list[dict[str, str]]) -> str:
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
