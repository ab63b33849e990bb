"""What is found in the prefix cache: alone, and by a scheduler against independent oracles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duetjax.config import SamplingParams
from duetjax.policy.launch import FinishedStep, Lane, RowFlag, Split, StepResult
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.policies import Aggregated, PrefillFirst, StaticSplit
from duetjax.policy.prefix_cache import PrefixCache
from duetjax.policy.request import FinishReason, NewRequest, Request
from duetjax.policy.scheduler import Scheduler

PAGE = 4


class Colliding(bytes):
    """A key whose hash says nothing."""

    def __hash__(self):
        return 1


def publish(cache, keys, first_page, salt=""):
    """A chain of pages first_page, first_page + 1, ..., which its owner uses."""
    chain = []
    cache.publish(chain, salt, keys, range(first_page, first_page + len(keys)))
    return chain


def found(cache, keys, salt=""):
    return [node.page for node in cache.match(salt, keys)]


def test_the_longest_known_path_is_found():
    cache = PrefixCache()
    publish(cache, [b"a", b"b", b"c"], 1)
    assert found(cache, [b"a", b"b", b"x"]) == [1, 2]
    assert found(cache, [b"a", b"b", b"c", b"d"]) == [1, 2, 3]
    assert found(cache, [b"a"]) == [1]
    assert found(cache, []) == []


def test_keys_with_equal_hashes_are_told_apart():
    cache = PrefixCache()
    a, b = Colliding(b"a"), Colliding(b"b")
    publish(cache, [a, a], 1)
    assert found(cache, [b]) == []
    assert found(cache, [a, b]) == [1]
    publish(cache, [b, a], 3)
    assert found(cache, [Colliding(b"a"), Colliding(b"a")]) == [1, 2]
    assert found(cache, [Colliding(b"b"), Colliding(b"a")]) == [3, 4]


def test_a_page_is_found_only_through_all_pages_before_it():
    cache = PrefixCache()
    publish(cache, [b"a", b"b", b"c"], 1)
    assert found(cache, [b"b", b"c"]) == []
    assert found(cache, [b"c"]) == []
    assert found(cache, [b"a", b"c"]) == [1]


def test_equal_pages_under_different_salts_are_two():
    cache = PrefixCache()
    publish(cache, [b"a"], 1, salt="one")
    assert found(cache, [b"a"], salt="two") == []
    publish(cache, [b"a"], 2, salt="two")
    assert found(cache, [b"a"], salt="one") == [1]
    assert found(cache, [b"a"], salt="two") == [2]
    assert found(cache, [b"a"]) == []


def test_nothing_is_left_when_everything_is_evicted():
    cache = PrefixCache()
    for number, salt in enumerate(("", "one", "two")):
        cache.leave(publish(cache, [b"a", b"b"], 1 + 2 * number, salt))
    assert cache.evict(3) == [2, 1, 4]
    assert found(cache, [b"a", b"b"]) == []
    assert found(cache, [b"a", b"b"], salt="one") == [3]
    assert cache.evict(3) == [3, 6, 5]
    assert cache.nodes() == []
    assert (cache.num_idle, cache.num_used) == (0, 0)


def test_looking_for_an_unknown_salt_leaves_nothing_behind():
    cache = PrefixCache()
    assert found(cache, [b"a"], salt="unknown") == []
    assert cache.nodes() == []


def test_used_and_idle_pages_are_counted():
    cache = PrefixCache()
    chain = publish(cache, [b"a", b"b"], 1)
    other = cache.match("", [b"a"])
    cache.use(other)
    assert (cache.num_used, cache.num_idle) == (2, 0)
    cache.leave(chain)
    assert (cache.num_used, cache.num_idle) == (1, 1)
    cache.leave(other)
    assert (cache.num_used, cache.num_idle) == (0, 2)


TOKENS = st.lists(st.sampled_from([0, 1, 255, 256, 65536, 2**31 - 1]), min_size=4, max_size=4)


@given(TOKENS, TOKENS)
def test_two_pages_have_one_key_only_if_they_hold_the_same_tokens(ones, others):
    keys = []
    for tokens in (ones, others):
        new = NewRequest("r", tuple(tokens), 1, SamplingParams(seed=0))
        request = Request(new, (0.0, 0), np.array(tokens, np.int32))
        request.learn_keys(request.known, 4)
        keys += request.keys
    assert (keys[0] == keys[1]) == (ones == others)


# Through the scheduler.


def sampled_after(tokens):
    """The token that the device samples after these."""
    return 100 + (31 * sum(tokens) + 7 * len(tokens)) % 97


def completed(prompt, max_tokens):
    """A prompt and what must be generated after it."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(sampled_after(tokens))
    return tokens


