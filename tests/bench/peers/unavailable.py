"""Owns the one reason for which a contender is left out of a run, and not the run ended."""


class Unavailable(Exception):
    """A contender cannot be installed, prepared or started; the text says why."""
