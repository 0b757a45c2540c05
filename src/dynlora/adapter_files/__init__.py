"""Read, check and rewrite saved LoRA adapters; only merging and `--data` need the base model."""
