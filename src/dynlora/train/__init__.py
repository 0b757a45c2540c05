"""Run the jobs of `dynlora train`: model, data, Trainer and the run's folder."""
