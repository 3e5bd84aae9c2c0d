"""torchrun that shuts down gracefully: `python -m univigu.training.launch [torchrun's options] -m MODULE ...`.

It takes torchrun's own options and environment (PET_NNODES and so on), and differs in how a run ends:

* SIGTERM is forwarded to the workers, and the launcher waits for them: they agree on a step, save it and exit with code
  81. torchrun would kill them after 30 seconds. The sender of the signal decides how long they may take.
* The exit code is the workers' own, not 1 for every failure: a scheduler can tell 81 (run again to resume) from errors
  that a retry does not fix.
* A driver that is too old for the build of torch ends it in one sentence, before a worker starts.
* A worker that has finished is not aborted by gloo's threads during its exit (`univigu.training.worker`).
"""

import os
import signal
import sys
from collections.abc import Iterable, Sequence

from univigu.errors import PreemptedError, UniViGUError
from univigu.threads import bound_spinning
from univigu.training.driver import check_driver

STOPPED = PreemptedError.exit_code
WORKER = "univigu.training.worker"


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments in this process; returns one exit code for all workers."""
    bound_spinning()
    import tempfile

    import psutil
    import torch
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        check_driver(torch.version.cuda)
    except UniViGUError as error:
        print(f"univigu: {error}", file=sys.stderr)
        return error.exit_code

    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        workers = psutil.Process().children()
        if not workers:
            sys.exit(STOPPED)  # no worker has started yet
        for worker in workers:
            worker.send_signal(number)

    os.environ["UNIVIGU_PARENTS"] = f"{os.environ.get('UNIVIGU_PARENTS', '')},{os.getpid()}"  # workers watch it
    signal.signal(signal.SIGTERM, forward)
    folder = tempfile.TemporaryDirectory(prefix="univigu-launch-")  # torchrun does not remove one that it makes
    try:
        options = run.parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments])
        if not (options.no_python or options.run_path):
            start = [*(["-m"] if options.module else []), options.training_script, *options.training_script_args]
            options.module, options.training_script, options.training_script_args = True, WORKER, start
        options.log_dir = options.log_dir or folder.name
        run.run(options)
    except ChildFailedError as error:
        return exit_code((failure.exitcode for failure in error.failures.values()), bool(received))
    finally:
        folder.cleanup()
    return 0


def exit_code(codes: Iterable[int], terminated: bool) -> int:
    """One exit code for workers with these `codes` (negative: the signal that ended them).

    terminated: whether the launcher received SIGTERM. A worker's own code has precedence over a signal, because
    torchrun signals the other workers as soon as the first one has ended.
    """
    ended = set(codes)
    if STOPPED in ended or (terminated and ended == {-signal.SIGTERM}):
        return STOPPED
    return max(ended) if max(ended) > 0 else 128 - min(ended)  # the largest, as 1 stands for any traceback


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
