"""How a weight becomes a code of few bits."""
