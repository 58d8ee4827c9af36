"""Fork server for programs on machines without a GPU: preloads torch and peft and forks a child per program.

python -m tasks.programs.runtime.fork_server LISTENER OWNER     started by tasks.execution.program_forks

A request is {"stage", "module", "directory"} with descriptors: the program's log, and any others that it
shall inherit.
"""

import contextlib
import os
import runpy
import sys
import traceback
from typing import NoReturn

from tasks.system import fork_server
from tasks.system.fork_server import Request

# Libraries only, and none that computes when it is imported: each program reads alignflow's own modules anew,
# so that it runs the code that its key names.
PRELOADED = (
    "pyarrow.parquet",
    "torch",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
)


def run_program(request: Request) -> NoReturn:
    """Run a program in this forked process as ``python -m`` would, and exit with its status."""
    stage, directory = request.content["stage"], request.content["directory"]
    status = 1
    try:
        fork_server.set_process_title(stage)
        for stream in (1, 2):
            os.dup2(request.descriptors[0], stream)
        os.chdir(directory)
        sys.argv = [f"{stage}.py", directory]
        runpy.run_module(request.content["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        with contextlib.suppress(OSError):  # the log may be on a full disk
            traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    request = fork_server.serve(PRELOADED, "program-forks")
    if request is not None:
        run_program(request)
