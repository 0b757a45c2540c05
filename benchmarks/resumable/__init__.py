"""What long studies share: a table that keeps finished runs, a time limit, and a search."""
