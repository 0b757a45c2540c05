"""`python -m benchmarks STUDY.yaml` runs a study, `python -m benchmarks report` renders results."""

import sys

from benchmarks.harness.command import main

sys.exit(main())
