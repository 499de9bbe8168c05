"""Owns what stops the check."""


class LayersError(Exception):
    """The document or the source cannot be read as this file's head says."""
