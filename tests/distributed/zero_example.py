"""Runs a script with its arguments under `accelerate launch` and DeepSpeed on CPUs."""

import os
import runpy
import sys

from tests.distributed.cpus_as_gpus import take_cpus_for_gpus

del os.environ["ACCELERATE_USE_CPU"]  # with it Accelerate leaves out its plugin of DeepSpeed
take_cpus_for_gpus()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
