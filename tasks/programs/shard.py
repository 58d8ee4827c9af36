"""A shard of the data stage: some of its blocks, ranges or shelves, done wherever there is a process.     python -m tasks.programs.shard ASK

Prints {"results": [...]} in one line; what is the user's to mend ends with status 2 and one line {"error": sentence}. See away.py.
"""

import json
import sys
from pathlib import Path

from tasks.programs import ranges, reading
from tasks.programs.call import Do, result_type, task_type
from tasks.rlhf.people import names_in
from tasks.rlhf.refusal import InputError

KNOWN: dict[str, Do] = {do.__name__: do for do in (reading.take, ranges.shelve, ranges.tabulate, names_in)}


def answered(ask: Path) -> bytes:
    """The results of the tasks of ``ask``, as JSON. Raises InputError."""
    asked = json.loads(ask.read_bytes())
    do = KNOWN[asked["do"]]
    found = (do(task_type(do).validate_python(task)) for task in asked["tasks"])
    return b'{"results": [%b]}' % b",".join(result_type(do).dump_json(result) for result in found)


if __name__ == "__main__":
    try:
        sys.stdout.buffer.write(answered(Path(sys.argv[1])))
    except InputError as error:
        print(json.dumps({"error": str(error)}))
        raise SystemExit(2) from None
