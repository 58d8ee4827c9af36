"""Run transformers' own chat server with a tiny model that judges: by its prompt it says A or B."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.programs.usage.chat_templates import set_chat_template
from tests.support import tiny
from tests.support.fake_programs import wait_until
from tests.support.paths import ROOT

NAME = "tiny-judge"


def write_judge(folder: Path, prompts: list[str]) -> None:
    """Write a model whose likeliest next token is A after some of the prompts and B after the others."""
    words, model = tiny.tokenizer(), tiny.model()  # a Llama: of some others the server cuts out the reply
    set_chat_template(words, "question-answer")
    states = torch.stack([_last_state(model, words, prompt) for prompt in prompts])
    middle = states.mean(0)
    direction = torch.linalg.svd(states - middle)[2][0]  # in which the prompts differ most
    direction -= middle * (direction @ middle) / (middle @ middle)
    weight = torch.zeros(tiny.VOCABULARY, tiny.WIDTH)
    model.config.tie_word_embeddings = False
    model.get_output_embeddings().weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        for letter, sign in (("A", 100), ("B", -100)):
            [token] = words(letter, add_special_tokens=False)["input_ids"]
            weight[token] = sign * direction
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def _last_state(model: PreTrainedModel, words: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    messages = [{"role": "user", "content": prompt}]
    ids = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[-1][0, -1]


class TransformersServer:
    """`transformers serve` on a free port, which is the same after a restart."""

    def __init__(self, folder: Path) -> None:
        """Start it with the model in ``folder``."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        """Start the process, and wait until it answers."""
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        }
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        with (self.folder.parent / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "transformers.cli.transformers", "serve", self.folder.name, *options],
                cwd=self.folder.parent,
                env=environment,
                stdout=log,
                stderr=log,
            )
        wait_until(self._is_up)

    def _is_up(self) -> bool:
        assert self.process.poll() is None, (self.folder.parent / "server.log").read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """Kill the process, as a crash would."""
        self.process.kill()
        self.process.wait(900)
