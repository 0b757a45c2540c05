"""Models of studies, joined, converted or damaged from public ones."""
