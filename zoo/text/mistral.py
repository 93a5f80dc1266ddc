"""The chat format of Mistral's own tokenizer files: not a template but code, in mistral-common, by the file's version.

transformers uses the same library, so without it neither has the format.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

MISSING = (
    "the chat format of {} is code in mistral-common, which is not installed (pip install mistral-common)"
)


def file_of(root: Path) -> Path | None:
    """Mistral's own tokenizer file in the folder `root`, or None."""
    named = [root / "tekken.json", *sorted(root.glob("tokenizer.model.v[0-9]*"), reverse=True)]
    return next((file for file in named if file.is_file()), None)


def installed() -> bool:
    return importlib.util.find_spec("mistral_common") is not None


def chat(file: Path, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of the messages, ready for the model's answer. Raises ZooError where the library is missing, and whatever
    it raises of a conversation that it does not allow."""
    try:
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    except ImportError as error:
        raise ZooError(f"{file}: {MISSING.format(file.name)}: {error}") from None
    request = ChatCompletionRequest.from_openai(messages=[dict(m) for m in messages])
    return list(MistralTokenizer.from_file(str(file)).encode_chat_completion(request).tokens)
