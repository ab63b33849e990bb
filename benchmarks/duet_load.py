"""What the headline experiment sends: sizes, arrivals and prompts, the same for the same seed."""

import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class Load:
    """Sizes, in tokens but for rows.

    victims: streams that always decode. context, output: of a victim's prompt and answer. shortest,
    longest, answer: of attackers' prompts, drawn log-uniformly, and of their answers. slots: rows
    that the engine decodes at most. budget: tokens of a launch at most; budgets: those that
    aggregated is tried with.
    """

    victims: int = 32
    context: int = 2048
    output: int = 512
    shortest: int = 2048
    longest: int = 32768
    answer: int = 16
    slots: int = 64
    page: int = 64
    budgets: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)

    @property
    def budget(self) -> int:
        """Of every policy that has no budget of its own."""
        return self.budgets[-1]

    @property
    def max_model_len(self) -> int:
        """The longest context."""
        return self.longest + max(self.answer, self.output)

    @property
    def mean_prompt(self) -> float:
        """Of attackers' prompts: that of the log-uniform distribution."""
        return (self.longest - self.shortest) / math.log(self.longest / self.shortest)

    def scaled(self, lengths: int, rows: int) -> "Load":
        """Prompts, budgets and pages divided by `lengths`; rows and answers by `rows`.

        Budgets stay above the slots, pages at 16 tokens.
        """
        fewest = 2 * self.slots // rows
        return replace(
            self,
            victims=self.victims // rows,
            slots=self.slots // rows,
            output=self.output // rows,
            answer=self.answer // rows,
            context=self.context // lengths,
            shortest=self.shortest // lengths,
            longest=self.longest // lengths,
            page=max(16, self.page // lengths),
            budgets=tuple(dict.fromkeys(max(each // lengths, fewest) for each in self.budgets)),
        )


@dataclass(frozen=True, slots=True)
class Attacker:
    """at: seconds since the first could have come. prompt: tokens."""

    at: float
    prompt: int


def attackers(load: Load, tokens_per_s: float, seconds: float, seed: int) -> list[Attacker]:
    """A Poisson process that brings `tokens_per_s` of prompts on average.

    Of one seed the n-th prompt is equally long at every rate, and comes in proportion earlier.
    """
    draw = np.random.default_rng((seed, 1))
    rate = tokens_per_s / load.mean_prompt
    found: list[Attacker] = []
    at = 0.0
    while True:
        at += draw.exponential() / rate
        length = math.exp(draw.uniform(math.log(load.shortest), math.log(load.longest)))
        if at >= seconds:
            return found
        found.append(Attacker(at, round(length)))


def random_prompt(vocab_size: int, tokens: int, *seed: int) -> tuple[int, ...]:
    """Ids that no other seed's prompt begins with."""
    return tuple(np.random.default_rng(seed).integers(0, vocab_size, tokens).tolist())
