"""Keeps answers to a grammar and reasoning to a budget: says which tokens may come next."""
