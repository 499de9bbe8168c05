"""The members of the family."""
