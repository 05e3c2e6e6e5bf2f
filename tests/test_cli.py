"""The command line as a user meets it: output, exit codes, refusals in one line."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openllama import OpenLlamaForCausalLM
from openllama.cli import main
from openllama.tokenizer import OpenLlamaTokenizer
from tests.checkpoints import hf_weights, tiny_config, write_checkpoint
from tests.sentencepieces import trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in HF layout with a tokenizer of fewer pieces than the model has rows."""
    folder = tmp_path_factory.mktemp("hf")
    config = tiny_config(vocab_size=500, eos_token_id=None, initializer_range=0.3)
    write_checkpoint(folder, hf_weights(config), config, "pickle shards")
    (folder / "tokenizer.model").write_bytes(trained("v1-like"))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_convert_writes_a_folder_that_generates_the_same(capsys, folder, tmp_path):
    code, out, err = run(capsys, "convert", folder, tmp_path / "native")
    assert code == 0
    assert "native" in out
    assert "100%" in err, "a progress bar"
    ids = torch.tensor([[5, 6, 7]])
    ours, theirs = (OpenLlamaForCausalLM.from_pretrained(f) for f in (tmp_path / "native", folder))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_convert_refuses_a_destination_that_exists_unless_told(capsys, folder, tmp_path):
    assert run(capsys, "convert", folder, tmp_path / "native")[0] == 0
    code, out, err = run(capsys, "convert", folder, tmp_path / "native")
    assert code == 1
    assert out == ""
    assert err.startswith("openllama: ")
    assert err.count("\n") == 1
    assert "--overwrite" in err or "overwrite" in err
    assert run(capsys, "convert", folder, tmp_path / "native", "--overwrite")[0] == 0


def test_convert_casts(capsys, folder, tmp_path):
    assert run(capsys, "convert", folder, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_inspect_and_verify_describe_a_checkpoint(capsys, folder):
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 0
    assert "float32" in out
    assert run(capsys, "verify", folder)[0] == 0
    assert run(capsys, "verify", folder, "--against", folder)[0] == 0


def test_verify_fails_on_another_models_weights(capsys, folder, tmp_path):
    config = tiny_config(vocab_size=500, eos_token_id=None, initializer_range=0.3)
    other = write_checkpoint(tmp_path / "other", hf_weights(config, seed=1), config)
    code, _, err = run(capsys, "verify", folder, "--against", other)
    assert code == 1
    assert err.startswith("openllama: ")


def test_generate_prints_each_prompt_and_its_continuation(capsys, folder):
    code, out, err = run(capsys, "generate", folder, "--prompt", "To be", "--prompt", "明月", "--max-new-tokens", 8)
    assert code == 0
    assert out.startswith("To be")
    assert "\n\n明月" in out
    assert "16 tokens" in err
    assert "tokens/s" in err
    assert "peak memory" in err


def test_generate_draws_the_same_text_from_the_same_seed(capsys, folder):
    def text(*options: object) -> str:
        return run(capsys, "generate", folder, "--prompt", "To be", "--max-new-tokens", 12, *options)[1]

    assert text("--seed", 3) == text("--seed", 3)
    assert text("--seed", 3) != text("--seed", 4)
    assert text("--greedy") == text("--greedy")


def test_generate_prints_what_the_tokenizer_decodes(capsys, folder):
    model, tokenizer = OpenLlamaForCausalLM.from_pretrained(folder), OpenLlamaTokenizer.from_pretrained(folder)
    ids = tokenizer("To be", return_tensors="pt").input_ids

    def only_pieces(input_ids, scores):
        return scores.index_fill(1, torch.arange(len(tokenizer), scores.shape[1]), -torch.inf)

    expected = model.generate(ids, max_new_tokens=12, logits_processor=[only_pieces])
    _, out, _ = run(capsys, "generate", folder, "--prompt", "To be", "--max-new-tokens", 12, "--greedy")
    assert out == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n\n"


def test_generate_never_draws_an_id_without_a_piece(capsys, folder):
    code, out, _ = run(capsys, "generate", folder, "--prompt", "a", "--max-new-tokens", 60, "--temperature", 50)
    assert code == 0, "an id above the tokenizer's pieces cannot be decoded"
    assert len(out) > 20


def test_generate_reads_the_prompt_from_standard_input(capsys, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be\n"))
    assert run(capsys, "generate", folder, "--max-new-tokens", 4)[1].startswith("To be")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, err = run(capsys, "generate", folder)
    assert code == 1
    assert "no prompt" in err


def test_text_is_written_token_by_token(folder, monkeypatch):
    class Recorder(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    monkeypatch.setattr(sys, "stdout", recorder := Recorder())
    main(["generate", str(folder), "--prompt", "To be", "--max-new-tokens", "9"])
    assert recorder.flushed >= 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["inspect", "nowhere"], "nowhere"),
        (["generate", "{folder}", "--prompt", "x", "--temperature", "0"], "temperature"),
        (["generate", "{folder}", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["generate", "{folder}", "--prompt", "x", "--attn-implementation", "xformers"], "xformers"),
    ],
)
def test_a_refusal_is_one_line_on_stderr_and_exit_code_1(capsys, folder, arguments, message):
    code, _, err = run(capsys, *(argument.format(folder=folder) for argument in arguments))
    assert code == 1
    assert err.startswith("openllama: ")
    assert err.count("\n") == 1
    assert message in err


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["inspect", "nowhere", "--debug"])


def test_the_module_and_the_card_script_are_the_same_command(folder, tmp_path):
    for number, command in enumerate((["-m", "openllama", "convert"], ["scripts/convert_checkpoint.py"])):
        done = subprocess.run(
            [sys.executable, *command, folder, tmp_path / str(number)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    first, second = (sorted((p.name, p.read_bytes()) for p in (tmp_path / n).iterdir()) for n in "01")
    assert first == second
