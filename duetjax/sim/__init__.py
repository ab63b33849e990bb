"""A device made of numbers: how long launches take is given, what they sample is invented."""
