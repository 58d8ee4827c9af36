"""Test `alignflow serve` with a real server: answers of the policy itself, whole and streamed."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from flows.extras import missing_packages
from tasks.config.commands.usage import Sampling
from tasks.programs.usage.answer import Answer
from tasks.programs.usage.chat_templates import Message
from tasks.programs.usage.loaded_policies import load_policies
from tests.programs.usage.tiny_policies import policy
from tests.support import tiny
from tests.support.fake_programs import wait_until
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_packages("serve")), reason=f"not installed: {', '.join(missing_packages('serve'))}"
    ),
]
ASKED = "How do I list files?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model whose likeliest answer is plain text, which it never ends."""
    folder, made = tmp_path_factory.mktemp("served") / "tiny", tiny.model()
    words = tiny.tokenizer()
    with torch.no_grad():
        for token in range(tiny.VOCABULARY):
            text = words.decode([token])
            if token in (tiny.PAD, tiny.EOS) or not (text.isascii() and text.isprintable()):
                made.get_input_embeddings().weight[token] = 0  # tied: never the likeliest
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[httpx.Client]:
    """Serve the model on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = model.parent / "home"
    environment = os.environ | {
        "ALIGNFLOW_HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    with (model.parent / "log.txt").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "serve", str(model), "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=900) as opened:
            wait_until(lambda: _is_up(opened))
            yield opened
    finally:
        server.terminate()
        server.wait(900)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    assert len(list((home / "exports").iterdir())) == 1


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_it_answers_as_the_policy_does(client: httpx.Client, model: Path) -> None:
    [listed] = client.get("/v1/models").json()["data"]
    assert listed["id"] == "tiny"
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": ASKED}],
        "temperature": 0,
        "max_tokens": 12,
    }
    reply = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    [ours] = load_policies((policy(model),), tiny.CPU)
    answer = Answer(ours, [Message(role="user", content=ASKED)], Sampling(temperature=0), seed=0)
    answer.extend(60)
    assert answer.text
    assert reply["message"]["content"].strip() == answer.text
    streamed = ""
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    for chunk in chunks:
        streamed += chunk["choices"][0]["delta"].get("content") or ""
    assert len(chunks) > 3
    assert streamed.strip() == answer.text


def test_another_model_is_refused(client: httpx.Client) -> None:
    body = {"model": "other", "messages": [{"role": "user", "content": ASKED}]}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "pinned to 'tiny'" in response.text
