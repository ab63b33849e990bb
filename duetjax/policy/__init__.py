"""What to run next, as pure functions of numbers: no jax, no clock, no threads."""
