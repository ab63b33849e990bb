"""What one request may ask for, and how much of it at once: GET /v1/limits."""

from typing import Any

from duetjax.config import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS
from duetjax.serve.body import MAX_BODY_BYTES
from duetjax.serve.call import MAX_CHOICES
from duetjax.serve.context import Service
from duetjax.serve.protocol import (
    MAX_COMPLETION_LOGPROBS,
    MAX_MESSAGES,
    MAX_N,
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
)


def limits(service: Service) -> dict[str, Any]:
    """All bounds by name; null where there is none."""
    return {
        "max_model_len": service.max_model_len,
        "max_body_bytes": MAX_BODY_BYTES,
        "max_prompt_characters": service.max_characters,
        "max_prompts": MAX_PROMPTS,
        "max_n": MAX_N,
        "max_choices": MAX_CHOICES,
        "max_messages": MAX_MESSAGES,
        "max_stop_strings": MAX_STOPS,
        "max_stop_characters": MAX_STOP_CHARACTERS,
        "max_stop_token_ids": MAX_STOP_IDS,
        "max_logit_bias": MAX_LOGIT_BIAS,
        "max_logprobs": MAX_COMPLETION_LOGPROBS,
        "max_top_logprobs": MAX_LOGPROBS,
        "max_num_seqs": service.client.num_slots,
        "max_num_queued_reqs": service.max_num_queued_reqs,
    }
