"""Facts about public models (models/*.json), in the form of their config.json.

Each file's `_source` says where its numbers are from. A preset has no weights.
"""
