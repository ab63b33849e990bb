"""The page allocator against a model that keeps free and held pages in plain lists."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duetjax.policy.pages import PageAllocator


def test_pages_come_in_ascending_order_and_the_dummy_never():
    pages = PageAllocator(6)
    assert pages.take(2) == (1, 2)
    assert pages.take(3) == (3, 4, 5)
    assert pages.take(1) is None


def test_taking_more_than_are_free_takes_none():
    pages = PageAllocator(4)
    assert pages.take(4) is None
    assert pages.num_free == 3
    assert pages.take(3) == (1, 2, 3)


def test_taking_nothing_succeeds_even_when_nothing_is_free():
    pages = PageAllocator(2)
    assert pages.take(1) == (1,)
    assert pages.take(0) == ()


def test_pages_given_back_go_out_next_in_their_owners_order():
    pages = PageAllocator(8)
    pages.take(2)
    held = pages.take(3)
    assert held == (3, 4, 5)
    pages.give_back(held)
    assert pages.take(4) == (3, 4, 5, 6)


def test_a_page_freed_twice_is_named():
    pages = PageAllocator(4)
    pages.take(2)
    pages.give_back((2,))
    with pytest.raises(AssertionError, match=r"page 2 of \[2\] is not held"):
        pages.give_back((2,))


def test_a_page_named_twice_in_one_return_is_refused():
    pages = PageAllocator(4)
    pages.take(2)
    with pytest.raises(AssertionError, match=r"page 1 of \[1, 1\] is not held"):
        pages.give_back((1, 1))


@pytest.mark.parametrize("page", [0, 4, -1])
def test_a_page_of_no_pool_is_refused(page):
    pages = PageAllocator(4)
    pages.take(3)
    with pytest.raises(AssertionError, match="not held"):
        pages.give_back((page,))


@pytest.mark.parametrize("held", [(1,), (1, 2, 3), (1, 3), (1, 2, 2), (0, 1, 2)])
def test_integrity_fails_when_owners_do_not_hold_what_was_handed_out(held):
    pages = PageAllocator(4)
    pages.take(2)
    with pytest.raises(AssertionError):
        pages.check_integrity(held)


class PagesAgainstAModel(RuleBasedStateMachine):
    """Owners take and return pages at random; what is free is known at every moment."""

    @initialize(num_pages=st.integers(2, 20))
    def create(self, num_pages):
        self.pages = PageAllocator(num_pages)
        self.usable = set(range(1, num_pages))
        self.owners: list[tuple[int, ...]] = []

    def held(self):
        return [page for owner in self.owners for page in owner]

    @rule(count=st.integers(0, 8))
    def take(self, count):
        free = self.usable - set(self.held())
        taken = self.pages.take(count)
        if count > len(free):
            assert taken is None
        else:
            assert taken is not None
            assert len(taken) == len(set(taken)) == count
            assert set(taken) <= free
            self.owners.append(taken)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def give_back(self, data):
        owner = data.draw(st.integers(0, len(self.owners) - 1))
        self.pages.give_back(self.owners.pop(owner))

    @precondition(lambda self: self.usable - set(self.held()))
    @rule(data=st.data())
    def give_back_what_is_free(self, data):
        page = data.draw(st.sampled_from(sorted(self.usable - set(self.held()))))
        with pytest.raises(AssertionError):
            self.pages.give_back((page,))

    @invariant()
    def every_page_is_free_or_held(self):
        self.pages.check_integrity(self.held())
        assert self.pages.num_free == len(self.usable) - len(self.held())


TestPagesAgainstAModel = PagesAgainstAModel.TestCase
TestPagesAgainstAModel.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, database=None
)
