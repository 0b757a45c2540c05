"""Terminal tables, HTML page and rank heat map of a run."""
