"""Differences between the engines that run a model: FSDP2, DeepSpeed and torch.compile."""
