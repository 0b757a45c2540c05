"""Real engines serve a dynamic adapter and must continue as PEFT does: see `__main__.py`."""
