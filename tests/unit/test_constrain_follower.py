"""One constrained answer after another, without an engine: what it may say and when that is asked.

Whoever samples here keeps to the letter of each permit, as a scheduler has to.
"""

import json
import queue
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from json_schemas import is_valid, random_schema

from duetjax.constrain.follower import Compiled, Follower
from duetjax.constrain.follower import vocabulary as read
from duetjax.constrain.grammars import fault, json_grammar
from duetjax.constrain.permits import PermitIssuer
from duetjax.policy.request import Constraint, Reasoning

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.json"
NUM_TOKENS = 2048
EOS = 1
BEGIN, END = "<think>", "</think>"
TAGS = (BEGIN, END)
RECORD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}


@cache
def vocabulary(*added, size=None, eos=(EOS,)):
    """The demo's, with further tokens from id 2048 on, and ids without a token up to `size`."""
    tokenizer = json.loads(TOKENIZER.read_text())
    more = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] += [
        {"id": NUM_TOKENS + i, "content": text, "special": False, **more}
        for i, text in enumerate(added)
    ]
    size = size or NUM_TOKENS + len(added)
    return read(json.dumps(tokenizer), size, list(eos))


def begun(constraint, words):
    """Who follows an answer, as it is made of what has been compiled."""
    return Follower("it", constraint, words, Compiled(words).matcher(constraint.grammar))


def grammar(schema):
    return json_grammar(schema, max_bytes=65_536, max_depth=100, param="schema")


def reasoning(max_tokens, *, has_begun=True):
    return Reasoning(BEGIN, END, has_begun, max_tokens)


def allowed(mask, size):
    """Ids below `size` that a mask has, all of them if it is empty."""
    if not mask:
        return list(range(size))
    assert len(mask) == 4 * -(-size // 32)
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return bits[:size].nonzero()[0].tolist()


class Answer:
    """Samples tokens as permits have it. permits: all of them; tokens: those sampled so far."""

    def __init__(self, constraint, words=None):
        self.words = words or vocabulary()
        self.follower = begun(constraint, self.words)
        self.tokens = []
        self.permits = [self.follower.begin()]
        self.check(self.permits[0])

    @property
    def permit(self):
        return self.permits[-1]

    @property
    def error(self):
        return self.permit.error

    @property
    def choices(self):
        return allowed(self.permit.mask, self.words.size)

    @property
    def has_ended(self):
        return bool(self.tokens) and self.tokens[-1] in self.words.tokenizer.eos_tokens

    @property
    def text(self):
        said = [token for token in self.tokens if token != EOS]
        return b"".join(map(self.words.text, said)).decode(errors="replace")

    def check(self, permit):
        assert (permit.id, permit.at) == ("it", len(self.tokens))
        assert permit.steps is None or permit.steps >= 1

    def say(self, *tokens):
        """Samples tokens, whether they are allowed or not."""
        for token in tokens:
            assert not self.error, f"{self.error} after {self.tokens}"
            self.tokens.append(token)
            permit = self.follower.sampled(token)
            if permit is not None:
                self.permits.append(permit)
                self.check(permit)
            else:
                last = self.permit
                has_more = last.steps is None or len(self.tokens) < last.at + last.steps
                assert has_more, f"held for ever after {self.tokens}"
        return self

    def write(self, text):
        """Says a text, each of whose tokens must be allowed."""
        for token in self.words.ids(text):
            assert token in self.choices, f"{self.words.text(token)} after {self.text!r}"
            self.say(token)
        return self

    def walk(self, dice, most=400, *, avoid=(), choose=random.Random.choice):
        """Says what it may, at random, until it ends."""
        while not (self.has_ended or self.error) and len(self.tokens) < most:
            choices = [token for token in self.choices if token not in avoid] or self.choices
            assert choices, f"nothing is allowed after {self.text!r}"
            self.say(choose(dice, choices))
        assert not self.error, f"{self.error} after {self.text!r}"
        return self


# Grammars.


def test_500_random_schemas_have_valid_answers_only():
    dice, num_ended = random.Random(7), 0
    for trial in range(500):
        schema = random_schema(dice)
        assert fault(grammar(schema)) == "", schema
        answer = Answer(Constraint(grammar(schema))).walk(dice)
        num_ended += answer.has_ended
        if answer.has_ended:
            assert is_valid(answer.text, schema), (trial, schema, answer.text)
    assert num_ended > 490


def test_whatever_comes_next_is_said_of_one_token_at_a_time():
    answer = Answer(Constraint(grammar(RECORD))).write('{"a": 7')
    assert {(permit.at, permit.steps) for permit in answer.permits} == {
        (i, 1) for i in range(len(answer.tokens) + 1)
    }


def test_an_answer_ends_where_it_is_whole_and_nowhere_else():
    answer = Answer(Constraint(grammar(RECORD)))
    for token in answer.words.ids('{"a": 7}'):
        assert EOS not in answer.choices
        answer.say(token)
    assert answer.choices == [EOS]


def test_what_a_choice_may_begin_with_is_all_that_is_allowed_first():
    answer = Answer(Constraint(grammar({"enum": ["yes", "no"]})))
    beginnings = {answer.words.text(token) for token in answer.choices}
    assert beginnings
    assert all(b'"yes"'.startswith(b) or b'"no"'.startswith(b) for b in beginnings)


def test_each_of_several_end_tokens_may_end_an_answer():
    words = vocabulary(eos=(1, 2))
    answer = Answer(Constraint(grammar(RECORD)), words).write('{"a": 7}')
    assert answer.choices == [1, 2]


def test_ids_without_a_token_are_never_allowed_under_a_grammar():
    answer = Answer(Constraint(grammar({"type": "string", "maxLength": 9})), vocabulary(size=2_100))
    answer.write('"ab')
    assert max(answer.choices) < NUM_TOKENS


def test_special_tokens_are_no_text():
    answer = Answer(Constraint(grammar({"type": "string", "maxLength": 99})))
    answer.write('"ab')
    assert not set(answer.choices) & set(range(5))


@pytest.mark.parametrize("token", [EOS, 0, 500, NUM_TOKENS - 1])
def test_a_token_outside_its_mask_is_an_error_that_comes_with_the_next_permit(token):
    answer = Answer(Constraint(grammar(RECORD)))
    assert token not in answer.choices
    answer.say(token)
    assert answer.error
    assert len(answer.permits) == 2


def test_a_grammar_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="start") as fault:
        begun(Constraint("start: ((("), vocabulary())
    assert len(str(fault.value).splitlines()) == 1


