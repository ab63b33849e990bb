"""The OpenAI-compatible HTTP endpoint in front of an engine."""
