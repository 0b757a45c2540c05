"""Compare real engines with PEFT on a dynamic adapter: see `__main__.py`."""
