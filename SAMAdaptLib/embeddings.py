"""Embeddings kept in memory, so that each further click on a slice costs a decoding only.

Embeddings can be turned back into pictures of the patient: they stay in memory and go with the predictor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class EmbeddingCache(Generic[Value]):
    """Keeps the embeddings used last, up to a number of bytes.

    Args:
        size_of: Bytes that an embedding takes.
        capacity_bytes: What all may take together; the one just made always stays.
    """

    def __init__(self, size_of: Callable[[Value], int], capacity_bytes: int = 1 << 30) -> None:
        """Start empty."""
        self._size_of = size_of
        self._capacity_bytes = capacity_bytes
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self.held_bytes = 0
        self.encoded = 0

    def get(self, key: Hashable, encode: Callable[[], Value]) -> Value:
        """Return what is kept under `key`, else call `encode` once and keep its result."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = encode()
        self.encoded += 1
        self.held_bytes += self._size_of(value)
        while self.held_bytes > self._capacity_bytes and len(self._values) > 1:
            _, oldest = self._values.popitem(last=False)
            self.held_bytes -= self._size_of(oldest)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
        self.held_bytes = 0

    def __len__(self) -> int:
        """Count the embeddings kept."""
        return len(self._values)
