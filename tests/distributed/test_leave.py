"""A process that has finished its work ends, whatever Gloo's threads still do."""

from tests.distributed.launch import run_in_processes


def test_a_process_ends_while_gloo_still_frees_a_tensor():
    run_in_processes("tests.distributed.leaving_worker")
