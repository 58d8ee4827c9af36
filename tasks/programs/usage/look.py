"""Show examples of a source as a model will see them, and say how the source was read.

python -m tasks.programs.usage.look DIR

inputs: source (none for the built-in site); tokenizer, a folder (none: one is learnt from the texts)

Only the first blocks of the source are read, so that the answer comes at once; nothing is trained or written.
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from tasks.config.commands.usage import LookJob
from tasks.config.sections.sources import ShellSite
from tasks.dataset import columns, ranking, row_sample
from tasks.dataset.columns import Questions
from tasks.dataset.question import Question
from tasks.demo_site import site
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run, main
from tasks.programs.usage.beginning import read_beginning
from tasks.programs.usage.examples import Example, build_example
from tasks.programs.usage.look_screen import show_examples, show_reading
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.models import builtin, folder_tokenizer
from tasks.system.errors import InputError

NUM_MEASURED = 200  # questions whose lengths are counted; more if more are shown
NUM_GENERATED = 300  # questions of the built-in site


class Sampled(NamedTuple):
    """A question with an answer to learn from, the best one or one that won, and the one that lost to it."""

    question: Question
    better: str
    worse: str | None
    num_pairs: int


def look(job: LookJob, run: Run) -> None:
    """Print examples with their tokens and what was cut, then how the source was read."""
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")
    is_terminal = sys.stdout.isatty()  # elsewhere no line is broken
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=not is_terminal)
    reading = read_beginning(job, find_source(job, run), run.directory)
    if not len(reading.questions.compared):
        show_reading(console, reading, [])
        raise InputError(f"No question can be used of the {reading.num_rows:,} rows that were read.")
    sample = draw_sample(job, reading.questions)
    questions = [one.question for one in sample]
    chats = {question.prompt: question.messages for question in questions if question.messages}
    encoder = pair_tables.build_encoder(job.text, load_tokenizer(job, run, questions), chats)
    examples = list(islice(iter_examples(job, encoder, sample), job.count))
    show_examples(console, examples, job)
    for question in questions:
        encoder.encode_prompt(question.prompt)
        for answer in question.answers:
            encoder.encode_answer(answer.text)
    show_reading(console, reading, [*describe_lengths(encoder, len(questions)), *encoder.warnings()])
    if "tokenizer" not in run.inputs:
        console.print(
            "The tokenizer is learnt from the texts read here; the built-in base's will differ a little.",
            style="dim",
        )


def find_source(job: LookJob, run: Run) -> Path:
    """Return the source's file or folder; the built-in site is generated, a small one."""
    if not isinstance(job.source, ShellSite):
        return run.inputs["source"]
    path = run.directory / "Posts.xml"
    site.write_posts(site.generate(num_questions=NUM_GENERATED, seed=job.seed), path)
    return path


def draw_sample(job: LookJob, questions: Questions) -> list[Sampled]:
    """Return a sample of the questions, by their ids; conversations and compared answers come first."""
    kept = np.zeros(len(questions.compared), dtype=bool)
    size = max(NUM_MEASURED, job.count)
    kept[row_sample.draw_sample(questions.about.column("id").to_pylist(), size)] = True
    questions = columns.select(questions, kept)
    pairs, _ = ranking.draw_pairs(questions, max_pairs=job.data.max_pairs, seed=job.seed)
    first = np.searchsorted(questions.owners[pairs[:, 0]], np.arange(len(questions.compared) + 1)).tolist()
    best = ranking.order_by_preference(questions)[questions.starts[:-1]]
    answers = questions.answers.column("text")
    sample = []
    for row, question in enumerate(columns.to_rows(questions)):
        num_pairs = first[row + 1] - first[row]
        better, worse = pairs[first[row]].tolist() if num_pairs else (int(best[row]), None)
        lost = None if worse is None else answers[worse].as_py()
        sample.append(Sampled(question, answers[better].as_py(), lost, num_pairs))
    return sorted(sample, key=lambda one: not (one.question.messages or len(one.question.answers) > 1))


def load_tokenizer(job: LookJob, run: Run, questions: list[Question]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the input, or one that is learnt from the texts. Raises InputError."""
    if folder := run.inputs.get("tokenizer"):
        return folder_tokenizer.load_tokenizer(folder)
    if job.text.template == "chat":
        raise InputError(
            "text.template=chat needs a tokenizer with a chat template: name its folder in --model."
        )
    texts = [text for one in questions for text in (one.prompt, *(answer.text for answer in one.answers))]
    return builtin.train_tokenizer(["Question: \n\nAnswer:", *texts], vocabulary=job.vocabulary)


def iter_examples(job: LookJob, encoder: Encoder, sample: list[Sampled]) -> Iterator[Example]:
    """Yield each question with a good answer and, if there is one, the answer that lost to it."""
    for question, better, worse, num_pairs in sample:
        counts = f"answers: {len(question.answers)}, pairs: {num_pairs}"
        title = f"{question.site}, question {question.id} ({counts})"
        messages = question.messages or (("user", question.prompt),)
        yield build_example(encoder, title, messages, better, worse, loss_on=job.loss_on)


def describe_lengths(encoder: Encoder, num_questions: int) -> list[str]:
    """Return what was cut of how many texts."""
    cut = encoder.cut
    sentences = [
        f"Of {num_questions:,} questions {cut.prompts_cut:,} are cut at "
        f"text.max_prompt_tokens={encoder.max_prompt_tokens}, and {cut.answers_cut:,} of {cut.answers:,} "
        f"answers at text.max_answer_tokens={encoder.max_answer_tokens}."
    ]
    if cut.messages_dropped:
        sentences.append(
            f"Of {cut.messages:,} messages of conversations the {cut.messages_dropped:,} oldest are left out."
        )
    return sentences


if __name__ == "__main__":
    main(look, LookJob)
