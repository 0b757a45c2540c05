"""Fused forward and backward of LoRA layers."""