def test_nothing_constrained_is_nothing_forbidden():
    permit = Answer(Constraint()).permit
    assert (permit.mask, permit.steps) == (b"", None)


# Reasoning.

SPELLED = vocabulary()
ADDED = vocabulary(*TAGS)
WORDS = pytest.mark.parametrize("words", [SPELLED, ADDED], ids=["spelled", "tokens"])
BEGUN = pytest.mark.parametrize("has_begun", [True, False], ids=["begun", "not begun"])
BUDGET = pytest.mark.parametrize("budget", [0, 1, 2, 7, 40])


def parts(answer):
    """How many tokens there are before the end tag, and the text behind it."""
    words, end = answer.words, answer.words.ids(END)
    for place in range(len(answer.tokens) - len(end) + 1):
        said = b"".join(map(words.text, answer.tokens[: place + len(end)])).decode(errors="replace")
        if said.endswith(END):
            rest = [token for token in answer.tokens[place + len(end) :] if token != EOS]
            return place, b"".join(map(words.text, rest)).decode(errors="replace")
    raise AssertionError(f"no end of reasoning: {answer.text!r}")


def tagless(words):
    """Tokens that no tag has: a walk that avoids the others ends no reasoning by itself."""
    return {token for token in range(words.size) if set(words.text(token)) & set(b"<>/")}


