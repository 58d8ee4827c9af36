"""Run one request of the data stage (remote_calls.py): some of its calls, on any machine.

python -m tasks.programs.data_stage.shard REQUEST

Prints {"results": [...]} in one line. An error that the user can fix ends with status 2 and one line
{"error": sentence, "kind": "input" or "disk"}.
"""

import json
import sys
from pathlib import Path

from tasks.dataset.sources.user_names import read_user_names
from tasks.programs.data_stage import partitions, read_source
from tasks.programs.data_stage.cached_call import Function, result_type, task_type
from tasks.system.errors import InputError, disk_failure

_FUNCTIONS = (
    read_source.read_block,
    partitions.filter_partition,
    partitions.build_table_part,
    read_user_names,
)
FUNCTIONS: dict[str, Function] = {function.__name__: function for function in _FUNCTIONS}


def run_request(path: Path) -> bytes:
    """Return the results of the tasks of a request, as JSON. Raises InputError."""
    request = json.loads(path.read_bytes())
    function = FUNCTIONS[request["do"]]
    results = (function(task_type(function).validate_python(task)) for task in request["tasks"])
    dumped = (result_type(function).dump_json(result) for result in results)
    return b'{"results": [%b]}' % b",".join(dumped)


def main() -> int:
    """Print the response and return the exit status."""
    try:
        sys.stdout.buffer.write(run_request(Path(sys.argv[1])))
        return 0
    except InputError as error:
        response = {"error": str(error), "kind": "input"}
    except Exception as error:
        if (failure := disk_failure(error, Path(sys.argv[1]).parent)) is None:
            raise
        response = {"error": str(failure), "kind": "disk"}
    print(json.dumps(response))
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
