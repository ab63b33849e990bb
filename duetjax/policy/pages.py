"""Who has which KV page: free -> held -> quarantined until a launch completes -> free or cached."""

from collections import Counter
from collections.abc import Iterable, Sequence

from duetjax.policy.launch import Ticket
from duetjax.policy.prefix_cache import Node, PrefixCache


class PagePool:
    """Hands out the pages [1, num_pages) of a KV pool; page 0 is the dummy and stays here.

    A page is free, held by one owner, in the prefix cache (used or idle), or quarantined: given
    back by an owner for whom a launch in flight may still write. Pages in the chain of such an
    owner stay in use, as its launches still read them. Deterministic: fresh pages come
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
        self._quarantine: dict[Ticket, list[tuple[list[int], Sequence[Node]]]] = {}

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
        return sum(len(private) for some in self._quarantine.values() for private, _ in some)

    @property
    def is_draining(self) -> bool:
        """Whether more pages will be available once launches have completed."""
        return bool(self._quarantine)

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

    def publish(
        self, chain: list[Node], salt: str, keys: Sequence[bytes], pages: Sequence[int]
    ) -> None:
        """Puts full pages that their owner will not write again where others find them.

        Their owner goes on using them, as the next ones of its chain.
        """
        if not self._is_caching:
            return
        assert self._held.issuperset(pages), f"not all of {list(pages)} are held by anyone"
        taken, replaced = self.cache.publish(chain, salt, keys, pages)
        self._held.difference_update(taken)
        self._free += replaced

    def give_back(self, pages: Sequence[int], chain: Sequence[Node], ticket: Ticket | None) -> None:
        """Takes an owner's pages back; those in its chain stay in the cache.

        ticket: the last launch that may read and write them; None where none is in flight.
        """
        shared = {node.page for node in chain}
        private = [page for page in pages if page not in shared]
        for page in private:
            assert page in self._held, f"page {page} of {list(pages)} is not held by anyone"
            self._held.remove(page)
        if ticket is None:
            self._release(private, chain)
        else:
            self._quarantine.setdefault(ticket, []).append((private, chain))

    def complete(self, ticket: Ticket) -> None:
        """Frees what has waited for this launch."""
        for private, chain in self._quarantine.pop(ticket, ()):
            self._release(private, chain)

    def _release(self, private: list[int], chain: Sequence[Node]) -> None:
        self._free.extend(reversed(private))
        self.cache.leave(chain)

    def check_integrity(self, owned: Iterable[tuple[Sequence[int], Sequence[Node]]]) -> None:
        """Asserts that each page is in one place; owned: every owner's pages and chain.

        O(num_pages): for tests and for debugging.
        """
        private: list[int] = []
        leaving = [entry for some in self._quarantine.values() for entry in some]
        chains = [chain for _, chain in leaving]
        for pages, chain in owned:
            shared = {node.page for node in chain}
            private += [page for page in pages if page not in shared]
            chains.append(chain)
        users = Counter(node.page for chain in chains for node in chain)
        nodes = {node.page: node.num_users for node in self.cache.nodes()}
        assert sorted(private) == sorted(self._held), (
            f"owners hold {sorted(private)}, handed out are {sorted(self._held)}"
        )
        used = {page: count for page, count in nodes.items() if count}
        assert used == users, f"pages in use {used}, in chains {users}"
        assert len(nodes) == self.cache.num_idle + self.cache.num_used
        waiting = [page for pages, _ in leaving for page in pages]
        everything = sorted((*self._free, *private, *nodes, *waiting))
        assert everything == list(range(1, self.num_usable + 1)), (
            f"pages [1, {self.num_usable}] expected; free {self._free}, held {private},"
            f" cached {nodes}, quarantined {waiting}"
        )
