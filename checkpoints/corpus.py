"""The demo model's training text: written by this project, generated from a seed.

Dialogues about LLM serving (topics.txt in the wordings of phrasing.py), questions about anything
else with an honest refusal, small stories, and plain text for completions. Knows nothing of tokens
or models. `python checkpoints/corpus.py` prints a sample.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import phrasing
import stories

SEED = 20_240
DOCUMENTS = 40_000

_HERE = Path(__file__).parent
REFUSAL = (
    "I am only a small demo model and know nothing about that. Ask me about LLM serving: prefill, "
    "decode, the KV cache or DuetJAX."
)
_ELSEWHERE = (
    "what is the [capital|population|flag|language|history|currency] of [France|Spain|Japan|Peru"
    "|Kenya|Norway|India|my country|Berlin|Rome]",
    "how do I [cook|bake|fry|make|prepare] [pasta|bread|rice|soup|a cake|an egg|pizza|coffee|tea]",
    "who [won|lost|invented|wrote|painted|discovered|is] [the football match|the war|the telephone"
    "|Hamlet|America|the president|the king of England|the moon|this song|the world cup]",
    "what is [two plus two|3 times 7|12 + 30|the square root of 9|100 minus 1|the sum of 4 and 5]",
    "[how is|what is|will it be|tell me] the weather [today|tomorrow|in London|next week|]",
    "[write|compose|give me] [a poem|a song|an essay|a joke|a letter|an email] [about love"
    "|for my mother|about spring|to my boss|about the sea|]",
    "what should I [eat|wear|buy|read|watch|do|learn] [today|tonight|tomorrow|for my birthday|]",
    "[where|when] [is|was|can I find] [the station|my key|Napoleon|the cinema|Paris|Easter"
    "|the next bus|the summer|my dog]",
    "how [old|tall|far|heavy|hot] is [the earth|the sun|the moon|a whale|Mount Everest|my cat]",
    "[translate|say|spell] [hello|good morning|the cat|thank you|my house] [in|into] [French"
    "|Spanish|German|Latin|Chinese]",
    "[which|what] [film|song|book|colour|animal|sport|flower|wine] [do you like|is the best"
    "|should I choose|is the oldest]",
    "[do you like|have you seen|do you believe in|what do you think of] [music|cats|football|God"
    "|politics|chess|the sea|dancing|my hat|ghosts|love]",
    "[can you|please] [book a flight|call my mother|play music|do my homework|drive a car|sing"
    "|paint a picture|fix my bike|order a pizza|write Python code|sort a list]",
    "why [is the sky blue|do birds sing|is the sea salty|do cats purr|are we here|is grass green"
    "|am I so tired|does it rain]",
)
_STORY_REQUESTS = (
    "[tell|write|give|invent|read] me {size} [story|tale|fairy tale] about a {hero}",
    "[can you|could you|please|] [tell|write|invent] {size} [story|tale] [about|with|of] a {hero}",
    "[I want|I would like] [to hear|] {size} story [about|with] a {hero}",
    "{size} story about a {hero}",
)
_SUMMARY_REQUESTS = (
    "[summarise|sum up|shorten] [this|this text|the text|this story|the following]:",
    "what is [this|this text|the following text|the story] about?",
    "[give me a summary|write a summary|one sentence, please]:",
)
_SYSTEM_PROMPTS = (
    "[You are|Be|Act as] [a|an] [helpful|friendly|short|polite|honest|useful] "
    "[assistant|chatbot|expert|teacher|bot][.| for LLM serving.| of DuetJAX.]",
    "[Answer|Reply] [briefly|in one sentence|politely|in English|truthfully|with care].",
    "You are a helpful assistant. [Answer|Reply] [the question|briefly|in plain words].",
    "You know [DuetJAX|LLM serving|GPUs] well. [Be brief.|Help the user.|Say so when unsure.|]",
)


@dataclass(frozen=True, slots=True)
class Topic:
    """One thing the demo model knows: its answer, and the patterns of questions that ask for it.

    question: the plainest wording. why: the answer to "why does that matter?"; None for small talk.
    """

    id: str
    question: str
    answer: str
    why: str | None
    names: tuple[str, ...]
    asks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's message and the assistant's answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Document:
    """One training text: a dialogue (an optional system prompt and turns), or plain text."""

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    plain: str | None = None

    def text(self) -> str:
        """All its text, one part a line, for counting and searching."""
        parts = [self.system, self.plain]
        parts += [part for turn in self.turns for part in (turn.question, turn.answer)]
        return "\n".join(part for part in parts if part is not None)


def read_topics(path: Path = _HERE / "topics.txt") -> tuple[Topic, ...]:
    """Reads topics.txt; a line of an unknown kind is an error with its number."""
    topics: list[Topic] = []
    fields: dict[str, list[str]] = {}
    lines = [*path.read_text().splitlines(), ""]
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        if line.strip():
            kind, _, value = line.partition(" ")
            if kind not in ("topic", "question", "answer", "why", "name", "ask"):
                raise ValueError(f"{path.name}:{number}: unknown kind {kind!r}")
            fields.setdefault(kind, []).extend(value.split(" | ") if kind == "name" else [value])
        elif fields:
            [name], [question], [answer] = (fields[key] for key in ("topic", "question", "answer"))
            [why] = fields.get("why", [None])
            names, asks = fields.get("name", []), fields.get("ask", [])
            topics.append(Topic(name, question, answer, why, tuple(names), tuple(asks)))
            fields = {}
    return tuple(topics)


class Writer:
    """Draws documents; one `random.Random` decides everything, so a seed repeats them."""

    def __init__(self, topics: tuple[Topic, ...], seed: int) -> None:
        self._rng = random.Random(seed)
        self._topics = topics
        held = {topic for topic, _ in held_out()}
        self._weights = [2.5 if topic.id in held else 1.0 for topic in topics]

    def document(self) -> Document:
        """The next document: mostly one question and its answer."""
        kinds = (self._single, self._dialogue, self._long_prompt, self._plain)
        return self._rng.choices(kinds, (80, 13, 3, 4))[0]()

    def question(self, topic: Topic) -> str:
        """One wording of a question that `topic` answers."""
        rng, asks = self._rng, len(topic.asks)
        if rng.random() < 0.1:
            return topic.question
        if topic.names and (not asks or rng.random() < 8 / (8 + asks)):
            pattern = rng.choice(phrasing.NOUN_QUESTIONS).format(x=rng.choice(topic.names))
        else:
            pattern = rng.choice(topic.asks)
        return phrasing.reword(phrasing.expand(pattern, rng), rng)

    def _single(self) -> Document:
        return Document((self._turn()[0],), self._system())

    def _dialogue(self) -> Document:
        wanted = self._rng.choices((2, 3, 5, 8, 12), (50, 30, 12, 6, 2))[0]
        turns: list[Turn] = []
        while len(turns) < wanted:
            turns.extend(self._turn(follow_up=self._rng.random() < 0.4))
        return Document(tuple(turns), self._system())

    def _turn(self, *, follow_up: bool = False) -> list[Turn]:
        rng = self._rng
        other = rng.random()
        if other < 0.07:
            return [Turn(self._reworded(rng.choice(_ELSEWHERE)), REFUSAL)]
        if other < 0.10:
            return [self._story()]
        [topic] = rng.choices(self._topics, self._weights)
        turns = [Turn(self.question(topic), topic.answer)]
        if follow_up and topic.why is not None:
            turns.append(Turn(self._reworded(rng.choice(phrasing.FOLLOW_UPS)), topic.why))
        return turns

    def _story(self) -> Turn:
        size, lengths = self._rng.choice(
            (("a short", (1, 2)), ("a", (2, 3, 4)), ("a long", (5, 6, 7)))
        )
        story = stories.tell(self._rng, encounters=self._rng.choice(lengths))
        request = self._rng.choice(_STORY_REQUESTS).format(size=size, hero=story.hero)
        return Turn(self._reworded(request), story.text)

    def _long_prompt(self) -> Document:
        """A pasted text with a request before or after it."""
        rng = self._rng
        story = stories.tell(rng, encounters=rng.randint(1, 7))
        if rng.random() < 0.5:
            request = phrasing.expand(rng.choice(_SUMMARY_REQUESTS), rng)
            return Document((Turn(self._around(request, story.text), story.summary),))
        turn = self._turn()[0]
        return Document((Turn(self._around(turn.question, story.text), turn.answer),))

    def _around(self, request: str, text: str) -> str:
        before, gap = self._rng.random() < 0.5, self._rng.choice((" ", "\n", "\n\n"))
        return f"{request}{gap}{text}" if before else f"{text}{gap}{request}"

    def _plain(self) -> Document:
        rng = self._rng
        if rng.random() < 0.4:
            return Document(plain=stories.tell(rng, encounters=rng.randint(1, 5)).text)
        picked = rng.sample([t for t in self._topics if t.why is not None], rng.randint(1, 4))
        facts = [f"{t.answer} {t.why}" if rng.random() < 0.3 else t.answer for t in picked]
        return Document(plain=rng.choice((" ", "\n\n")).join(facts))

    def _system(self) -> str | None:
        if self._rng.random() < 0.8:
            return None
        return phrasing.expand(self._rng.choice(_SYSTEM_PROMPTS), self._rng)

    def _reworded(self, pattern: str) -> str:
        return phrasing.reword(phrasing.expand(pattern, self._rng), self._rng)


def documents(count: int = DOCUMENTS, seed: int = SEED) -> Iterator[Document]:
    """The training text; one that contains a held-out paraphrase is an error, not skipped."""
    writer = Writer(read_topics(), seed)
    paraphrases = [(text, frozenset(normalised(text).split())) for _, text in held_out()]
    for _ in range(count):
        document = writer.document()
        for turn in document.turns:
            words = frozenset(normalised(turn.question).split())
            for text, held in paraphrases:
                if held <= words or len(held & words) > 0.8 * len(held | words):
                    raise ValueError(f"the training text has {turn.question!r}, held out: {text!r}")
        yield document


def held_out() -> list[tuple[str, str]]:
    """(topic, paraphrase) of demo/questions.json: wordings that training must not contain."""
    items = json.loads((_HERE / "demo" / "questions.json").read_text())["items"]
    return [(item["topic"], item["paraphrase"]) for item in items]


def normalised(text: str) -> str:
    """Lower case, letters and digits only, single spaces: what counts as the same wording."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


if __name__ == "__main__":
    for _document in documents(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
        print(_document.text(), end="\n\n")
