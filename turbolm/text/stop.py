"""Stop strings, found across any borders between pieces of text."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Cuts a stream of text at the first stop string.

    The match that ends first wins, as if text came character by character, so the result does not
    depend on how the text is cut into pieces; of several that end at the same character, the longest.
    Text is held back only while it is the beginning of a stop string. Aho-Corasick: time is linear
    in the text however many stop strings there are.

    After a match, `matched` is the stop string and `start` and `end` are its place in the whole
    text, in characters: what belongs to the answer is `text[:start]` (`text[:end]` with
    `include_stop`). A caller that pushes token by token knows the token in which the stop ended.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self.matched: str | None = None
        self.start: int | None = None
        self.end: int | None = None
        self._include_stop = include_stop
        self._num_read = 0  # characters of all text before the current piece
        self._node = 0
        # Node 0 is the empty string; every other node is a beginning of a stop string.
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]  # longest proper suffix that is a node
        self._depth = [0]  # length
        self._stop = [""]  # a stop string that begins so
        self._match: list[str | None] = [None]  # longest stop string that ends so
        for stop in stops:
            assert stop, "empty stop string"
            self._insert(stop)
        self._link()
        first = "".join(re.escape(char) for char in self._next[0])
        self._first_char = re.compile(f"[{first}]") if first else None

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._next[node].get(char)
            if child is None:
                child = len(self._next)
                self._next[node][char] = child
                self._next.append({})
                self._fallback.append(0)
                self._depth.append(self._depth[node] + 1)
                self._stop.append(stop)
                self._match.append(None)
            node = child
        self._match[node] = stop

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            fallback = self._fallback[node]
            if self._match[node] is None:
                self._match[node] = self._match[fallback]
            for char, child in self._next[node].items():
                self._fallback[child] = self._step(fallback, char)
                queue.append(child)

    def _step(self, node: int, char: str) -> int:
        while node and char not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(char, 0)

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to emit, the stop string found or None). Text after a stop string is dropped."""
        if self.matched is not None:
            return "", self.matched
        if self._first_char is None:
            return text, None
        origin = self._node  # what is held back is this node's string
        node, position = origin, 0
        while position < len(text):
            if not node:
                found = self._first_char.search(text, position)
                if found is None:
                    break
                position = found.start()
            node = self._step(node, text[position])
            position += 1
            stop = self._match[node]
            if stop is not None:
                self.matched = stop
                self.end = self._num_read + position
                self.start = self.end - len(stop)
                self._node = 0
                return self._cut(origin, text[:position], 0 if self._include_stop else len(stop)), stop
        self._node = node
        self._num_read += len(text)
        return self._cut(origin, text, self._depth[node]), None

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        node, self._node = self._node, 0
        return self._stop[node][: self._depth[node]]

    def _cut(self, origin: int, text: str, num_held: int) -> str:
        """What was held back at node `origin`, plus `text`, without the last `num_held` characters."""
        num_before = self._depth[origin]
        num_emitted = num_before + len(text) - num_held
        if num_emitted <= num_before:
            return self._stop[origin][:num_emitted]
        return self._stop[origin][:num_before] + text[: num_emitted - num_before]
