"""What a job would train and take, found before any training."""