class Device:
    """Keeps tokens as KV, page by page, and samples after what it finds there.

    Launches of a lane run in order; which lane goes on is for the caller to say. spoiled: tickets
    whose rows are not finite. computed: tokens of prompts. starts: (ticket, start) of each chunk.
    """

    def __init__(self):
        self.queue, self.slots, self.kv = [], {}, {}
        self.spoiled, self.computed, self.starts = set(), 0, []

    def submit(self, launch):
        self.queue.append((launch, 0))

    def lanes(self):
        """Those with a launch, the first one launched first."""
        return list(dict.fromkeys(launch.lane for launch, _ in self.queue))

    def step(self, lane):
        """Runs the next step of a lane."""
        at = [launch.lane for launch, _ in self.queue].index(lane)
        launch, step = self.queue[at]
        if step == 0:
            self._apply(launch)
        rows = [self._run(launch, row) for row in range(len(launch.slots))]
        if step + 1 == launch.k:
            del self.queue[at]
        else:
            self.queue[at] = (launch, step + 1)
        tokens, flags = zip(*rows, strict=True)
        return FinishedStep(launch.ticket, step, StepResult(tokens, flags, (0.0,) * len(rows)))

    def _apply(self, launch):
        for params in launch.admitted:
            self.slots[params.slot] = {"token": None, "position": 0, "limit": 0, "pages": {}}
        for slot, index, page in launch.pages:
            self.slots[slot]["pages"][index] = page
        for slot, limit in launch.limits:
            self.slots[slot]["limit"] = limit

    def _run(self, launch, row):
        slot = self.slots[launch.slots[row]]
        count = launch.counts[row] if launch.counts else 0
        if count:
            first, start = sum(launch.counts[:row]), launch.starts[row]
            fed = launch.tokens[first : first + count]
            self.starts.append((launch.ticket, start))
            self.computed += count
        elif slot["position"] < slot["limit"]:
            start, fed = slot["position"], [slot["token"]]
        else:
            return 0, 0
        if launch.ticket in self.spoiled:
            return 0, int(RowFlag.NON_FINITE)
        for position, token in enumerate(fed, start):
            self.kv[slot["pages"][position // PAGE], position % PAGE] = token
        end = start + len(fed)
        if count and not launch.samples[row]:
            return 0, 0
        seen = [self.kv[slot["pages"][at // PAGE], at % PAGE] for at in range(end)]
        slot["token"], slot["position"] = sampled_after(seen), end
        at_limit = RowFlag.AT_LIMIT if end >= slot["limit"] else 0
        return slot["token"], int(RowFlag.SAMPLED | at_limit)


def oldest(lanes):
    return lanes[0]


def preferring(lane):
    return lambda lanes: lane if lane in lanes else lanes[0]


class Engine:
    """A scheduler and its device; what came out, by request."""

    def __init__(self, policy=None, **sizes):
        self.limits = SchedulerLimits(
            **{
                "num_pages": 1000,
                "page_size": PAGE,
                "num_slots": 6,
                "max_model_len": 200,
                "max_num_batched_tokens": 16,
                "decode_buckets": (6,),
                "prefill_buckets": (16,),
                **sizes,
            }
        )
        self.scheduler, self.device = Scheduler(self.limits, policy), Device()
        self.tokens, self.cached, self.finished = {}, {}, {}
        self.now = 0.0
        self.num_added = 0

    def add(self, prompt, max_tokens=1, salt="", priority=0):
        name = str(self.num_added)
        self.num_added += 1
        sampling = SamplingParams(seed=0)
        new = NewRequest(name, tuple(prompt), max_tokens, sampling, (), priority, salt)
        self.scheduler.add(new, self.now)
        self.tokens[name] = list(prompt)
        return name

    def turn(self, choose=oldest):
        """Plans, then finishes one step of the lane that `choose` picks."""
        self.now += 0.01
        for launch in self.scheduler.plan(self.now):
            self.device.submit(launch)
        self.scheduler.check_integrity()
        if not self.device.queue:
            return
        step = self.device.step(choose(self.device.lanes()))
        for output in self.scheduler.commit(step, self.now):
            assert output.id not in self.finished
            if output.id not in self.cached and output.token_ids:
                self.cached[output.id] = output.num_cached_tokens
            else:
                assert output.num_cached_tokens == 0
            self.tokens[output.id] += output.token_ids
            if output.finish:
                self.finished[output.id] = output.finish
        self.scheduler.check_integrity()

    def run(self, choose=oldest):
        while self.scheduler.has_work or self.scheduler.num_in_flight:
            self.turn(choose)

    def ask(self, *args, **kwargs):
        """Runs one request to its end; its tokens from the prefix cache."""
        before = self.hits
        name = self.add(*args, **kwargs)
        self.run()
        assert self.hits - before == self.cached[name]
        return self.cached[name]

    @property
    def hits(self):
        return self.scheduler.stats().prefix_hits


def full_pages(tokens):
    """All prefixes that are full pages."""
    return [tuple(tokens[:end]) for end in range(PAGE, len(tokens) + 1, PAGE)]


def usable(tokens):
    """The prefixes that a prompt may take from the cache: its last token is always computed."""
    return full_pages(tokens[:-1])


SOME = st.lists(st.integers(0, 1), min_size=1, max_size=9)
TURN = st.tuples(
    st.integers(0, 3),  # which conversation goes on
    SOME,  # what its user says
    st.integers(1, 9),  # max_tokens
    st.booleans(),  # or is begun anew
)
SYSTEM_PROMPTS = [[], [0] * 8, [0] * 8 + [1] * 9, [1] * 12]


def conversations(turns, longest=60):
    """Prompts that share system prompts, and extend their own history; salts; max_tokens."""
    histories = {}
    for which, said, max_tokens, anew in turns:
        history = histories.get(which, [])
        if anew or len(history) > longest:
            history = SYSTEM_PROMPTS[which]
        prompt = [*history, *said]
        histories[which] = completed(prompt, max_tokens)
        yield prompt, "salt" if which == 3 else "", max_tokens


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(TURN, max_size=12), st.sampled_from([16, 40]))
def test_one_at_a_time_each_finds_the_longest_known_prefix(turns, budget):
    engine = Engine(max_num_batched_tokens=budget, prefill_buckets=(budget,))
    known = set()
    for prompt, salt, max_tokens in conversations(turns):
        expected = max([0, *(len(p) for p in usable(prompt) if (salt, p) in known)])
        assert engine.ask(prompt, max_tokens, salt) == expected
        tokens = completed(prompt, max_tokens)
        assert engine.tokens[str(engine.num_added - 1)] == tokens
        known |= {(salt, path) for path in full_pages(tokens[:-1])}  # the last one is never fed
    queries = engine.scheduler.stats().prefix_queries
    assert queries == sum(len(prompt) for prompt, _, _ in conversations(turns))


class SmallCache:
    """What a pool of few pages holds after requests run alone, one launch at a time.

    idle: known prefixes, the least recently used first. Every prompt ends with a token that is in
    no other, so no page is computed that is known already.
    """

    def __init__(self, num_pages):
        self.num_free, self.idle, self.num_evicted = num_pages - 1, [], 0

    def ask(self, salt, prompt, max_tokens):
        """How many tokens the next request finds."""
        fed = completed(prompt, max_tokens)[:-1]
        paths = [(salt, path) for path in full_pages(fed)]
        known = [path in self.idle for path in paths]
        cached = [*known, False].index(False)
        self.idle = [path for path in self.idle if path not in paths[:cached]]
        missing = -(-len(fed) // PAGE) - cached
        evicted = max(0, missing - self.num_free)
        del self.idle[:evicted]
        self.num_evicted += evicted
        self.num_free += evicted - missing + (len(fed) % PAGE > 0)
        self.idle += reversed(paths)
        return PAGE * cached


def marked(turns):
    """The same, each with a number of its own as the last thing said."""
    return [(a, [*said, 1000 + i], b, c) for i, (a, said, b, c) in enumerate(turns)]


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(TURN, min_size=6, max_size=20).map(marked), st.integers(14, 28))
def test_one_at_a_time_each_finds_what_a_small_pool_has_not_evicted(turns, num_pages):
    engine = Engine(num_pages=num_pages)
    model = SmallCache(num_pages)
    for prompt, salt, max_tokens in conversations(turns, longest=20):
        expected = model.ask(salt, prompt, max_tokens)
        assert engine.ask(prompt, max_tokens, salt) == expected
        stats = engine.scheduler.stats()
        assert (stats.pages_free, stats.pages_cached) == (model.num_free, len(model.idle))
        assert engine.tokens[str(engine.num_added - 1)] == completed(prompt, max_tokens)


def test_the_small_pool_of_the_test_before_finds_and_evicts():
    model = SmallCache(21)
    turns = marked([(which, [which % 2] * 9, 9, False) for which in (0, 1, 2, 3) * 3])
    asked = list(conversations(turns, longest=20))
    found = [model.ask(salt, prompt, max_tokens) for prompt, salt, max_tokens in asked]
    assert model.num_evicted > 10
    assert len(set(found)) > 2


POLICIES = [Aggregated(16), PrefillFirst(16), StaticSplit(16, Split(1, 1), 4)]


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.lists(st.tuples(TURN, st.integers(0, 6)), max_size=20),
    st.sampled_from(POLICIES),
    st.randoms(use_true_random=False),
)
def test_together_each_finds_no_less_than_was_there_and_no_more_than_could_be(
    timed, policy, chance
):
    engine = Engine(policy)
    asked = {}
    for (prompt, salt, max_tokens), (_, wait) in zip(
        conversations([turn for turn, _ in timed]), timed, strict=True
    ):
        there = {
            (asked[name][1], p) for name in engine.finished for p in full_pages(asked[name][2])
        }
        asked[engine.add(prompt, max_tokens, salt)] = (
            max([0, *(len(p) for p in usable(prompt) if (salt, p) in there)]),
            salt,
            completed(prompt, max_tokens)[:-1],
            prompt,
        )
        for _ in range(wait):
            engine.turn(chance.choice)
    engine.run(chance.choice)
    for name, (least, salt, fed, prompt) in asked.items():
        others = [other for key, other in asked.items() if key != name and other[1] == salt]
        possible = {path for other in others for path in full_pages(other[2])}
        most = max([0, *(len(path) for path in usable(prompt) if path in possible)])
        assert least <= engine.cached[name] <= most
        assert engine.tokens[name][:-1] == fed


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), SOME, st.integers(1, 4), st.integers(0, 5)), max_size=12),
    st.sampled_from(POLICIES),
    st.randoms(use_true_random=False),
)
def test_no_page_of_a_prompt_is_computed_twice(groups, policy, chance):
    """Of prompts that do not end with a page: the last page is everybody's own."""
    engine = Engine(policy)
    prompts = []
    for which, said, twins, wait in groups:
        prompt = [*SYSTEM_PROMPTS[which], *said]
        prompt += [0] * (len(prompt) % PAGE == 0)
        for _ in range(twins):
            engine.add(prompt, 3)
            prompts.append(prompt)
        for _ in range(wait):
            engine.turn(chance.choice)
    engine.run(chance.choice)
    distinct = {path for prompt in prompts for path in usable(prompt)}
    rests = sum(len(prompt) % PAGE for prompt in prompts)
    assert engine.device.computed == PAGE * len(distinct) + rests
    assert engine.hits == sum(map(len, prompts)) - engine.device.computed


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("length", [3, 4, 5, 15, 16, 17, 50])
def test_four_twins_compute_their_prompt_once(policy, length):
    engine = Engine(policy)
    engine.add([1] * 30, 20)  # something else that runs
    engine.turn()
    before = engine.device.computed
    twins = [engine.add([0] * length, 5) for _ in range(4)]
    engine.run()
    shared = PAGE * ((length - 1) // PAGE)
    assert [engine.cached[twin] for twin in twins] == [0, shared, shared, shared]
    rest = 30 - before  # of the other prompt
    assert engine.device.computed - before == rest + length + 3 * (length - shared)


def test_a_twin_goes_on_where_one_that_was_aborted_left_off():
    engine = Engine()
    first, second = (engine.add([0] * 50, 3) for _ in range(2))
    engine.turn()
    engine.turn()
    assert engine.scheduler.abort(first)
    engine.run()
    assert engine.cached[second] == 32
    assert engine.tokens[second] == completed([0] * 50, 3)
    assert engine.device.computed == 50 + 16  # the third chunk was in flight by then


def test_a_twin_that_is_aborted_while_it_waits_is_never_computed():
    engine = Engine()
    first, second, third = (engine.add([0] * 18, 3) for _ in range(3))
    engine.turn()
    assert engine.scheduler.abort(second)
    engine.run()
    assert sorted(engine.finished) == [first, third]
    assert engine.device.computed == 18 + 2


@pytest.mark.parametrize("length", [1, 4, 5, 8, 16, 40])
def test_of_a_prompt_known_in_full_the_last_token_is_computed_in_a_page_of_its_own(length):
    engine = Engine()
    prompt = [0] * length
    engine.ask(prompt, 9)
    computed = engine.device.computed
    shared = (length - 1) // PAGE * PAGE
    assert engine.ask(prompt, 9) == shared
    assert engine.device.computed - computed == length - shared
    assert engine.tokens["1"] == engine.tokens["0"]


def test_a_conversation_finds_its_own_answers():
    engine = Engine()
    engine.ask([0] * 6, 7)  # feeds 12 tokens
    assert engine.ask([*engine.tokens["0"], 1], 1) == 12


def test_a_request_finds_nothing_under_another_salt():
    engine = Engine()
    engine.ask([0] * 20, salt="one")
    assert engine.ask([0] * 20, salt="two") == 0
    assert engine.ask([0] * 20) == 0
    assert engine.ask([0] * 20, salt="one") == 16


def test_without_prefix_caching_nothing_is_ever_found():
    engine = Engine(prefix_caching=False)
    for _ in range(3):
        assert engine.ask([0] * 20, 9) == 0
    for _ in range(4):
        engine.add([0] * 20, 9)
    engine.run()
    assert engine.hits == 0
    assert engine.device.computed == 7 * 20
    stats = engine.scheduler.stats()
    assert stats.pages_free == stats.pages_total


def test_a_preempted_request_finds_its_own_pages_again():
    engine = Engine(
        num_pages=11, max_num_batched_tokens=32, prefill_buckets=(32,), launches_per_lane=1
    )
    first, second = engine.add([0] * 16, 10), engine.add([1] * 16, 10)
    engine.run()
    stats = engine.scheduler.stats()
    assert (stats.preemptions, stats.preempted_tokens) == (1, 20)
    # Both hold 5 pages when the first wants two more: it gets the last two of the second.
    assert stats.prefix_hits == 12
    assert [start for _, start in engine.device.starts] == [0, 0, 12]
    assert engine.tokens[first] == completed([0] * 16, 10)
    assert engine.tokens[second] == completed([1] * 16, 10)
    assert engine.cached == {first: 0, second: 0}


def test_pages_of_a_preempted_request_are_not_written_while_it_still_reads_them():
    engine = Engine(StaticSplit(16, Split(1, 1), k=1), num_pages=10)
    first = engine.add([0] * 7, 16)
    engine.turn()
    second = engine.add([1] * 20, 2)  # two chunks; the first takes its pages until it has ended
    engine.turn()
    engine.turn(preferring(Lane.PREFILL))  # publishes the pages of the first chunk
    while not engine.scheduler.stats().preemptions:
        engine.turn(preferring(Lane.DECODE))
    assert Lane.PREFILL in engine.device.lanes()
    engine.run(preferring(Lane.DECODE))
    assert engine.tokens[first] == completed([0] * 7, 16)
    assert engine.tokens[second] == completed([1] * 20, 2)


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(st.tuples(TURN, st.integers(-1, 1), st.integers(0, 6)), max_size=20),
    st.integers(14, 24),
    st.sampled_from(POLICIES),
    st.booleans(),
)
def test_whatever_is_found_evicted_or_preempted_the_answers_are_the_same(
    timed, num_pages, policy, caches
):
    engine = Engine(policy, num_pages=num_pages, prefix_caching=caches)
    expected = {}
    for (prompt, salt, max_tokens), (_, priority, wait) in zip(
        conversations([turn for turn, _, _ in timed], longest=20), timed, strict=True
    ):
        name = engine.add(prompt, max_tokens, salt, priority)
        expected[name] = completed(prompt, max_tokens)
        for _ in range(wait):
            engine.turn()
    engine.run()
    assert engine.tokens == expected


