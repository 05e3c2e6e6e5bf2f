"""The command line as a user meets it: output, exit codes, refusals in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.cli import main
from openllama.tokenizer import OpenLlamaTokenizer
from tests.checkpoints import hf_weights, tiny_config, write_checkpoint
from tests.sentencepieces import TINY_CHECKPOINT, trained


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
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["write model.safetensors", "compare model.safetensors"]
    assert all("100%" in line and line.endswith("all done in 0:00") for line in lines[1:])
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


def test_inspect_tells_more_when_asked(capsys, folder):
    _, out, _ = run(capsys, "inspect", folder, "--tree", "--stats")
    assert len([line for line in out.splitlines() if line.startswith("model.layers.N.mlp.up_proj.weight")]) == 2
    code, out, _ = run(capsys, "inspect", folder, "--json", "--stats")
    assert code == 0
    assert json.loads(out)["statistics"]["model.norm.weight"]["not_finite"] == 0


def test_diff_tells_by_its_exit_code_whether_there_is_one(capsys, folder, tmp_path):
    run(capsys, "convert", folder, tmp_path / "half", "--dtype", "bfloat16")
    assert run(capsys, "diff", folder, folder)[0] == 0
    with pytest.raises(SystemExit) as exit:
        main(["diff", str(folder), str(tmp_path / "half")])
    assert exit.value.code == 1
    assert "relative error" in capsys.readouterr().out


def test_verify_compares_logits(capsys, folder, tmp_path):
    run(capsys, "convert", folder, tmp_path / "same")
    code, out, _ = run(capsys, "verify", tmp_path / "same", "--against", folder, "--logits", "To be")
    assert code == 0
    assert "largest difference 0, mean 0" in out
    code, _, err = run(capsys, "verify", folder, "--logits")
    assert code == 1
    assert "--against" in err


def test_verify_compares_a_plain_llama_with_the_open_llama_that_it_was_made_from(capsys, tmp_path):
    assert run(capsys, "convert", TINY_CHECKPOINT, tmp_path / "llama", "--to", "llama")[0] == 0
    code, out, _ = run(capsys, "verify", tmp_path / "llama", "--against", TINY_CHECKPOINT, "--logits")
    assert code == 0
    assert f"bit for bit equal to {TINY_CHECKPOINT} as a plain LLaMA rounded to bfloat16" in out
    assert "largest difference 0, mean 0" in out


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


def test_a_tokenizer_larger_than_its_model_is_refused(capsys, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    pieces, rows = len(OpenLlamaTokenizer.from_pretrained(folder)), OpenLlamaConfig.from_pretrained(folder).vocab_size
    added = {f"<t{i}>": pieces + i for i in range(rows - pieces + 1)}
    (tmp_path / "copy" / "added_tokens.json").write_text(json.dumps(added))
    code, _, err = run(capsys, "generate", tmp_path / "copy", "--prompt", "To")
    assert code == 1
    assert f"has {rows + 1} tokens, the model only {rows}" in err


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
        (["generate", "{folder}", "--prompt", "x", "--device", "meta"], "--device meta: tensors there have no numbers"),
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


# --- batches ---


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_lines_are_answered_in_order_as_each_prompt_alone(capsys, folder, tmp_path):
    prompts = ["To be", "明月", "user: who is there?", "a"]
    lines = write_lines(tmp_path / "in", *({"prompt": prompt, "id": i} for i, prompt in enumerate(prompts)))
    options = ("--greedy", "--max-new-tokens", 6)
    code, out, err = run(capsys, "generate", folder, "--jsonl", lines, "--batch-size", 3, *options)
    assert code == 0
    assert "4/4" in err, "a progress bar"
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == [0, 1, 2, 3]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert run(capsys, "generate", folder, "--prompt", prompt, *options)[1] == prompt + answer["text"] + "\n\n"


def test_lines_come_from_standard_input_and_go_to_a_file(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "To be"}\n'))
    command = ("generate", folder, "--jsonl", "-", "--output", tmp_path / "out", "--max-new-tokens", 4)
    code, out, _ = run(capsys, *command, "--set", "num_return_sequences=2", "--set", "do_sample=true", "--seed", 1)
    assert (code, out) == (0, "")
    assert len(json.loads((tmp_path / "out").read_text())["texts"]) == 2


@pytest.mark.parametrize("bad", ["nonsense", '{"text": "x"}', '{"prompt": 3}', '["prompt"]'])
def test_a_line_that_is_no_prompt_stops_or_is_skipped_as_asked(capsys, folder, tmp_path, bad):
    lines = write_lines(tmp_path / "in", {"prompt": "To be"}, bad, {"prompt": "or"})
    code, out, err = run(capsys, "generate", folder, "--jsonl", lines, "--max-new-tokens", 2)
    assert (code, out) == (1, "")
    assert "line 2" in err
    code, out, err = run(capsys, "generate", folder, "--jsonl", lines, "--max-new-tokens", 2, "--on-error", "skip")
    assert (code, out.count("\n")) == (0, 2)
    assert "line 2" in err


# --- settings ---


@pytest.mark.parametrize(
    "settings",
    [
        ["num_beams=3"],
        ["num_beams=4", "num_beam_groups=2", "diversity_penalty=0.5"],
        ["num_beams=2", "do_sample=true"],
        ["penalty_alpha=0.6", "top_k=4"],
        ["prompt_lookup_num_tokens=3"],
        ["repetition_penalty=1.2"],
    ],
)
def test_every_strategy_is_reached_by_set(capsys, folder, settings):
    words = [word for setting in settings for word in ("--set", setting)]
    code, out, err = run(capsys, "generate", folder, "--prompt", "To be", "--max-new-tokens", 5, "--seed", 0, *words)
    assert code == 0, err
    assert out.startswith("To be")
    assert "5 tokens" in err


@pytest.mark.parametrize("fast", [[], ["--fast"]], ids=["plain", "fast"])
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_an_assistant_s_guesses_leave_the_text_as_it_is(capsys, folder, tmp_path, quantization, fast):
    arguments = ("generate", folder, "--prompt", "To be", "--max-new-tokens", 8, "--greedy", *fast)
    _, alone, _ = run(capsys, *arguments)
    assistant = folder
    if quantization is not None:
        assistant = tmp_path / quantization
        assert run(capsys, "convert", folder, assistant, "--quantize", quantization)[0] == 0
    code, assisted, err = run(capsys, *arguments, "--assistant", assistant)
    assert (code, assisted) == (0, alone), err


@pytest.mark.parametrize("way", ["streamed", "beams", "lines"])
def test_a_text_ends_before_a_stop_string(capsys, folder, tmp_path, way):
    lines = write_lines(tmp_path / "in", {"prompt": "To be"}, {"prompt": "or not"})
    source = ("--jsonl", lines) if way == "lines" else ("--prompt", "To be")
    arguments = ("generate", folder, *source, "--max-new-tokens", 12, "--greedy")
    arguments += ("--set", "num_beams=2") if way == "beams" else ()

    def continuation() -> str:
        code, out, err = run(capsys, *arguments)
        assert code == 0, err
        return json.loads(out.splitlines()[0])["text"] if way == "lines" else out.removesuffix("\n\n")

    whole = continuation()
    stop = whole[-4:-2]
    arguments += ("--stop", "never there", f"--stop={stop}")  # one that begins with "-" would look like an option
    prompt = "" if way == "lines" else "To be"
    made = whole.removeprefix(prompt)
    assert continuation() == prompt + made[: made.index(stop)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stop", ""], "--stop"),
        (["--greedy", "--set", "do_sample=true"], "do_sample"),
        (["--max-new-tokens", "3", "--set", "max_new_tokens=4"], "max_new_tokens"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--device", "nosuch"], "--device nosuch"),
        (["--output", "x"], "--output needs --jsonl"),
        (["--on-error", "skip"], "--on-error needs --jsonl"),
        (["--prompt", ""], "empty"),
        (["--set", "do_sample=no"], "do_sample must be true or false, got 'no'"),
        (["--set", "eos_token_id=abc"], "eos_token_id"),
        (["--assistant", "nowhere"], "nowhere"),
        (["--set", "num_beam=3"], "num_beam"),
        (["--set", "num_beams"], "NAME=VALUE"),
        (["--greedy", "--top-p", "0.5"], "--greedy"),
        (["--jsonl", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--jsonl", "x", "--batch-size", "0"], "batch-size"),
    ],
)
def test_bad_settings_are_refused_in_one_line(capsys, folder, words, message):
    prompt = [] if "--jsonl" in words else ["--prompt", "x"]
    code, out, err = run(capsys, "generate", folder, *prompt, *words)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err


@pytest.mark.parametrize("words", [["temperature=0.9"], ["repetition_penalty=1.1"], ["do_sample=True"]])
def test_a_setting_leaves_sampling_on(capsys, folder, words):
    settings = [word for setting in words for word in ("--set", setting)]
    texts = {run(capsys, "generate", folder, "--prompt", "To", "--seed", seed, *settings)[1] for seed in range(3)}
    assert len(texts) == 3


@pytest.mark.parametrize("words", [["num_beams=2"], ["penalty_alpha=0.6", "top_k=4"], ["do_sample=False"]])
def test_a_search_is_not_sampled_unless_asked(capsys, folder, words):
    settings = [word for setting in words for word in ("--set", setting)]
    texts = {run(capsys, "generate", folder, "--prompt", "To", "--seed", seed, *settings)[1] for seed in range(3)}
    assert len(texts) == 1


def test_a_length_that_is_set_holds(capsys, folder):
    for setting in ("max_new_tokens=3", "max_length=6"):
        code, _, err = run(capsys, "generate", folder, "--prompt", "To be", "--set", setting, "--greedy")
        assert code == 0
        assert int(err.split(" tokens")[0]) <= 5


@pytest.mark.parametrize("words", [["--set", "prompt_lookup_num_tokens=3"], ["--assistant", "FOLDER"]])
def test_guessing_ahead_answers_lines_one_at_a_time(capsys, folder, tmp_path, words):
    lines = write_lines(tmp_path / "in", {"prompt": "To be"}, {"prompt": "or not"})
    arguments = ("generate", folder, "--jsonl", lines, "--max-new-tokens", 5, "--greedy")
    code, out, err = run(capsys, *arguments, *[folder if word == "FOLDER" else word for word in words])
    assert code == 0, err
    assert out == run(capsys, *arguments)[1]


def test_a_refusal_leaves_an_output_file_as_it_was(capsys, folder, tmp_path):
    lines = write_lines(tmp_path / "in", {"prompt": "To be"}, "no object")
    (tmp_path / "out").write_text("precious")
    refused = [
        ("--jsonl", lines),
        ("--jsonl", write_lines(tmp_path / "in 2", {"prompt": "x"}), "--set", "min_length=999"),
    ]
    for words in refused:
        assert run(capsys, "generate", folder, *words, "--output", tmp_path / "out")[0] == 1
        assert (tmp_path / "out").read_text() == "precious"


def test_bytes_that_are_no_text_are_a_refusal_of_their_line(capsys, folder, tmp_path):
    (tmp_path / "in").write_bytes(b'{"prompt": "a\xff"}\n\n{"prompt": NaN}\n{"prompt": "b"}\n')
    arguments = ("generate", folder, "--jsonl", tmp_path / "in", "--max-new-tokens", 2)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert "line 1" in err
    code, out, err = run(capsys, *arguments, "--on-error", "skip")
    assert (code, out.count("\n")) == (0, 1)
    assert "skipped line 1" in err
    assert "skipped line 3: " in err
    (tmp_path / "prompt").write_bytes(b"a\xff")
    code, _, err = run(capsys, "generate", folder, "--prompt-file", tmp_path / "prompt")
    assert (code, err.count("\n")) == (1, 1)


def test_the_prompt_can_be_a_file(capsys, folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("To be\n")
    _, from_file, _ = run(capsys, "generate", folder, "--prompt-file", tmp_path / "prompt.txt", "--seed", 1)
    _, given, _ = run(capsys, "generate", folder, "--prompt", "To be", "--seed", 1)
    assert from_file == given


# --- chat ---


def test_chat_over_a_pipe_answers_each_line(capsys, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who art thou?\n/reset\n/nonsense\ntwo \\\nlines\n\n/exit\nnever\n"))
    code, out, err = run(capsys, "chat", folder, "--max-new-tokens", 5, "--seed", 0)
    assert code == 0
    assert err.count("tokens/s") == 2, "two questions"
    assert "forgotten" in err
    assert "/nonsense is not a command" in err
    assert "> " not in err + out, "no prompt where nobody reads it"


def test_a_question_that_cannot_be_read_does_not_end_the_chat(capsys, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi \udcff\nho\nlast\\"))
    code, _, err = run(capsys, "chat", folder, "--max-new-tokens", 4)
    assert code == 0
    assert "lone surrogate" in err
    assert err.count("tokens/s") == 2


def test_settings_that_no_chat_can_have_are_refused_before_the_first_question(capsys, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    code, _, err = run(capsys, "chat", folder, "--set", "num_beams=3")
    assert (code, err.count("\n")) == (1, 1)


def test_chat_says_when_old_turns_are_dropped_and_refuses_what_is_too_long(capsys, folder, monkeypatch, tmp_path):
    config = tiny_config(vocab_size=500, eos_token_id=None, initializer_range=0.3, max_position_embeddings=40)
    short = write_checkpoint(tmp_path / "short", hf_weights(config), config)
    (short / "tokenizer.model").write_bytes(trained("v1-like"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nthree\n" + "long " * 60 + "\nfour\n"))
    code, _, err = run(capsys, "chat", short, "--max-new-tokens", 8, "--greedy")
    assert code == 0
    assert "oldest" in err
    assert "no room for an answer in a context of 40" in err
    assert err.count("tokens/s") == 4, "the conversation goes on"


class Terminal:
    """``openllama chat`` in a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        pty = pytest.importorskip("pty", reason="only Unix has terminals that a program can make")
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job may have inherited "ignore"
            os.execv(sys.executable, [sys.executable, "-m", "openllama", *map(str, arguments)])
        self.seen = ""

    def wait_for(self, text: str, after: int = 0, seconds: float = 60) -> int:
        """Read until ``text`` is on the screen; where it ends."""
        end = time.monotonic() + seconds
        while text not in self.seen[after:]:
            assert time.monotonic() < end, f"{text!r} did not come; the screen shows {self.seen!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.screen, 4096).decode("utf-8", "replace")
                except OSError:  # the other side has gone
                    assert text in self.seen[after:], f"{text!r} did not come; the screen shows {self.seen!r}"
        return self.seen.index(text, after) + len(text)

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def interrupt_until(self, text: str, after: int) -> int:
        """Press Ctrl-C, and again where it came just before readline listened, which loses it."""
        for _ in range(11):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(text, after, seconds=5)
        raise AssertionError(f"Ctrl-C has no effect; the screen shows {self.seen!r}")


