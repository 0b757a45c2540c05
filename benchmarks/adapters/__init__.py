"""Studies of adapters on disk: cut, averaged, and trained to restore a damaged model."""
