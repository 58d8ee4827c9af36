"""A shard of the data stage: some of its blocks, ranges or shelves, done wherever there is a process.     python -m tasks.programs.data_stage.shard ASK

Prints {"results": [...]} in one line; what is the user's to mend ends with status 2 and one line {"error": sentence, "kind": "input" or "disk"}. See
away.py.
"""

import json
import sys
from pathlib import Path

from tasks.dataset.sources.user_names import read_user_names
from tasks.programs.data_stage import partitions, read_source
from tasks.programs.data_stage.cached_call import Function, result_type, task_type
from tasks.system.errors import InputError, disk_failure

FUNCTIONS: dict[str, Function] = {
    do.__name__: do
    for do in (
        read_source.read_block,
        partitions.filter_partition,
        partitions.build_table_part,
        read_user_names,
    )
}


def run_request(ask: Path) -> bytes:
    """The results of the tasks of ``ask``, as JSON. Raises InputError."""
    asked = json.loads(ask.read_bytes())
    do = FUNCTIONS[asked["do"]]
    found = (do(task_type(do).validate_python(task)) for task in asked["tasks"])
    return b'{"results": [%b]}' % b",".join(result_type(do).dump_json(result) for result in found)


def main() -> int:
    try:
        sys.stdout.buffer.write(run_request(Path(sys.argv[1])))
        return 0
    except InputError as error:
        told = {"error": str(error), "kind": "input"}
    except Exception as error:
        if (failure := disk_failure(error, Path(sys.argv[1]).parent)) is None:
            raise
        told = {"error": str(failure), "kind": "disk"}
    print(json.dumps(told))
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
