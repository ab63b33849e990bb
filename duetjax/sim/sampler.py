"""What a simulated device samples: invented answers, which depend on nothing but their seeds."""

from collections.abc import Sequence
from hashlib import blake2b

from duetjax.policy.launch import SlotParams

MEAN_TOKENS = 128
"""Of an answer that nothing else ends, without its end-of-sequence token; see `InventedTokens`."""


class InventedTokens:
    """An executor's `Sampler`: the n-th token of an answer is a function of its seed and n.

    Each of `tokens` is as likely as any other. Every token but the first is the end-of-sequence
    instead with one chance in 128, so that answers have 128 tokens before it on average, in a
    geometric distribution; never among the first min_tokens. eos: the ids that end answers, of
    which the request's first one is taken; a request that ignores them all has no such end.
    """

    def __init__(self, tokens: Sequence[int], eos: Sequence[int]) -> None:
        assert tokens, "there must be a token to sample"
        self._tokens = tuple(tokens)
        self._eos = tuple(eos)

    def __call__(self, params: SlotParams, position: int) -> int:
        """The token that will stand at a position of prompt and answer."""
        sampling, index = params.sampling, position - params.num_prompt
        number, chance = divmod(_random(sampling.seed, index), MEAN_TOKENS)
        if chance == 0 and index >= max(1, sampling.min_tokens):
            for end in self._eos:
                if end in params.stop_ids:
                    return end
        return self._tokens[number % len(self._tokens)]


def _random(seed: int | None, index: int) -> int:
    """64 random bits that belong to both."""
    return int.from_bytes(blake2b(f"{seed} {index}".encode(), digest_size=8).digest())