def test_chat_in_a_terminal_survives_ctrl_c_and_ends_with_ctrl_d(tmp_path):
    config = tiny_config(vocab_size=500, eos_token_id=None, initializer_range=0.3, max_position_embeddings=100_000)
    endless = write_checkpoint(tmp_path / "endless", hf_weights(config), config)
    (endless / "tokenizer.model").write_bytes(trained("v1-like"))
    terminal = Terminal("chat", endless, "--max-new-tokens", 90_000, "--seed", 0)
    try:
        at = terminal.wait_for("> ")
        terminal.type("Who art thou?\n")
        at = terminal.wait_for("\n", at)
        time.sleep(1)
        at = terminal.interrupt_until("(stopped)", at)
        at = terminal.wait_for("> ", terminal.wait_for("tokens/s)", at))
        at = terminal.wait_for("> ", terminal.interrupt_until("Ctrl-D quits", at))
        terminal.type("/reset\n")
        terminal.wait_for("> ", terminal.wait_for("forgotten", at))
        terminal.type("\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise


def test_a_conversation_with_the_shipped_model_goes_as_the_transcript_says(capsys, monkeypatch):
    transcript = (Path(__file__).parent / "transcripts" / "chat.txt").read_text(encoding="utf-8")
    questions = [line.removeprefix("> ") for line in transcript.splitlines() if line.startswith("> ")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(question + "\n" for question in questions)))
    folder = Path(__file__).parents[1] / "checkpoints" / "open-llama-tiny"
    options = ("--dtype", "float32", "--seed", 4, "--max-new-tokens", 60, "--temperature", 0.7)
    code, out, _ = run(capsys, "chat", folder, *options)
    assert code == 0
    assert out == "".join(line for line in transcript.splitlines(keepends=True) if not line.startswith("> "))


def test_generate_says_what_a_folder_or_file_is(capsys, folder, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    code, _, err = run(capsys, "generate", tmp_path / "x.gguf", "--prompt", "a")
    assert code == 1
    assert "is a file of llama.cpp" in err
