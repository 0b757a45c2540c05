"""Runs a script with its arguments under `accelerate launch` and DeepSpeed on CPUs.

There Accelerate takes each process for the only one, whatever DeepSpeed has started.
"""

import os
import runpy
import sys

from accelerate.state import PartialState
from torch import distributed

del os.environ["ACCELERATE_USE_CPU"]  # with it Accelerate leaves out its plugin of DeepSpeed
PartialState()
PartialState._shared_state["num_processes"] = distributed.get_world_size()
for index in ("process_index", "local_process_index"):
    PartialState._shared_state[index] = distributed.get_rank()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
