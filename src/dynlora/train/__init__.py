"""The job behind `dynlora train`: model, data, Trainer and the run's folder."""
