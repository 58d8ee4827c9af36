"""Test that a policy exported as GGUF by llama.cpp's converter loads again, with the same probabilities.

The converter is no package: the test runs if a checkout of llama.cpp is on the PATH.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from flows.commands.usage.export import CONVERTER
from tasks.config.commands.usage import ExportJob
from tasks.programs.runtime.program import Run
from tasks.programs.usage.export import export
from tasks.programs.usage.loaded_policies import load_policies
from tests.programs.usage.tiny_policies import adapter, policy
from tests.support import tiny

MISSING = [name for name in ("gguf", "sentencepiece") if find_spec(name) is None]
CHECKOUT = shutil.which(CONVERTER)

pytestmark = [
    pytest.mark.skipif(CHECKOUT is None, reason=f"llama.cpp's {CONVERTER} is not on the PATH"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# llama.cpp knows tokenizers by a hash; it is told that the test's splits texts as GPT-2's does
WRAPPER = """
import runpy, sys
from pathlib import Path
converter = {converter!r}
sys.path[:0] = [str(Path(converter).parent), str(Path(converter).parent / "gguf-py")]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[0] = converter
runpy.run_path(converter, run_name="__main__")
"""


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_policy_has_the_same_probabilities_after_a_round_trip(kind: str, tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base", kind)
    one = policy(base, adapter(tmp_path / "ppo", base))
    converter = tmp_path / "convert.py"
    converter.write_text(WRAPPER.format(converter=CHECKOUT))
    job = ExportJob(policy=one, form="gguf", converter=str(converter))
    run = Run(tiny.write_job(tmp_path / "run", "export", job.model_dump(mode="json"), {}))
    export(job, run)

    loaded = AutoModelForCausalLM.from_pretrained(
        run.artifact,
        gguf_file="model.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    [ours] = load_policies((one,), tiny.CPU)
    [start] = load_policies((policy(base),), tiny.CPU)
    ids = torch.arange(2, 98).reshape(3, 32)
    with torch.no_grad():
        theirs = loaded(ids).logits.log_softmax(-1)
        with ours.active() as model:
            expected = model(ids).logits.log_softmax(-1)
        with start.active() as model:
            assert (model(ids).logits.log_softmax(-1) - expected).abs().max() > 0.1, "the adapter counts"
    assert (theirs - expected).abs().max() < 0.02, "16-bit weights"
    text = "Question: How do I list files?"
    words = AutoTokenizer.from_pretrained(run.artifact, gguf_file="model.gguf")
    assert words(text)["input_ids"] == ours.tokenizer(text)["input_ids"]
