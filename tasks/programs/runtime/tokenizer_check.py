"""Check that a model's tokenizer can write questions and answers in a template, before any stage runs.

python -m tasks.programs.runtime.tokenizer_check FOLDER TEMPLATE MAX_PROMPT_TOKENS

Exits with status 2 and one sentence if it cannot.
"""

import sys
from pathlib import Path
from typing import cast

from tasks.rlhf.batches import prompts
from tasks.rlhf.models import folder_tokenizer
from tasks.system.errors import InputError


def main() -> None:
    """Encode the shortest question and an answer."""
    folder, template, max_prompt_tokens = sys.argv[1:]
    try:
        tokenizer = folder_tokenizer.load_tokenizer(Path(folder))
        chosen = cast(prompts.Template, template)
        prompts.encode_prompt(tokenizer, "", template=chosen, max_tokens=int(max_prompt_tokens))
        prompts.encode_answer(tokenizer, "It is so.", template=chosen, max_tokens=100)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
