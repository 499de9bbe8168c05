"""Owns the one error a user sees: a line that says what is wrong and what was expected."""


class ExportError(Exception):
    """A mistake in the input or a limit of the exporter; the command line prints it without a traceback."""
