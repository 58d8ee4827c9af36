"""`alignflow chat`: ask one or more policies on the terminal, side by side."""

import argparse
import tempfile
from pathlib import Path

from flows.arguments import number
from flows.commands.usage.named_policies import HELP_MODELS, locate_policies
from tasks.config.commands.usage import ChatJob, Sampling

HELP = "Chat with one or more policies, side by side."
EXAMPLE = "alignflow chat sft ppo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow chat`."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help=f"{HELP_MODELS} (default: all that the newest run has trained)",
    )
    parser.add_argument(
        "--temperature",
        type=number(float, 0, 10),
        help="0 takes the likeliest token (default: as the run's answers were sampled)",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0.001, 1),
        default=1.0,
        help="sample from the likeliest tokens that have this probability together (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=number(int, 1), help="longest answer (default: as the run's answers)"
    )
    parser.add_argument("--seed", type=number(int, 0), help="makes the answers repeatable")
    parser.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        help="answer with the earlier turns in mind, or each question on its own (default: on its own if the "
        "policy was trained on single questions, text.template=question-answer)",
    )


def main(args: argparse.Namespace) -> None:
    """Answer questions until Ctrl-D. Raises InputError."""
    sampling = Sampling(
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed
    )
    policies = locate_policies(args.models)
    from tasks.execution.foreground import run_in_foreground

    job = ChatJob(policies=tuple(policies), sampling=sampling, history=args.history)
    with tempfile.TemporaryDirectory(prefix="alignflow-chat-") as folder:
        run_in_foreground("chat", job, Path(folder))
