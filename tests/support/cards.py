"""Build data cards, and render their pages."""

import copy
from typing import Any

from tasks.config.data import Data
from tasks.reporting import data_card

PAIR: dict[str, Any] = {}
PAIR |= {"question_id": 71, "prompt": "Which line to take?\n\nI have *two* bags.", "site": "a.org"}
PAIR |= {"chosen": "The blue one.", "rejected": "Walk.", "chosen_score": 5, "rejected_score": 2}
PAIR |= {"question_url": "https://a.org/q/71", "question_author": "Ann", "question_licence": "CC BY-SA 4.0"}
PAIR |= {
    "chosen_url": "https://a.org/a/72",
    "chosen_author": "https://a.org/users/9",
    "chosen_licence": "CC BY-SA 3.0",
}
PAIR |= {"rejected_url": "https://a.org/a/73", "rejected_author": "Bo", "rejected_licence": "CC BY-SA 2.5"}
CARD: dict[str, Any] = {
    "kind": "stack-exchange",
    "site": "a.org, b.org",
    "sites": {"a.org": 2001, "b.org": 641},
    "read": {"questions": 2725, "answers": 5798},
    "rows_seen": 10_007,
    "dropped": {
        "post types other than question and answer": 1477,
        "questions without answers": 83,
        "answers whose question is missing": 2,
        "questions of the reward split without two differently scored answers": 494,
    },
    "quarantined": {"rows that cannot be read": 7},
    "rules": {
        "rl_share": 0.1,
        "max_pairs": 13,
        "duplicates": "together",
        "languages": [],
        "max_questions_per_author": None,
        "unheard_of": True,
    },
    "masked": {"email": 3137, "phone": 1213, "key": 0},
    "kept": {"questions": 2642, "answers": 5796, "pairs": 4032},
    "questions_with_pairs": 1437,
    "split_questions": {"evaluation": 344, "finetune": 928, "reward": 1104, "rl": 266},
    "rows": {
        "corpus": 2025,
        "evaluation": 344,
        "evaluation_pairs": 579,
        "finetune": 928,
        "reward": 1705,
        "reward_groups": 610,
        "rl": 266,
    },
    "scores": [{"score": -1, "count": 1021}, {"score": 3, "count": 4775}],
    "answer_chars": [{"from": 32, "below": 64, "count": 1796}, {"from": 1024, "below": 2048, "count": 4000}],
    "prompt_chars": [{"from": 128, "below": 256, "count": 2642}],
    "answers_per_question": [
        {"answers": 1, "count": 1205},
        {"answers": 4, "count": 1399},
        {"answers": 40, "count": 38},
    ],
    "gaps": [{"gap": 1, "count": 3070}, {"gap": 7, "count": 962}],
    "longer_wins": 0.676,
    "older_wins": 0.633,
    "licences": {"CC BY-SA 3.0": 8263, "CC BY-SA 4.0": 175},
    "examples": [PAIR],
}


def render_card(card: dict[str, Any], **more: Any) -> str:
    """Return the page of a data card."""
    return data_card.page(card, descriptions=Data.descriptions(), **more)


def make_card(**changes: Any) -> dict[str, Any]:
    """Return a data card in which every count is different, with some fields changed."""
    return copy.deepcopy(CARD) | changes
