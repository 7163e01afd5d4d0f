"""JSON and CSV files that carry the SHA-256 of their own content: damage to them is told, and never read as a value.

A digest tells damage, not forgery. Files of earlier versions have none; they are read, and said to be unchecked.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

KEY = "content_sha256"


def seal(content: Mapping[str, Any]) -> str:
    """The JSON text of a dict with the digest of its content."""
    return json.dumps({KEY: _digest(json.loads(json.dumps(content))), **content}, indent=1) + "\n"


def seal_line(content: Mapping[str, Any]) -> str:
    """As `seal`, in one line."""
    return json.dumps({KEY: _digest(json.loads(json.dumps(content))), **content})


def unseal(text: str | bytes, name: Any, say: Callable[[str], None] | None) -> dict[str, Any]:
    """The dict of a JSON text without its digest, which is compared.

    Args:
        name: the file, for `say`.
        say: receives one line where the text has no digest; None: nothing is said.

    Raises:
        ValueError: the text is no JSON object, or its content is not that of its digest.
    """
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        if KEY in content:
            if content.pop(KEY) != _digest(content):
                raise ValueError("its digest says that it is damaged")
            return content
        for key, value in content.items():  # the digest under a damaged name
            if isinstance(value, str) and value == _digest({k: v for k, v in content.items() if k != key}):
                raise ValueError(f"it is damaged: {key!r} is no key of such a file")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if say:
        say(f"{name}: has no digest, as earlier versions wrote it: unchecked")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_COLUMN = "sha256="


def seal_table(text: str) -> str:
    """The CSV text with one more column, whose name holds the digest of the text and whose cells are missing."""
    head, _, lines = text.partition("\n")
    return f"{head},{_COLUMN}{hashlib.sha256(text.encode()).hexdigest()}\n{lines}"


def unseal_table(text: str, name: Any, say: Callable[[str], None]) -> str:
    """The CSV text as it was before `seal_table`; errors and `say` as of `unseal`."""
    head, _, lines = text.partition("\n")
    columns, comma, last = head.rpartition(",")
    if comma and last.startswith(_COLUMN):
        if last != _COLUMN + hashlib.sha256(f"{columns}\n{lines}".encode()).hexdigest():
            raise ValueError("its digest says that it is damaged or cut")
        return f"{columns}\n{lines}"
    if re.search("[0-9a-f]{60}", head):  # the digest under a damaged name
        raise ValueError("its first line is damaged")
    say(f"{name}: has no digest, as earlier versions wrote it: unchecked")
    return text
