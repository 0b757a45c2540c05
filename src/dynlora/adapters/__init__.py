"""LoRA adapters: rank plans to resized PEFT layers, their optimizer state and configuration."""