@WORDS
@BEGUN
@BUDGET
def test_reasoning_has_its_budget_of_tokens_and_not_one_more_before_a_grammar(
    words, has_begun, budget
):
    dice = random.Random(budget)
    constraint = Constraint(grammar(RECORD), reasoning(budget, has_begun=has_begun))
    answer = Answer(constraint, words)
    if not has_begun:
        answer.write(BEGIN)
    answer.walk(dice, len(answer.tokens) + budget, avoid=tagless(words))
    answer.walk(dice)
    assert answer.has_ended
    place, rest = parts(answer)
    assert place == budget + (0 if has_begun else len(words.ids(BEGIN)))
    assert is_valid(rest, RECORD)


@WORDS
@BUDGET
def test_reasoning_alone_takes_all_its_tokens_at_once_then_its_end(words, budget):
    answer = Answer(Constraint(None, reasoning(budget)), words)
    if budget:
        assert (answer.permit.mask, answer.permit.steps) == (b"", budget)
        answer.walk(random.Random(1), budget, avoid={*tagless(words), EOS})
    for token in words.ids(END):
        assert (answer.choices, answer.permit.steps) == ([token], 1)
        answer.say(token)
    assert (answer.permit.mask, answer.permit.steps) == (b"", None)
    assert parts(answer) == (budget, "")


@WORDS
def test_the_begin_tag_is_not_of_the_budget(words):
    answer = Answer(Constraint(None, reasoning(3, has_begun=False)), words)
    begin = words.ids(BEGIN)
    assert (answer.permit.mask, answer.permit.steps) == (b"", 3 + len(begin))
    answer.say(*begin, 100, 101, 102)
    assert answer.choices == words.ids(END)[:1]


@WORDS
@pytest.mark.parametrize("budget", [3, 8])
def test_an_answer_that_does_not_begin_with_reasoning_has_none(words, budget):
    answer = Answer(Constraint(None, reasoning(budget, has_begun=False)), words)
    answer.write("A bird in the hand is worth two in the bush, they say, and so it is.")
    assert (answer.permit.mask, answer.permit.steps) == (b"", None)
    assert END not in answer.text


@WORDS
def test_a_budget_of_nothing_closes_the_reasoning_where_it_opens(words):
    answer = Answer(Constraint(None, reasoning(0, has_begun=False)), words)
    answer.write(BEGIN)
    while answer.permit.mask:
        [token] = answer.choices
        answer.say(token)
    assert answer.text == BEGIN + END


@WORDS
def test_a_grammar_follows_reasoning_that_ends_by_itself(words):
    answer = Answer(Constraint(grammar(RECORD), reasoning(1_000)), words)
    answer.write("It is seven." + END)
    answer.write('{"a": 7}')
    assert answer.choices == [EOS]


@WORDS
def test_a_grammar_follows_reasoning_without_a_budget(words):
    answer = Answer(Constraint(grammar(RECORD), reasoning(None)), words)
    answer.walk(random.Random(3), 300, avoid=tagless(words))
    assert len(answer.tokens) == 300
    assert answer.write(END).walk(random.Random(4)).has_ended
    assert is_valid(parts(answer)[1], RECORD)


@WORDS
def test_reasoning_without_a_budget_or_grammar_is_left_to_itself(words):
    answer = Answer(Constraint(None, reasoning(None)), words).write("So" + END + "It is.")
    assert {(permit.mask, permit.steps) for permit in answer.permits} == {(b"", None)}


@WORDS
def test_reasoning_that_ended_by_itself_is_not_made_to_end_again(words):
    answer = Answer(Constraint(None, reasoning(12)), words).write("So" + END)
    answer.write("It is seven, and there is no more to it than that.")
    assert answer.text.count(END) == 1
    assert answer.permit.steps is None


def test_reasoning_ends_where_its_tag_is_spelled_otherwise():
    tag = [SPELLED.tokenizer.tokenize_str(letter)[0] for letter in END]
    assert tag != SPELLED.ids(END)
    answer = Answer(Constraint(grammar(RECORD), reasoning(100)), SPELLED).say(100, *tag)
    answer.write('{"a": 7}')
    assert answer.choices == [EOS]


def test_a_tag_begun_as_the_budget_ends_is_begun_anew():
    begun = SPELLED.ids(END)[:3]
    answer = Answer(Constraint(None, reasoning(3)), SPELLED).say(*begun)
    answer.write(END)
    assert answer.text.endswith("</th" + END)
    assert answer.permit.steps is None


