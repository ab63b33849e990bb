"""Which KV pages are free: a stack of page numbers that notices a page freed twice or lost."""

from collections.abc import Iterable, Sequence


class PageAllocator:
    """Hands out the pages [1, num_pages) of a KV pool; page 0 is the dummy and stays here.

    Deterministic: fresh pages come in ascending order, and pages given back are the next to go
    out again, in the order in which their owner held them.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 2, f"{num_pages} pages: one is the dummy, at least one must be usable"
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: the last one goes out next
        self._held: set[int] = set()  # asked for membership only, so its order reaches nothing
        self.num_usable = num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that `take` could hand out now."""
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...] | None:
        """`count` pages for one owner, or None (and nothing taken) where fewer are free."""
        assert count >= 0, f"cannot take {count} pages"
        if count > len(self._free):
            return None
        taken = tuple(self._free.pop() for _ in range(count))
        self._held.update(taken)
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """Frees pages that `take` handed out; the caller must not have them written again."""
        for page in reversed(pages):
            assert page in self._held, f"page {page} of {list(pages)} is not held by anyone"
            self._held.remove(page)
            self._free.append(page)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Asserts that `held`, all owners' pages together, and the free pages make up the pool.

        O(num_pages): for tests and for debugging.
        """
        owned = list(held)
        assert len(owned) == len(set(owned)), f"pages with two owners: {sorted(owned)}"
        assert set(owned) == self._held, (
            f"owners hold {sorted(owned)}, handed out are {sorted(self._held)}"
        )
        assert not self._held.intersection(self._free), (
            f"both free {sorted(self._free)} and held {sorted(self._held)}"
        )
        everything = sorted((*self._free, *owned))
        assert everything == list(range(1, self.num_usable + 1)), (
            f"pages [1, {self.num_usable}] expected, free and held are {everything}"
        )
