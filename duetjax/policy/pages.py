"""Who has which KV page: free -> held -> quarantined until a launch completes -> free or cached."""

from collections.abc import Iterable, Sequence

from duetjax.policy.launch import Ticket
from duetjax.policy.prefix_cache import Node, PrefixCache


class PagePool:
    """Hands out the pages [1, num_pages) of a KV pool; page 0 is the dummy and stays here.

    A page is free, held by one owner, in the prefix cache (used or idle), or quarantined: given
    back by an owner whom a launch in flight may still write for. Deterministic: fresh pages come
    in ascending order, pages given back are the next to go out again, and the cache loses idle
    pages, the least recently used first, only when no page is free.
    """

    def __init__(self, num_pages: int, *, prefix_caching: bool = True) -> None:
        assert num_pages >= 2, f"{num_pages} pages: one is the dummy, at least one must be usable"
        self.num_usable = num_pages - 1
        self.cache = PrefixCache()
        self._is_caching = prefix_caching
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: the last one goes out next
        self._held: set[int] = set()  # asked for membership only, so its order reaches nothing
        self._quarantined: dict[Ticket, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that `take` could hand out now: free ones, and idle ones of the cache."""
        return len(self._free) + self.cache.num_idle

    @property
    def num_quarantined(self) -> int:
        """Pages that will be free once their launches have completed."""
        return sum(map(len, self._quarantined.values()))

    def take(self, count: int) -> list[int] | None:
        """`count` pages for one owner, or None (and nothing taken) where fewer are available."""
        assert count >= 0, f"cannot take {count} pages"
        if count > self.num_available:
            return None
        missing = count - len(self._free)
        if missing > 0:
            self._free[:0] = reversed(self.cache.evict(missing))
        taken = [self._free.pop() for _ in range(count)]
        self._held.update(taken)
        return taken

    def publish(self, chain: list[Node], salt: str, key: bytes, page: int) -> None:
        """Puts a full page that its owner will not write again where others find it.

        Its owner goes on using it, as the next one of its chain.
        """
        if not self._is_caching:
            return
        assert page in self._held, f"page {page} is not held by anyone"
        self.cache.publish(chain, salt, key, page)
        if chain[-1].page == page:
            self._held.remove(page)

    def give_back(self, pages: Sequence[int], chain: list[Node], ticket: Ticket | None) -> None:
        """Takes an owner's pages back; those in its chain stay in the cache.

        ticket: the last launch that may write the others; None where none is in flight.
        """
        shared = {node.page for node in chain}
        private = [page for page in pages if page not in shared]
        self.cache.leave(chain)
        for page in private:
            assert page in self._held, f"page {page} of {list(pages)} is not held by anyone"
            self._held.remove(page)
        if ticket is None:
            self._free.extend(reversed(private))
        elif private:
            self._quarantined.setdefault(ticket, []).extend(private)

    def complete(self, ticket: Ticket) -> None:
        """Frees what has waited for this launch."""
        self._free.extend(reversed(self._quarantined.pop(ticket, [])))

    def check_integrity(self, owned: Iterable[tuple[Sequence[int], Sequence[Node]]]) -> None:
        """Asserts that each page is in one place; owned: every owner's pages and chain.

        O(num_pages): for tests and for debugging.
        """
        private: list[int] = []
        users: dict[int, int] = {}
        for pages, chain in owned:
            shared = {node.page for node in chain}
            private += [page for page in pages if page not in shared]
            for node in chain:
                users[node.page] = users.get(node.page, 0) + 1
        nodes = {node.page: node.num_users for node in self.cache.nodes()}
        assert sorted(private) == sorted(self._held), (
            f"owners hold {sorted(private)}, handed out are {sorted(self._held)}"
        )
        used = {page: count for page, count in nodes.items() if count}
        assert used == users, f"pages in use {used}, in chains {users}"
        assert len(nodes) == self.cache.num_idle + self.cache.num_used
        waiting = [page for pages in self._quarantined.values() for page in pages]
        everything = sorted((*self._free, *private, *nodes, *waiting))
        assert everything == list(range(1, self.num_usable + 1)), (
            f"pages [1, {self.num_usable}] expected; free {self._free}, held {private},"
            f" cached {nodes}, quarantined {waiting}"
        )