def test_a_tag_that_is_whole_as_the_budget_ends_is_not_said_again():
    answer = Answer(Constraint(None, reasoning(6)), SPELLED).write(END)
    assert (answer.permit.mask, answer.permit.steps) == (b"", None)


@WORDS
@BEGUN
def test_an_answer_does_not_end_in_its_reasoning_where_a_grammar_follows(words, has_begun):
    answer = Answer(Constraint(grammar(RECORD), reasoning(30, has_begun=has_begun)), words)
    while END not in answer.text:
        assert EOS not in answer.choices
        answer.walk(random.Random(5), len(answer.tokens) + 1, avoid=tagless(words)
                    if len(answer.choices) > 1 else ())  # fmt: skip
    assert EOS not in answer.choices


def test_an_answer_may_end_in_its_reasoning_where_none_does():
    assert EOS in Answer(Constraint(None, reasoning(30))).write("So").choices


def test_what_a_token_has_behind_the_tag_belongs_to_the_answer():
    words = vocabulary('>{"')
    answer = Answer(Constraint(grammar(RECORD), reasoning(100)), words)
    answer.write("So").say(*words.ids("</think"), NUM_TOKENS).write('a": 7}')
    assert answer.choices == [EOS]


def test_a_budget_holds_for_reasoning_in_whatever_tokens_it_begins():
    for has_begun in (True, False):
        dice = random.Random(11)
        for _ in range(40):
            budget = dice.randint(0, 20)
            constraint = Constraint(grammar(RECORD), reasoning(budget, has_begun=has_begun))
            answer = Answer(constraint, ADDED).walk(dice)
            place, rest = parts(answer)
            assert place <= budget + (not has_begun)
            assert is_valid(rest, RECORD)


def test_no_token_that_was_allowed_is_an_error():
    """Not either where a token has the tag's end and something that the grammar would not have."""
    words = vocabulary(">\n\n", "> ", ">x")
    for added in range(NUM_TOKENS, words.size):
        answer = Answer(Constraint(grammar(RECORD), reasoning(100)), words)
        answer.write("So").say(*words.ids("</think"))
        if added in answer.choices:
            answer.say(added)
        answer.walk(random.Random(2), avoid=tagless(words) - {EOS})
        assert answer.has_ended or len(answer.tokens) == 400


def test_ids_without_a_token_may_be_sampled_where_reasoning_is_free():
    answer = Answer(Constraint(grammar(RECORD), reasoning(5)), vocabulary(*TAGS, size=2_100))
    answer.say(2_099, 2_060, 2_099, 2_060, 2_099)
    assert answer.walk(random.Random(3)).has_ended


@pytest.mark.parametrize("spaces", [1, 40])
def test_space_before_an_answer_does_not_make_it_reasoning(spaces):
    answer = Answer(Constraint(None, reasoning(60, has_begun=False)), SPELLED)
    answer.say(*[SPELLED.ids("\n")[0]] * spaces)
    answer.write("A bird in the hand is worth two in the bush, they say, and so it is. " * 4)
    assert (answer.permit.mask, answer.permit.steps) == (b"", None)


# Anew.


CONSTRAINTS = {
    "grammar": Constraint(grammar(RECORD)),
    "reasoning": Constraint(None, reasoning(9)),
    "not begun": Constraint(None, reasoning(9, has_begun=False)),
    "nothing to reason": Constraint(None, reasoning(0, has_begun=False)),
    "both": Constraint(grammar(RECORD), reasoning(9)),
    "both, not begun": Constraint(grammar(RECORD), reasoning(9, has_begun=False)),
}


@WORDS
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_an_answer_begun_again_at_any_moment_is_told_the_same(words, name):
    whole = Answer(CONSTRAINTS[name], words).walk(random.Random(6), 40)
    for place in range(len(whole.tokens) + 1):
        again = Answer(CONSTRAINTS[name], words).say(*whole.tokens[:place])
        again.tokens, again.permits = [], [again.follower.begin()]
        assert again.say(*whole.tokens).permits == whole.permits


