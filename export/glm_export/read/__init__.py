"""What is read: checkpoints, adapters, configurations, tokenizers, and the one table of weight names."""
