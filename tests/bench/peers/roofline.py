"""Owns the limits: what share of the machine's bandwidth and arithmetic a figure comes to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a token costs at least."""

    num_layer_weights: int
    num_head_weights: int
    bits_per_weight: float

    def bandwidth_share(self, tokens_per_s: float, read_gb_per_s: float) -> float:
        """Of one stream: every weight is read for every token."""
        num_bytes = (self.num_layer_weights + self.num_head_weights) * self.bits_per_weight / 8
        return tokens_per_s * num_bytes / (read_gb_per_s * 1e9)

    def arithmetic_share(self, output_per_s: float, total_per_s: float, giga_ops_per_s: float) -> float:
        """Every token goes through the layers, and only generated ones through the LM head."""
        per_s = 2 * (self.num_layer_weights * total_per_s + self.num_head_weights * output_per_s)
        return per_s / (giga_ops_per_s * 1e9)
