"""Commands that write the numbers quoted in the documents, into `benchmarks/results/`."""
