"""Half of a small model learns the whole one: which parts of the method matter there."""
