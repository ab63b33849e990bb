"""KV pages that outlive their request: a tree of full pages, each found by the tokens it holds.

A page is found only through its parent, so through all tokens before it, and by comparing its own
tokens; nothing is trusted to a hash. It knows neither requests nor launches.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Node:
    """A full page in the tree; num_users: requests whose chain it is in."""

    page: int
    key: bytes
    parent: "Node | None"
    salt: str
    num_users: int = 0
    children: dict[bytes, "Node"] = field(default_factory=dict)


class PrefixCache:
    """Pages by their tokens and all tokens before them; the unused ones, least recent first.

    A request's chain is a path from a root, one node per page: whoever uses a page uses those
    before it. They are left from the end, so a page is never evicted before its children.
    """

    def __init__(self) -> None:
        self._roots: dict[str, dict[bytes, Node]] = {}
        self._idle: OrderedDict[int, Node] = OrderedDict()
        self._num_used = 0

    @property
    def num_idle(self) -> int:
        """Pages that nobody uses: found if asked for, and free to be taken."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages in the chain of at least one request."""
        return self._num_used

    def match(self, salt: str, keys: Sequence[bytes]) -> list[Node]:
        """The longest known path along `keys`; using its nodes is for the caller to say."""
        found: list[Node] = []
        level = self._roots.get(salt, {})
        for key in keys:
            node = level.get(key)
            if node is None:
                break
            found.append(node)
            level = node.children
        return found

    def use(self, nodes: Iterable[Node]) -> None:
        """Adds a user to each."""
        for node in nodes:
            if node.num_users == 0:
                del self._idle[node.page]
                self._num_used += 1
            node.num_users += 1

    def publish(
        self, chain: list[Node], salt: str, keys: Sequence[bytes], pages: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Extends a user's chain by pages that hold `keys`' tokens.

        Where a page with the same tokens is known it joins the chain instead; but if nobody uses it
        the new one takes its place. Returns those of `pages` that are the cache's now, and those
        that no longer are.
        """
        parent = chain[-1] if chain else None
        level = self._roots.setdefault(salt, {}) if parent is None else parent.children
        taken, replaced = [], []
        for key, page in zip(keys, pages, strict=True):
            node = level.get(key)
            if node is None:
                node = level[key] = Node(page, key, parent, salt)
                taken.append(page)
            elif node.num_users == 0:
                del self._idle[node.page]
                replaced.append(node.page)
                taken.append(page)
                node.page = page
            self._num_used += node.num_users == 0
            node.num_users += 1
            chain.append(node)
            parent, level = node, node.children
        return taken, replaced

    def leave(self, chain: Sequence[Node]) -> None:
        """Takes a user off each node."""
        for node in reversed(chain):
            node.num_users -= 1
            if node.num_users == 0:
                self._idle[node.page] = node
                self._num_used -= 1

    def evict(self, count: int) -> list[int]:
        """Forgets the `count` pages unused for longest; they are the caller's."""
        evicted = []
        for _ in range(count):
            page, node = self._idle.popitem(last=False)
            assert not node.children, f"page {page} would be evicted before its children"
            if node.parent is not None:
                del node.parent.children[node.key]
            else:
                level = self._roots[node.salt]
                del level[node.key]
                if not level:
                    del self._roots[node.salt]
            evicted.append(page)
        return evicted

    def nodes(self) -> list[Node]:
        """All of them, for tests and for debugging."""
        found: list[Node] = []
        levels = list(self._roots.values())
        while levels:
            for node in levels.pop().values():
                found.append(node)
                levels.append(node.children)
        return found
