"""The four methods of a job, and what they add to a base model."""
