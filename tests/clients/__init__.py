"""Runs clients of other people's making against the server and writes a table of what works."""
