"""KV pages that outlive their request: a tree of full pages, each found by the tokens it holds.

A page is found only through its parent, so through all tokens before it, and by comparing its own
tokens; nothing is trusted to a hash. It knows neither requests nor launches.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

type Place = tuple[Node | str, bytes]
"""Where a page is in the tree: the page before it (the first has a salt), and its own tokens."""


@dataclass(slots=True, eq=False)
class Node:
    """A full page in the tree; num_users: requests whose chain it is in."""

    page: int
    place: Place
    num_users: int = 0
    num_children: int = 0


class PrefixCache:
    """Pages by their tokens and all tokens before them; the unused ones, least recent first.

    A request's chain is a path from a root, one node per page: whoever uses a page uses those
    before it. They are left from the end, so a page is never evicted before its children.
    """

    def __init__(self) -> None:
        self._nodes: dict[Place, Node] = {}
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
        before: Node | str = salt
        for key in keys:
            node = self._nodes.get((before, key))
            if node is None:
                break
            found.append(node)
            before = node
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
        before: Node | str = chain[-1] if chain else salt
        nodes, taken, replaced = self._nodes, [], []
        for key, page in zip(keys, pages, strict=True):
            place = (before, key)
            node = nodes.get(place)
            if node is None:
                node = nodes[place] = Node(page, place)
                if not isinstance(before, str):
                    before.num_children += 1
                taken.append(page)
            elif node.num_users == 0:
                del self._idle[node.page]
                replaced.append(node.page)
                taken.append(page)
                node.page = page
            self._num_used += node.num_users == 0
            node.num_users += 1
            chain.append(node)
            before = node
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
            assert not node.num_children, f"page {page} would be evicted before its children"
            before, _ = node.place
            if not isinstance(before, str):
                before.num_children -= 1
            del self._nodes[node.place]
            evicted.append(page)
        return evicted

    def nodes(self) -> list[Node]:
        """All of them, for tests and for debugging."""
        return list(self._nodes.values())
