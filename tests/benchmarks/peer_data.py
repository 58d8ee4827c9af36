"""Run the StackLLaMA article's data code: datasets.map with markdownify, scores, ten pairs a question.

python peer_data.py ROWS OUT

Runs in an environment of its own (datasets, markdownify); rows are those of
HuggingFaceH4/stack-exchange-preferences. Prints one line of JSON.
"""

import json
import random
import sys
import time
from itertools import combinations
from typing import Any


def in_markdown(row: dict[str, Any]) -> dict[str, Any]:
    from markdownify import markdownify

    answers = [{**answer, "text": markdownify(answer["text"])} for answer in row["answers"]]
    return {"question": markdownify(row["question"]), "answers": answers}


def in_pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"qid": [], "question": [], "response_j": [], "response_k": []}
    for qid, question, answers in zip(batch["qid"], batch["question"], batch["answers"], strict=True):
        pairs = [
            (a, b) if a["pm_score"] > b["pm_score"] else (b, a)
            for a, b in combinations(answers, 2)
            if a["pm_score"] != b["pm_score"]
        ]
        for better, worse in random.sample(pairs, min(10, len(pairs))):
            for name, value in zip(found, (qid, question, better["text"], worse["text"]), strict=True):
                found[name].append(value)
    return found


def main() -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    rows, out = sys.argv[1:]
    started = time.perf_counter()
    data = Dataset.from_parquet(rows)
    texts = len(data) + sum(map(len, data["answers"]))
    pairs = data.map(in_markdown).map(in_pairs, batched=True, remove_columns=data.column_names)
    pairs.to_parquet(out)
    print(json.dumps({"seconds": time.perf_counter() - started, "texts": texts, "pairs": len(pairs)}))


if __name__ == "__main__":
    main()
