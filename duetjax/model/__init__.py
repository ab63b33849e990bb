"""Flax definitions of the models that DuetJAX serves."""
