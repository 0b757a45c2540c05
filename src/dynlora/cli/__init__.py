"""The command line: one module per verb.

Verbs import slow libraries when they run, so that `--help` does not wait for torch.
"""
