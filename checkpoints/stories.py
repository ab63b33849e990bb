"""Small stories from a grammar: what the demo model tells when asked for one.

A story has a hero, a place, a lost thing and one to seven encounters, so its length varies from
about 60 to about 350 tokens. The summary names hero, place and thing.
"""

import random
from dataclasses import dataclass

_HEROES = (
    "fox bear cat dog mouse owl rabbit wolf horse frog duck goose hedgehog squirrel dragon robot "
    "fisherman girl boy king queen witch tailor baker gardener sailor shepherd giant"
)
_NAMES = (
    "Mina Tobi Lina Oskar Pia Ruben Ella Jonas Frida Anton Clara Emil Nora Felix Ida Hugo Greta "
    "Otto Lotte Max"
)
_PLACES = (
    "in a deep forest",
    "by the sea",
    "on a high mountain",
    "in a small village",
    "near a quiet lake",
    "at the edge of a desert",
    "on a green island",
    "in an old castle",
    "beside a wide river",
    "in a busy town",
)
_THINGS = (
    "a silver bell",
    "a red scarf",
    "a golden key",
    "a small lamp",
    "an old map",
    "a blue stone",
    "a wooden flute",
    "a letter",
    "a warm coat",
    "a jar of honey",
)
_CHARACTERS = ("brave", "shy", "clever", "curious", "tired", "cheerful", "lonely", "patient")
_OPENINGS = (
    "Once upon a time there lived a {character} {hero} named {name} {place}.",
    "There was once a {character} {hero} called {name}, who lived {place}.",
    "Long ago, {place}, lived a {character} {hero} by the name of {name}.",
)
_LOSSES = (
    "One morning {name} noticed that {thing} was gone, and set out to find it.",
    "One day the wind carried away {thing}, which {name} loved more than anything.",
    "In a cold night somebody took {thing} from the house of {name}.",
)
_WAYS = (
    "First {name} came to a bridge",
    "Soon {name} reached a dark cave",
    "After a while {name} found a garden",
    "On the next day {name} climbed a hill",
    "Later {name} crossed a field of snow",
    "In the evening {name} stopped at a mill",
    "Then {name} followed a narrow path",
    "Before sunrise {name} came to a well",
    "At noon {name} rested under an oak",
)
_HELPERS = (
    "a crow",
    "an old woman",
    "a snail",
    "a beetle",
    "a young goat",
    "a miller",
    "a turtle",
    "a heron",
    "a blind mole",
)
_TALKS = (
    'where {helper} was waiting. "Have you seen {thing}?" asked {name}. "No," said {friend}, '
    '"but follow the river and do not look back."',
    "where {helper} sat in the rain. {name} shared a piece of bread, and in return {friend} showed "
    "a shorter way.",
    'and met {helper}. "Everybody here is looking for something," said {friend}, and pointed to '
    "the north.",
    "where {helper} had lost the way. They walked together for an hour and told each other jokes.",
    'where {helper} asked a riddle: "What grows when you give it away?" {name} thought for a long '
    'time and said: "Joy." That was right.',
    "and heard {helper} singing. The song was about {thing}, and so {name} knew that the way was "
    "right.",
    "where {helper} was stuck between two stones. {name} pulled with both hands until {friend} was "
    "free again.",
)
_ENDINGS = (
    "At last {name} found {thing} under a fallen tree, went home and slept until noon.",
    "In the end {thing} lay in front of the door, where it had been all the time, and {name} "
    "laughed.",
    "Finally {name} found {thing}, but gave it to a child who needed it more, and was happy.",
    "When {name} came home at last with {thing}, all the neighbours were there, and they danced "
    "all night.",
)


@dataclass(frozen=True, slots=True)
class Story:
    """A story and one sentence about it; `hero` is the word that a request names."""

    hero: str
    text: str
    summary: str


def tell(rng: random.Random, *, encounters: int) -> Story:
    """Tells a story with this many encounters (1 to 7)."""
    assert 1 <= encounters <= 7, encounters
    hero, name, place = rng.choice(_HEROES.split()), rng.choice(_NAMES.split()), rng.choice(_PLACES)
    facts = {"hero": hero, "name": name, "place": place, "thing": rng.choice(_THINGS)}
    facts["character"] = rng.choice(_CHARACTERS)
    sentences = [rng.choice(_OPENINGS), rng.choice(_LOSSES)]
    lines = [sentence.format_map(facts) for sentence in sentences]
    facts["thing"] = _known(facts["thing"])
    parts = (rng.sample(pool, encounters) for pool in (_WAYS, _TALKS, _HELPERS))
    for way, talk, helper in zip(*parts, strict=True):
        encounter = {**facts, "helper": helper, "friend": _known(helper)}
        lines.append(f"{way} {talk}".format_map(encounter))
    lines.append(rng.choice(_ENDINGS).format_map(facts))
    summary = "It is a story about the {hero} {name}, who lives {place} and looks for {thing}."
    return Story(hero, " ".join(lines), summary.format_map(facts))


def _known(noun: str) -> str:
    """The noun phrase at its second mention: "a crow" becomes "the crow"."""
    return "the " + noun.split(" ", 1)[1]
