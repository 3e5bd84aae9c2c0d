"""torchrun for training that is told to stop: `python -m univigu.training.launch [torchrun's options] -m MODULE ...`.

It takes torchrun's own options and environment (PET_NNODES and so on), and differs in what happens at the end:

* SIGTERM is passed on to the workers, and they are waited for: they agree on a step, save it and leave with exit code
  81. torchrun would kill them 30 seconds later. How long they have is up to whoever sent the signal.
* The exit code is the workers' own, not 1 for all that can go wrong: a scheduler can tell 81 (run it again, it goes on)
  from what no second try will mend.
* A worker that has done its work is not aborted by gloo's threads as it leaves (`univigu.training.worker`).
"""

import os
import signal
import sys
from collections.abc import Iterable, Sequence

from univigu.errors import PreemptedError
from univigu.threads import bound_spinning

STOPPED = PreemptedError.exit_code
WORKER = "univigu.training.worker"


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments in this process; returns the exit code that speaks for all workers."""
    bound_spinning()
    import tempfile

    import psutil
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    told: list[int] = []

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        workers = psutil.Process().children()
        if not workers:
            sys.exit(STOPPED)  # nothing has begun
        for worker in workers:
            worker.send_signal(number)

    os.environ["UNIVIGU_PARENTS"] = f"{os.environ.get('UNIVIGU_PARENTS', '')},{os.getpid()}"  # workers end with this
    signal.signal(signal.SIGTERM, pass_on)
    folder = tempfile.TemporaryDirectory(prefix="univigu-launch-")  # torchrun leaves what it makes itself
    try:
        options = run.parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments])
        if not (options.no_python or options.run_path):
            start = [*(["-m"] if options.module else []), options.training_script, *options.training_script_args]
            options.module, options.training_script, options.training_script_args = True, WORKER, start
        options.log_dir = options.log_dir or folder.name
        run.run(options)
    except ChildFailedError as error:
        return exit_code((failure.exitcode for failure in error.failures.values()), bool(told))
    finally:
        folder.cleanup()
    return 0


def exit_code(codes: Iterable[int], told: bool) -> int:
    """The exit code that says what became of workers with these `codes` (below zero: the signal that ended them).

    A worker's own word counts for more than a signal: torchrun sends one to the rest as soon as the first has ended.
    """
    ended = set(codes)
    if STOPPED in ended or (told and ended == {-signal.SIGTERM}):
        return STOPPED
    return max(ended) if max(ended) > 0 else 128 - min(ended)  # a traceback's 1 says less than the code of an error


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
