"""Who is next in line, and who waits for another's page instead."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duetjax.config import SamplingParams
from duetjax.policy.queue import AGEING_SECONDS, WaitingQueue, rank
from duetjax.policy.request import NewRequest, Phase, Request

TWIN = ("", b"page")


def new(name="r", priority=0):
    return NewRequest(name, (1, 2, 3), 1, SamplingParams(seed=0), priority=priority)


def request(sequence, now=0.0, priority=0):
    name = new(str(sequence), priority)
    return Request(name, rank(name, now, sequence), known=np.array(name.prompt, np.int32))


def drain(queue):
    """The ids of everyone in line, in the order in which their turn comes."""
    ids = []
    while queue.first() is not None:
        ids.append(queue.pop().new.id)
    return ids


def end(queue, some):
    """What the roster does with a waiting request that ends."""
    some.phase = Phase.ENDED
    queue.forget(some)


@pytest.fixture
def queue():
    return WaitingQueue()


@pytest.fixture
def three(queue):
    """Requests 0, 1 and 2, in line in this order."""
    some = [request(sequence) for sequence in range(3)]
    for one in some:
        queue.add(one)
    return some


def test_whoever_arrived_first_goes_first():
    assert rank(new(), 1.0, 1) < rank(new(), 2.0, 2)


def test_those_who_arrive_together_go_in_the_order_of_their_arrival():
    assert rank(new(), 1.0, 1) < rank(new(), 1.0, 2)


def test_a_lower_priority_number_goes_first():
    assert rank(new(priority=-1), 5.0, 9) < rank(new(priority=0), 5.0, 1)
    assert rank(new(priority=0), 5.0, 9) < rank(new(priority=1), 5.0, 1)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_step_of_priority_is_worth_ten_seconds_of_waiting(steps):
    late = steps * AGEING_SECONDS
    patient = rank(new(priority=steps), 0.0, 1)
    assert patient < rank(new(), late + 0.001, 2)
    assert patient > rank(new(), late - 0.001, 2)
    assert AGEING_SECONDS == 10.0


def test_an_empty_queue_has_no_first(queue):
    assert queue.first() is None
    assert len(queue) == 0
    assert queue.waiting() == []


def test_requests_come_out_in_order_of_rank(queue):
    for some in (request(0, 3.0), request(1, 1.0), request(2, 12.0, -1), request(3, 2.0, 1)):
        queue.add(some)
    assert drain(queue) == ["1", "2", "0", "3"]


def test_looking_at_the_first_does_not_take_it_out(queue, three):
    assert queue.first() is queue.first() is three[0]
    assert len(queue) == 3


def test_only_who_waits_may_join(queue):
    running = request(0)
    running.phase = Phase.DECODING
    with pytest.raises(AssertionError):
        queue.add(running)


def test_a_preempted_request_returns_to_its_old_place(queue, three):
    assert queue.pop() is three[0]
    queue.add(three[0])
    assert drain(queue) == ["0", "1", "2"]


@pytest.mark.parametrize(("which", "left"), [(0, ["1", "2"]), (1, ["0", "2"]), (2, ["0", "1"])])
def test_a_request_that_has_ended_vanishes(queue, three, which, left):
    end(queue, three[which])
    assert len(queue) == 2
    assert three[which] not in queue.waiting()
    assert drain(queue) == left
    assert len(queue) == 0


def test_when_everyone_has_ended_there_is_no_first(queue, three):
    for some in three:
        end(queue, some)
    assert queue.first() is None
    assert len(queue) == 0


def test_nobody_is_put_off_for_a_page_that_nobody_computes(queue, three):
    assert queue.computing(("", b"another page"))
    assert queue.computing(("another salt", b"page"))
    assert not queue.put_off_first(TWIN)
    assert queue.first() is three[0]


def test_who_is_put_off_still_waits_but_is_not_in_line(queue, three):
    assert queue.computing(TWIN)
    assert queue.put_off_first(TWIN)
    assert queue.first() is three[1]
    assert len(queue) == len(queue.waiting()) == 3
    assert three[0] in queue.waiting()


def test_who_was_put_off_returns_to_its_place_when_the_page_is_there(queue, three):
    queue.computing(TWIN)
    queue.put_off_first(TWIN)
    queue.put_off_first(TWIN)
    assert queue.first() is three[2]
    queue.computed(TWIN)
    assert len(queue) == 3
    assert drain(queue) == ["0", "1", "2"]


def test_only_those_who_wait_for_a_page_return_with_it(queue, three):
    other = ("", b"other")
    queue.computing(TWIN)
    queue.computing(other)
    queue.put_off_first(TWIN)
    queue.put_off_first(other)
    queue.computed(other)
    assert drain(queue) == ["1", "2"]
    assert queue.waiting() == [three[0]]


def test_a_second_computer_of_a_page_is_not_the_one_waited_for(queue):
    assert queue.computing(TWIN)
    assert not queue.computing(TWIN)
    queue.computed(TWIN)
    assert queue.computing(TWIN)


def test_after_a_page_is_there_nobody_is_put_off_for_it(queue, three):
    queue.computing(TWIN)
    queue.computed(TWIN)
    assert not queue.put_off_first(TWIN)


def test_a_page_that_nobody_computes_cannot_be_finished(queue):
    with pytest.raises(KeyError):
        queue.computed(TWIN)


def test_who_ends_while_put_off_does_not_return(queue, three):
    queue.computing(TWIN)
    queue.put_off_first(TWIN)
    queue.put_off_first(TWIN)
    end(queue, three[0])
    assert len(queue) == len(queue.waiting()) == 2
    queue.computed(TWIN)
    assert drain(queue) == ["1", "2"]
    assert len(queue) == 0


class QueueAgainstAModel(RuleBasedStateMachine):
    """Requests join, run, end and wait for pages at random; the line is known at every moment.

    line: who is in line. put_off: who waits for which page.
    """

    @initialize()
    def create(self):
        self.queue = WaitingQueue()
        self.line, self.running, self.put_off = [], [], {}
        self.arrived = 0

    def next(self):
        return min(self.line, key=lambda one: one.rank, default=None)

    @rule(now=st.integers(0, 25), priority=st.integers(-2, 2))
    def arrive(self, now, priority):
        self.arrived += 1
        self.line.append(request(self.arrived, float(now), priority))
        self.queue.add(self.line[-1])

    @precondition(lambda self: self.line)
    @rule()
    def admit(self):
        assert self.queue.first() is self.next()
        some = self.queue.pop()
        assert some is self.next()
        self.line.remove(some)
        some.phase = Phase.PREFILLING
        self.running.append(some)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data):
        some = data.draw(st.sampled_from(self.running))
        self.running.remove(some)
        some.phase = Phase.WAITING
        self.line.append(some)
        self.queue.add(some)

    @precondition(lambda self: self.line or any(self.put_off.values()))
    @rule(data=st.data())
    def end(self, data):
        put_off = [one for others in self.put_off.values() for one in others]
        some = data.draw(st.sampled_from(self.line + put_off))
        for others in (self.line, *self.put_off.values()):
            if some in others:
                others.remove(some)
        end(self.queue, some)

    @rule(page=st.sampled_from([b"x", b"y"]))
    def compute(self, page):
        assert self.queue.computing(("", page)) == (page not in self.put_off)
        self.put_off.setdefault(page, [])

    @precondition(lambda self: self.line)
    @rule(page=st.sampled_from([b"x", b"y"]))
    def put_off_first(self, page):
        some = self.queue.first()
        assert some is self.next()
        is_off = self.queue.put_off_first(("", page))
        assert is_off == (page in self.put_off)
        if is_off:
            self.line.remove(some)
            self.put_off[page].append(some)

    @precondition(lambda self: self.put_off)
    @rule(data=st.data())
    def computed(self, data):
        page = data.draw(st.sampled_from(sorted(self.put_off)))
        self.queue.computed(("", page))
        self.line += self.put_off.pop(page)

    @invariant()
    def everyone_is_counted(self):
        everyone = self.line + [one for others in self.put_off.values() for one in others]
        assert len(self.queue) == len(everyone)
        ids = [one.new.id for one in self.queue.waiting()]
        assert sorted(ids) == sorted(one.new.id for one in everyone)
        assert self.queue.first() is self.next()


TestQueueAgainstAModel = QueueAgainstAModel.TestCase
TestQueueAgainstAModel.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, database=None
)
