"""What a finished run shows a reader: a table on the terminal and a heat map of the ranks."""
