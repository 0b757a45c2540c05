"""The folder of a run: written, sealed, resumed and read here; no pages and no training."""