def test_an_answer_that_went_wrong_may_begin_again():
    answer = Answer(CONSTRAINTS["grammar"]).say(500)
    assert answer.error
    answer.tokens, answer.permits = [], [answer.follower.begin()]
    assert answer.walk(random.Random(1)).has_ended


# Masks.


@pytest.mark.parametrize("size", [2_048, 2_049, 2_079, 2_080, 2_081])
def test_masks_have_one_bit_for_each_id(size):
    words = vocabulary(size=size)
    for token in (0, 31, 32, size - 1):
        assert allowed(words.only(token), size) == [token]
        assert allowed(words.all_but([token]), size) == [i for i in range(size) if i != token]
    assert allowed(words.all_but([]), size) == list(range(size))
    assert allowed(Answer(Constraint(grammar(RECORD)), words).permit.mask, size)


# The thread that follows them all.


@pytest.fixture
def issuing(request):
    """Who issues permits, and a queue of what it delivers."""
    text = getattr(request, "param", TOKENIZER.read_text)
    issuer, came = PermitIssuer(text, NUM_TOKENS, [EOS]), queue.SimpleQueue()
    issuer.start(came.put)
    yield issuer, lambda: came.get(timeout=60)
    issuer.close()


def test_what_is_asked_of_a_request_is_answered_in_order(issuing):
    issuer, next_permit = issuing
    issuer.begin("a", Constraint(None, reasoning(2)))
    permits = [next_permit()]
    for token in (100, 101, None):
        issuer.sampled("a", token)
    permits += [next_permit() for _ in range(3)]
    assert [each and (each.id, each.at, each.steps) for each in permits] == [
        ("a", 0, 2),
        None,
        ("a", 2, 1),
        ("a", 0, 2),
    ]
    assert issuer.is_idle


def test_two_requests_are_not_mixed_up(issuing):
    issuer, next_permit = issuing
    for name in ("a", "b"):
        issuer.begin(name, Constraint(grammar({"const": name})))
        assert next_permit().id == name
    issuer.sampled("a", vocabulary().ids('"')[0])
    permit = next_permit()
    assert (permit.id, permit.at) == ("a", 1)
    [token] = allowed(permit.mask, NUM_TOKENS)
    assert vocabulary().text(token).startswith(b"a")


def test_of_a_request_that_has_ended_nothing_more_is_said(issuing):
    issuer, next_permit = issuing
    issuer.begin("a", Constraint(grammar(RECORD)))
    assert next_permit()
    issuer.end("a")
    issuer.sampled("a", 100)
    issuer.sampled("a", None)
    issuer.end("never begun")
    assert [next_permit() for _ in range(4)] == [None] * 4


def test_its_threads_end_with_it(issuing):
    issuer, next_permit = issuing
    issuer.begin("a", Constraint(grammar(RECORD)))
    assert next_permit()
    for _ in range(100):
        issuer.sampled("a", None)
    issuer.close()
    assert [thread.is_alive() for thread in issuer._threads] == [False, False]


@pytest.mark.parametrize("issuing", [lambda: "no tokenizer"], indirect=True)
def test_a_tokenizer_that_is_none_is_an_error_of_each_request(issuing):
    issuer, next_permit = issuing
    for name in ("a", "b"):
        issuer.begin(name, Constraint(grammar(RECORD)))
        permit = next_permit()
        assert permit.id == name
        assert permit.error


@pytest.mark.parametrize("failure", [AssertionError(), KeyError(), ValueError("why")])
def test_whatever_goes_wrong_with_one_request_is_its_error_and_nobody_else_s(
    issuing, monkeypatch, failure
):
    issuer, next_permit = issuing

    def fail(follower, token):
        raise failure

    issuer.begin("a", Constraint(grammar(RECORD)))
    next_permit()
    with monkeypatch.context() as broken:
        broken.setattr(Follower, "sampled", fail)
        issuer.sampled("a", 100)
        assert next_permit().error
    issuer.begin("b", Constraint(grammar(RECORD)))
    assert not next_permit().error
