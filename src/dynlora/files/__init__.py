"""Files, whoever they are for: written whole or not at all, and JSON that every reader takes."""
