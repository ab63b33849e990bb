"""The page pool against a model that keeps every page in plain lists."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duetjax.policy.pages import PagePool


def publish_all(pool, pages, keys, salt=""):
    """The chain of an owner who lets others find all of its pages."""
    chain = []
    pool.publish(chain, salt, keys, pages)
    return chain


def test_pages_come_in_ascending_order_and_the_dummy_never():
    pool = PagePool(6)
    assert pool.take(2) == [1, 2]
    assert pool.take(3) == [3, 4, 5]
    assert pool.take(1) is None


def test_taking_more_than_are_available_takes_none():
    pool = PagePool(4)
    assert pool.take(4) is None
    assert pool.num_free == 3
    pool.check_integrity([])


def test_taking_nothing_succeeds_even_when_nothing_is_available():
    pool = PagePool(2)
    assert pool.take(1) == [1]
    assert pool.take(0) == []


def test_pages_given_back_go_out_next_in_their_owners_order():
    pool = PagePool(8)
    pool.take(2)
    held = pool.take(3)
    pool.give_back(held, [], None)
    assert pool.take(4) == [3, 4, 5, 6]


def test_a_page_freed_twice_is_named():
    pool = PagePool(4)
    pool.take(2)
    pool.give_back([2], [], None)
    with pytest.raises(AssertionError, match=r"page 2 of \[2\] is not held"):
        pool.give_back([2], [], None)


def test_a_page_freed_again_while_it_is_quarantined_is_named():
    pool = PagePool(4)
    pool.take(2)
    pool.give_back([2], [], 7)
    with pytest.raises(AssertionError, match=r"page 2 of \[2\] is not held"):
        pool.give_back([2], [], 7)


def test_a_page_of_the_cache_given_back_without_its_chain_is_named():
    pool = PagePool(4)
    pages = pool.take(1)
    publish_all(pool, pages, [b"a"])
    with pytest.raises(AssertionError, match=r"page 1 of \[1\] is not held"):
        pool.give_back(pages, [], None)


def test_a_page_named_twice_in_one_return_is_refused():
    pool = PagePool(4)
    pool.take(2)
    with pytest.raises(AssertionError, match=r"page 1 of \[1, 1\] is not held"):
        pool.give_back([1, 1], [], None)


@pytest.mark.parametrize("page", [0, 4, -1])
def test_a_page_of_no_pool_is_refused(page):
    pool = PagePool(4)
    pool.take(3)
    with pytest.raises(AssertionError, match="not held"):
        pool.give_back([page], [], None)


def test_a_page_that_nobody_holds_cannot_be_published():
    pool = PagePool(4)
    with pytest.raises(AssertionError, match=r"not all of \[1\] are held"):
        pool.publish([], "", [b"a"], [1])


@pytest.mark.parametrize("held", [(1,), (1, 2, 3), (1, 3), (1, 2, 2), (0, 1, 2)])
def test_integrity_fails_when_owners_do_not_hold_what_was_handed_out(held):
    pool = PagePool(4)
    pool.take(2)
    with pytest.raises(AssertionError):
        pool.check_integrity([(held, ())])


def test_integrity_fails_when_a_chain_has_no_owner():
    pool = PagePool(4)
    pages = pool.take(2)
    chain = publish_all(pool, pages, [b"a", b"b"])
    pool.check_integrity([(pages, chain)])
    with pytest.raises(AssertionError, match="in chains"):
        pool.check_integrity([])


def test_private_pages_wait_for_the_launch_that_may_write_them():
    pool = PagePool(4)
    held = pool.take(3)
    pool.give_back(held, [], 5)
    assert (pool.num_free, pool.num_available, pool.num_quarantined) == (0, 0, 3)
    pool.complete(4)
    assert pool.take(1) is None
    pool.complete(5)
    assert pool.take(3) == held


def test_published_pages_are_found_but_not_evicted_while_a_launch_may_read_them():
    pool = PagePool(4)
    pages = pool.take(2)
    chain = publish_all(pool, pages[:1], [b"a"])
    pool.give_back(pages, chain, 5)
    assert (pool.cache.num_idle, pool.num_quarantined, pool.is_draining) == (0, 1, True)
    assert [node.page for node in pool.cache.match("", [b"a", b"b"])] == pages[:1]
    assert pool.take(2) is None
    pool.complete(5)
    assert (pool.cache.num_idle, pool.num_quarantined, pool.is_draining) == (1, 0, False)
    assert pool.take(3) == [2, 3, 1]


def test_a_page_computed_anew_takes_the_place_of_one_that_nobody_uses():
    pool = PagePool(4)
    old, new = pool.take(1), pool.take(1)
    pool.give_back(old, publish_all(pool, old, [b"a"]), None)
    chain = publish_all(pool, new, [b"a"])
    assert [node.page for node in chain] == new
    assert (pool.num_free, pool.cache.num_idle, pool.cache.num_used) == (2, 0, 1)
    pool.check_integrity([(new, chain)])


def test_the_cache_loses_pages_only_when_none_is_free():
    pool = PagePool(4)
    pages = pool.take(1)
    pool.give_back(pages, publish_all(pool, pages, [b"a"]), None)
    assert pool.take(2) == [2, 3]
    assert pool.cache.num_idle == 1
    assert pool.take(1) == [1]
    assert pool.cache.match("", [b"a"]) == []


def test_the_cache_loses_the_least_recently_used_page_first():
    pool = PagePool(4)
    for key in (b"a", b"b", b"c"):
        pages = pool.take(1)
        pool.give_back(pages, publish_all(pool, pages, [key]), None)
    again = pool.cache.match("", [b"a"])
    pool.cache.use(again)
    pool.give_back([again[0].page], again, None)
    assert pool.take(2) == [2, 3]
    assert [node.place[1] for node in pool.cache.nodes()] == [b"a"]


def test_a_page_is_evicted_after_those_that_follow_it():
    pool = PagePool(4)
    pages = pool.take(3)
    pool.give_back(pages, publish_all(pool, pages, [b"a", b"b", b"c"]), None)
    assert pool.take(1) == [3]
    assert pool.take(1) == [2]
    assert pool.take(1) == [1]


def test_a_page_in_use_is_never_evicted():
    pool = PagePool(4)
    pages = pool.take(3)
    pool.give_back(pages, publish_all(pool, pages, [b"a", b"b", b"c"]), None)
    chain = pool.cache.match("", [b"a"])
    pool.cache.use(chain)
    assert pool.num_available == 2
    assert pool.take(3) is None
    assert pool.take(2) == [3, 2]


def test_of_two_equal_pages_computed_at_once_the_second_stays_private():
    pool = PagePool(4)
    first, second = pool.take(1), pool.take(1)
    first_chain = publish_all(pool, first, [b"a"])
    second_chain = publish_all(pool, second, [b"a"])
    assert second_chain == first_chain
    pool.check_integrity([(first, first_chain), (second, second_chain)])
    pool.give_back(first, first_chain, None)
    assert pool.cache.num_idle == 0  # the second still uses it, and may have children there
    pool.give_back(second, second_chain, None)
    assert (pool.num_free, pool.cache.num_idle) == (2, 1)
    assert pool.take(1) == second


def test_children_on_a_private_duplicate_keep_the_published_page():
    pool = PagePool(5)
    first, second = pool.take(1), pool.take(2)
    first_chain = publish_all(pool, first, [b"a"])
    second_chain = publish_all(pool, second, [b"a", b"b"])
    pool.give_back(first, first_chain, None)
    assert pool.take(1) == [4]
    assert pool.take(1) is None  # page 1 is the parent of page 3, which is in use
    pool.give_back(second, second_chain, None)
    assert pool.take(3) == [2, 3, 1]


def test_without_prefix_caching_nothing_is_published():
    pool = PagePool(4, prefix_caching=False)
    pages = pool.take(3)
    chain = publish_all(pool, pages, [b"a", b"b", b"c"])
    assert chain == []
    pool.give_back(pages, chain, None)
    assert (pool.num_free, pool.cache.nodes()) == (3, [])


class Owner:
    """keys: what each of its pages will hold, in a tree under `salt`; known: pages in its chain."""

    def __init__(self, salt, keys, pages, chain):
        self.salt, self.keys, self.pages, self.chain = salt, keys, pages, chain

    def paths(self, count):
        return [(self.salt, self.keys[: i + 1]) for i in range(count)]


KEYS = st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=3).map(tuple)
TICKETS = st.none() | st.integers(0, 2)


class PagesAgainstAModel(RuleBasedStateMachine):
    """Owners come, publish, grow and leave; where each page is, and goes next, is known exactly.

    free: the next page to go out is the first. cached: page by path, a salt and all keys from the
    root. idle: paths that nobody uses, the least recent first.
    """

    @initialize(num_pages=st.integers(2, 16))
    def create(self, num_pages):
        self.pool = PagePool(num_pages)
        self.free = list(range(1, num_pages))
        self.cached, self.users, self.idle = {}, {}, []
        self.quarantined = {}
        self.owners = []

    def take(self, count):
        """What `take` must return, by the model."""
        if count > len(self.free) + len(self.idle):
            return None
        evicted = self.idle[: max(0, count - len(self.free))]
        del self.idle[: len(evicted)]
        self.free += [self.evicted(path) for path in evicted]
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def evicted(self, path):
        salt, keys = path
        page = self.cached.pop(path)
        below = [p for s, p in self.cached if s == salt and p[: len(keys)] == keys]
        assert below == [], f"{path} goes before {below}"
        return page

    def use(self, path):
        """One more user of a known page."""
        self.users[path] = self.users.get(path, 0) + 1
        if path in self.idle:
            self.idle.remove(path)

    @rule(salt=st.sampled_from(["", "salt"]), keys=KEYS, private=st.integers(0, 2))
    def come(self, salt, keys, private):
        """Finds what is known of its pages, takes the others and some more; or finds no room."""
        paths = Owner(salt, keys, [], []).paths(len(keys))
        known = [path for path in paths if path in self.cached]
        assert known == paths[: len(known)]
        chain = self.pool.cache.match(salt, keys)
        assert [node.page for node in chain] == [self.cached[path] for path in known]
        wanted = len(keys) - len(known) + private
        if wanted > self.pool.num_available - sum(path in self.idle for path in known):
            return
        for path in known:
            self.use(path)
        self.pool.cache.use(chain)
        taken = self.pool.take(wanted)
        assert taken == self.take(wanted)
        self.owners.append(Owner(salt, keys, [*(node.page for node in chain), *taken], chain))

    @rule(keys=KEYS)
    def come_and_fill_all_pages(self, keys):
        before = len(self.owners)
        self.come("", keys, 1)
        for owner in self.owners[before:]:
            self.fill(owner, len(keys))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def come_to_compute_what_another_does(self, data):
        other = data.draw(st.sampled_from(self.owners))
        self.come(other.salt, other.keys, 0)

    @rule(count=st.integers(0, 4), data=st.data())
    def grow(self, count, data):
        taken = self.pool.take(count)
        assert taken == self.take(count)
        if taken and self.owners:
            data.draw(st.sampled_from(self.owners)).pages += taken
        elif taken:
            self.owners.append(Owner("", (), taken, []))

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), count=st.integers(1, 5))
    def publish(self, data, count):
        self.fill(data.draw(st.sampled_from(self.owners)), count)

    def fill(self, owner, count):
        known = len(owner.chain)
        for path in owner.paths(len(owner.keys))[known : known + count]:
            page = owner.pages[len(owner.chain)]
            self.pool.publish(owner.chain, owner.salt, [path[1][-1]], [page])
            if path in self.idle:
                self.free.insert(0, self.cached.pop(path))
            assert owner.chain[-1].page == self.cached.setdefault(path, page)
            self.use(path)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), ticket=TICKETS)
    def leave(self, data, ticket):
        owner = data.draw(st.sampled_from(self.owners))
        self.owners.remove(owner)
        paths = owner.paths(len(owner.chain))
        private = [page for page in owner.pages if page not in map(self.cached.get, paths)]
        if ticket is None:
            self.release(private, paths)
        else:
            self.quarantined.setdefault(ticket, []).append((private, paths))
        self.pool.give_back(owner.pages, owner.chain, ticket)

    def release(self, private, paths):
        self.free = private + self.free
        for path in reversed(paths):
            self.users[path] -= 1
            if not self.users[path]:
                self.idle.append(path)

    @rule(ticket=st.integers(0, 2))
    def complete(self, ticket):
        self.pool.complete(ticket)
        for private, paths in self.quarantined.pop(ticket, []):
            self.release(private, paths)

    def waiting(self):
        return [page for some in self.quarantined.values() for pages, _ in some for page in pages]

    @rule(data=st.data())
    def give_back_what_nobody_holds(self, data):
        waiting = self.waiting()
        page = data.draw(st.sampled_from([0, *self.free, *waiting, *self.cached.values()]))
        with pytest.raises(AssertionError, match=f"page {page} .* is not held"):
            self.pool.give_back([page], [], None)

    @invariant()
    def every_page_is_in_one_place(self):
        pool = self.pool
        pool.check_integrity((owner.pages, owner.chain) for owner in self.owners)
        pages = {page for owner in self.owners for page in owner.pages}
        held = len(pages - set(self.cached.values()))
        cached = pool.cache.num_idle + pool.cache.num_used
        assert pool.num_free + held + pool.num_quarantined + cached == pool.num_usable
        assert (pool.num_free, pool.num_available) == (
            len(self.free),
            len(self.free) + len(self.idle),
        )
        assert (pool.cache.num_idle, cached) == (len(self.idle), len(self.cached))
        assert pool.num_quarantined == len(self.waiting())


TestPagesAgainstAModel = PagesAgainstAModel.TestCase
TestPagesAgainstAModel.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, database=None
)