def test_a_chunk_that_is_not_finite_is_never_published():
    engine = Engine()
    engine.device.spoiled = {1, 2}
    name = engine.add([0] * 40, 3)
    engine.run()
    assert engine.finished == {name: FinishReason.ERROR}
    assert engine.ask([0] * 40, 3) == 16  # of the first chunk


def test_a_decoded_page_that_is_not_finite_is_never_published():
    engine = Engine()
    engine.device.spoiled = {2}
    prompt = [0] * 6
    name = engine.add(prompt, 9)
    engine.run()
    assert engine.finished == {name: FinishReason.ERROR}
    assert engine.tokens[name] == completed(prompt, 2)
    assert engine.ask(completed(prompt, 9)) == 4


# Deterministic.


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(TURN, max_size=12), st.sampled_from([8, 10, 16]))
def test_deterministic_hits_are_whole_chunks_of_prompts(turns, budget):
    engine = Engine(deterministic=True, max_num_batched_tokens=budget)
    unit = engine.limits.pages_per_chunk * PAGE
    assert unit % budget == 0
    known = set()
    for prompt, salt, max_tokens in conversations(turns):
        longest = max([0, *(len(p) for p in usable(prompt) if (salt, p) in known)])
        assert engine.ask(prompt, max_tokens, salt) == longest // unit * unit
        assert engine.tokens[str(engine.num_added - 1)] == completed(prompt, max_tokens)
        known |= {(salt, path) for path in full_pages(prompt)}  # not the output
    starts = [start for _, start in engine.device.starts]
    assert all(start % budget == 0 for start in starts)


def test_deterministic_answers_are_not_found():
    engine = Engine(deterministic=True)
    engine.ask([0] * 17, 80)
    assert engine.ask([*engine.tokens["0"], 1], 1) == 16


def test_a_deterministic_request_that_needs_the_whole_pool_gets_it_from_its_own_duplicates():
    engine = Engine(deterministic=True, num_pages=11)
    engine.ask([0] * 24, 1)
    name = engine.add([0] * 24, 17)
    for _ in range(200):
        engine.turn()
    assert engine.tokens[name] == completed([0] * 24, 17)
