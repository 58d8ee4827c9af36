"""Let an endpoint judge decide battles in a process of its own, which a test may kill.

python -m tests.support.judges.ask_endpoint CACHE NUMBER_OF_BATTLES CONCURRENCY
"""

import os
import sys
from pathlib import Path

from tasks.judges.chat_client import Address, Limits
from tasks.judges.endpoint_judge import EndpointJudge, Settings
from tasks.judges.judge import Answer, Battle
from tasks.judges.verdict_cache import VerdictCache

TEMPLATE = "{question}\n{first}\n{second}"


def settings(**changed: object) -> Settings:
    """Return settings for a small evaluation."""
    usual = Settings(
        template=TEMPLATE, model="judge-1", temperature=0.0, max_reply_tokens=20, max_prompt_characters=2000,
        concurrency=4, prompt_price=10.0, reply_price=100.0, max_cost=100.0,
    )  # fmt: skip
    return usual._replace(**changed)  # type: ignore[arg-type]


def battles(count: int) -> list[Battle]:
    """Return battles with different prompts."""
    return [Battle(f"question {number}?", Answer("one"), Answer("two")) for number in range(count)]


def main() -> None:
    cache, count, concurrency = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    address = Address(os.environ["ALIGNFLOW_JUDGE_URL"], os.environ["ALIGNFLOW_JUDGE_KEY"])
    judge = EndpointJudge(
        "the judge", address, VerdictCache(cache), settings(concurrency=concurrency), Limits(None, 60, 60)
    )
    print(*judge.compare(battles(count), lambda done, total: None))


if __name__ == "__main__":
    main()
