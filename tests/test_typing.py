"""What a type checker says of a user's script: nothing of good calls, and of each bad one what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import openllama

pytest.importorskip("mypy", reason="mypy is not installed; it is part of the dev extra")

#: a line that is wrong ends with the code of mypy's error
SCRIPT = """\
from collections.abc import Iterator

import torch
from torch import Tensor

from openllama import OpenLlamaForCausalLM
from openllama.generation import GenerateOutput, GenerationConfig, generate, stream
from openllama.outputs import CausalLMOutput

model = OpenLlamaForCausalLM.from_pretrained("folder")
ids = torch.tensor([[1, 5, 9]])

tokens: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
output: GenerateOutput = model.generate(ids, return_dict_in_generate=True, output_scores=True)
length: int = generate(model, ids, do_sample=True, top_p=0.9).shape[1]
sequences: Tensor = generate(model, ids, return_dict_in_generate=True).sequences
steps: Iterator[Tensor] = model.stream(ids, temperature=0.7, eos_token_id=[2, 3], assistant_model=model)
config = GenerationConfig(num_beams=4, early_stopping="never")
either: Tensor | GenerateOutput = model.generate(ids, return_dict_in_generate=bool(length), generation_config=config)
forward: CausalLMOutput = model(ids)
logits: Tensor | None = model(ids, use_cache=False).logits
first: Tensor = model(ids, return_dict=False)[0]

model.generate(ids, max_new_token=5)  # call-overload
model.generate(ids, max_new_tokens="5")  # call-overload
model.generate(ids, early_stopping="always")  # call-overload
model.generate(ids, past_key_values=ids.tolist)  # call-overload
model.generate(ids).sequences  # attr-defined
model.generate(ids, return_dict_in_generate=True).shape  # attr-defined
generate(model, ids, top_k=2.5)  # call-overload
generate(ids, max_new_tokens=5)  # call-overload
stream(model, ids, temprature=0.7)  # call-arg
model.stream(ids, streamer=None)  # call-arg
GenerationConfig(num_beam=4)  # call-arg
model(ids).logit  # attr-defined
model(ids, attention_masks=ids)  # call-overload
model(ids, return_dict=False).logits  # attr-defined
"""


def test_good_calls_pass_and_each_bad_one_is_told_of(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    options = ["--config-file=", "--no-pretty", "--show-error-codes", "--cache-dir=.mypy_cache/user"]
    command = [sys.executable, "-m", "mypy", *options, str(script)]  # the cache of `make lint` has other options
    root = Path(openllama.__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    found = re.findall(r"user\.py:(\d+): error: .*\[([\w-]+)\]$", result.stdout, flags=re.MULTILINE)
    expected = [
        (str(number), line.partition("  # ")[2]) for number, line in enumerate(SCRIPT.splitlines(), 1) if "  # " in line
    ]
    assert sorted(set(found)) == sorted(expected), result.stdout + result.stderr
