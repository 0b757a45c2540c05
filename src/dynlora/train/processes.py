"""Several processes of one job: start them, join them, and report the first error of any of them.

torchrun and `accelerate launch` set the same environment variables as `launch` does.
"""

import atexit
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from dynlora.errors import EngineError
from dynlora.train.signals import ReportedError, handling

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENGINES = {"FSDP2": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
"""Environment variable of `accelerate launch` by engine."""
SILENT = 128 + signal.SIGTERM  # exit code of a process that ends because another one has ended
FAILURE = "dynlora/failure"
"""Key in the store of the processes: rank and error of the first that failed."""
SECONDS = 10.0  # time for the other processes to end after one has failed
PERIOD = 0.05  # seconds between two looks at the processes


def in_group() -> bool:
    """Return whether this process is one of a group that a launcher has started."""
    return all(name in os.environ for name in VARIABLES)


def is_first() -> bool:
    """Return whether this process prints and writes: the only one, or the one with rank 0."""
    return not in_group() or os.environ["RANK"] == "0"


def sharding_engine() -> str | None:
    """Return the engine that shards the model; None if each process has all of it."""
    for engine, variable in ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            return engine
    return None


def join_group() -> None:
    """Join the group of processes, and select the GPU of this one.

    Raises:
        EngineError: If a machine has fewer GPUs than processes.
    """
    import torch
    from torch import distributed as dist

    gpus, here = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if 0 < gpus < here:
        raise EngineError(
            f"each process must have a GPU of its own, got {here} processes and {gpus} on this "
            f"machine: start at most {gpus}."
        )
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")


def announce_failure(error: BaseException) -> str | None:
    """Announce the error of this process; return that of another one if it came first.

    None if this process must report its error. Another error is usually the cause, because a
    collective fails if a process has ended.
    """
    if not in_group():
        return None
    rank = os.environ["RANK"]
    if isinstance(error, KeyboardInterrupt):  # in all processes, perhaps while torch is loaded
        return None if rank == "0" else "stopped"
    from torch import distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    if not dist.is_initialized():  # the same error in all processes, such as a wrong key
        return None if os.environ["LOCAL_RANK"] == "0" else "not started"
    own = f"{rank} {type(error).__name__}: {error}"
    try:
        first = _get_default_store().compare_set(FAILURE, "", own).decode()
    except RuntimeError:
        return "the first process has ended"  # which has the store
    return None if first.startswith(f"{rank} ") else first.partition(" ")[2]


@contextmanager
def one_error() -> Iterator[None]:
    """Raise `ReportedError` instead of an error if another process has reported one."""
    try:
        yield
    except BaseException as error:
        if announce_failure(error) is not None:
            raise ReportedError(SILENT) from None
        raise


@contextmanager
def explaining_loss(advice: Callable[[], str]) -> Iterator[None]:
    """Translate the error of a collective if another process has been killed."""
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError

        if not isinstance(error, DistError) and "gloo/transport" not in str(error):
            raise
        reason = str(error).splitlines()[0].partition(". ")[0]
        reason = reason.partition("] ")[2] or reason  # without a line of Gloo's source
        raise EngineError(
            "all processes must run to the end, but one was killed or lost its connection "
            f"({reason}): {advice()}."
        ) from error


def leave(run: Callable[[], int]) -> NoReturn:
    """End this process with the exit code of `run`, without destructors.

    These can wait forever: `DistributedDataParallel` keeps the interpreter's lock while it joins
    Gloo's threads, which need the lock to free a tensor.
    """
    try:
        code = run()
    except BaseException:  # noqa: BLE001  a bug, whose traceback Python would print at the end
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(command: Sequence[str], count: int, advice: Callable[[], str]) -> int:
    """Run a command in a group of processes on this machine, and return the exit code.

    Interrupts and SIGTERM are forwarded. If a process fails, the others end too, and its exit code
    is returned.

    Args:
        command: The command, which joins the group.
        count: Number of processes.
        advice: Returns the next step after a process was killed.

    Raises:
        EngineError: If a process was killed, and no other has reported that.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    threads = str(max(1, (os.cpu_count() or 1) // count))
    # The processes would all print the same warnings of torch.
    usual = {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    workers: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(signum: int, _: FrameType | None) -> None:
        received.append(signum)
        for worker in workers:
            worker.send_signal(signum)

    with handling({signal.SIGINT: forward, signal.SIGTERM: forward}):
        try:
            for rank in map(str, range(count)):
                own = usual | os.environ | place | sizes | {"RANK": rank, "LOCAL_RANK": rank}
                # In its own session, so that Ctrl-C in the terminal arrives once.
                workers.append(subprocess.Popen(command, env=own, start_new_session=True))
            codes = _exit_codes(workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    return _exit_code(codes, received, advice)


def _exit_codes(workers: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Return the exit codes of all processes, None for those that do not end after a failure."""
    deadline = math.inf
    while True:
        codes = [worker.poll() for worker in workers]
        if None not in codes or time.monotonic() > deadline:
            return codes
        if any(codes):
            deadline = min(deadline, time.monotonic() + SECONDS)
        time.sleep(PERIOD)


def _exit_code(
    codes: Sequence[int | None], received: Sequence[int], advice: Callable[[], str]
) -> int:
    """Return the exit code of the process that reported a failure, or else the highest one."""
    for code in codes:
        if code is not None and code > 0 and code != SILENT:
            return code
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            if received:  # a process that is stopped while it loads libraries may crash
                return 128 + received[0]
            raise EngineError(
                f"all processes must run to the end, but process {rank} of {len(codes)} was ended "
                f"by {signal.Signals(-code).name}, as the system does if memory runs out: "
                f"{advice()}."
            )
    return max(code or 0 for code in codes)
