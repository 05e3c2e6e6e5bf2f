"""Converting and verifying: what comes out, under how little memory, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from openllama.checkpoint import conversion, convert, inspect, verify, writer
from openllama.checkpoint.conversion import COPIED
from openllama.checkpoint.names import expected_shapes
from openllama.checkpoint.reader import open_checkpoint, open_file
from openllama.config import OpenLlamaConfig
from openllama.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    DestinationExistsError,
    KeyMismatchError,
    TokenizerError,
)
from tests.checkpoints import (
    FORMS,
    assert_same_tensors,
    hf_weights,
    native_weights,
    tiny_config,
    write_checkpoint,
)
from tests.draw import examples
from tests.parity.draws import configs
from tests.sentencepieces import trained

CONFIG = tiny_config(extra={"torch_dtype": "float16", "transformers_version": "4.31.0"})
TOKENIZER = trained("no bytes", model_type="word", vocab_size=12)
CONTENTS = {
    "tokenizer_config.json": '{"add_bos_token": false}',
    "special_tokens_map.json": '{"eos_token": "</s>"}',
    "added_tokens.json": '{"<|user|>": 12}',
    "generation_config.json": '{"max_length": 7}',
    "chat_template.jinja": "{{ messages[0].content }}",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "source", hf_weights(CONFIG), CONFIG)
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
    for name, content in CONTENTS.items():
        (folder / name).write_text(content)
    (folder / "README.md").write_text("not copied")
    return folder


def run(source: Path, target: Path, **options: Any) -> None:
    convert(source, target, progress=False, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@examples(20)
@given(
    data=st.data(),
    config=configs(),
    head=st.sampled_from(("body", "causal-lm", "classifier")),
    limit=st.integers(1, 20000),
)
def test_any_sharding_gives_the_same_weights(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, config: OpenLlamaConfig, head: Any, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    form, layout = data.draw(st.sampled_from(FORMS)), data.draw(st.sampled_from((hf_weights, native_weights)))
    write_checkpoint(folder / "source", layout(config, head), config, form, shards=data.draw(st.integers(1, 5)))
    run(folder / "source", folder / "native", max_shard_size=limit)
    converted = open_checkpoint(folder / "native")
    assert_same_tensors(converted.tensors, native_weights(config, head))
    assert inspect(folder / "native").head == head
    verify(folder / "native", folder / "source")


def test_what_comes_along(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "native")
    assert {path.name for path in (tmp_path / "native").iterdir()} == {
        "config.json", "model.safetensors", "conversion.json", *COPIED
    }  # fmt: skip
    for name in COPIED:
        assert (tmp_path / "native" / name).read_bytes() == (source / name).read_bytes()
    values = json.loads((tmp_path / "native" / "config.json").read_text())
    assert values["torch_dtype"] == "float32"  # what the weights are, whatever the source's config said
    assert values["architectures"] == ["OpenLlamaForCausalLM"]
    assert values["transformers_version"] == "4.31.0"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32"])
def test_casting(source: Path, tmp_path: Path, dtype: Any) -> None:
    run(source, tmp_path / "native", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    expected = {name: tensor.to(wanted) for name, tensor in native_weights(CONFIG).items()}
    assert_same_tensors(load_file(tmp_path / "native" / "model.safetensors"), expected)
    assert f"torch.{open_checkpoint(tmp_path / 'native').config.extra['torch_dtype']}" == str(wanted)
    report = verify(tmp_path / "native", source)
    assert report.rounded_to == (None if wanted == torch.float32 else str(wanted).removeprefix("torch."))


def test_raw_state_dict(tmp_path: Path) -> None:
    torch.save({"module": hf_weights(CONFIG)}, tmp_path / "raw.pt")
    with pytest.raises(CheckpointNotFoundError, match="--config"):
        run(tmp_path / "raw.pt", tmp_path / "native")
    run(tmp_path / "raw.pt", tmp_path / "native", config=CONFIG)
    assert_same_tensors(open_checkpoint(tmp_path / "native").tensors, native_weights(CONFIG))


def test_plain_llama_becomes_an_open_llama(tmp_path: Path) -> None:
    config = tiny_config(use_stable_embedding=False, shared_input_output_embedding=False)
    write_checkpoint(tmp_path / "llama", hf_weights(config), None)
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 13, "hidden_size": 8,
              "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    (tmp_path / "llama" / "config.json").write_text(json.dumps(values))
    run(tmp_path / "llama", tmp_path / "native")
    written = json.loads((tmp_path / "native" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("openllama-native", ["OpenLlamaForCausalLM"])
    assert_same_tensors(open_checkpoint(tmp_path / "native").tensors, native_weights(config))


def test_tied_head_is_written_once(tmp_path: Path) -> None:
    config = tiny_config(shared_input_output_embedding=False, tie_word_embeddings=True)
    write_checkpoint(tmp_path / "source", hf_weights(config), config)
    run(tmp_path / "source", tmp_path / "native")
    assert_same_tensors(load_file(tmp_path / "native" / "model.safetensors"), native_weights(config))


def test_what_is_to_be_ignored(tmp_path: Path) -> None:
    weights = {**hf_weights(CONFIG), "value_head.weight": torch.zeros(1), "value_head.bias": torch.zeros(1)}
    write_checkpoint(tmp_path / "source", weights, CONFIG)
    with pytest.raises(KeyMismatchError, match=r"not a weight of an Open-Llama.*value_head\.bias"):
        run(tmp_path / "source", tmp_path / "native")
    with pytest.warns(UserWarning, match=r"ignored, as asked: value_head\.bias, value_head\.weight"):
        run(tmp_path / "source", tmp_path / "native", ignore=["value_head.*"])
    assert_same_tensors(load_file(tmp_path / "native" / "model.safetensors"), native_weights(CONFIG))


# ---- what is said


def test_an_ordinary_conversion_says_nothing(source: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(source, tmp_path / "native")


def test_two_formats_in_one_folder(source: Path, tmp_path: Path) -> None:
    other = native_weights(CONFIG, seed=1)
    write_checkpoint(source, other, CONFIG, "one safetensors")
    with pytest.warns(UserWarning, match=r"model\.safetensors and pytorch_model\.bin: only model\.safetensors is read"):
        run(source, tmp_path / "native")
    assert_same_tensors(load_file(tmp_path / "native" / "model.safetensors"), other)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("cast", [None, "bfloat16", "float64"])
def test_nan_and_infinity_in_the_source(source: Path, tmp_path: Path, dtype: str, cast: Any) -> None:
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in native_weights(CONFIG).items()}
    weights["model.layers.0.mlp.up_proj.weight"][3, 2] = float("nan")
    weights["model.norm.weight"][1:3] = torch.tensor([float("inf"), float("-inf")])
    write_checkpoint(source, weights, CONFIG)
    named = r"NaN or infinity.*: model\.layers\.0\.mlp\.up_proj\.weight \(1\), model\.norm\.weight \(2\)$"
    with pytest.warns(UserWarning, match=named) as caught:
        run(source, tmp_path / "native", dtype=cast)
    assert len(caught) == 1


def test_large_numbers_are_not_infinite(source: Path, tmp_path: Path) -> None:
    weights = native_weights(CONFIG)
    weights["model.layers.0.mlp.up_proj.weight"].fill_(3e38)  # their sum is
    write_checkpoint(source, weights, CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(source, tmp_path / "native")


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"),
    (TOKENIZER[:100], "is not a sentencepiece model"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
])  # fmt: skip
def test_a_broken_tokenizer_is_refused_before_work(source: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (source / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"{message}.*remove its files"):
        run(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_a_tokenizer_that_is_not_sentencepiece_s(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.model").rename(source / "tokenizer.json")
    with pytest.warns(UserWarning, match=r"has tokenizer\.json but no tokenizer\.model: the result has no tokenizer"):
        run(source, tmp_path / "native")


@pytest.mark.parametrize("to", ["native", "hf", "llama"])
def test_a_folder_without_a_tokenizer(source: Path, tmp_path: Path, to: str) -> None:
    for file in source.glob("*token*"):
        file.unlink()
    said = r"source has no tokenizer\.model: the result has no tokenizer"
    with pytest.warns(UserWarning, match=said):
        run(source, tmp_path / to, to=to)
    assert re.search(said, str(json.loads((tmp_path / to / "conversion.json").read_text())["warnings"]))


def test_a_file_of_weights_needs_no_tokenizer(tmp_path: Path) -> None:
    torch.save(hf_weights(CONFIG), tmp_path / "raw.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "raw.pt", tmp_path / "native", config=CONFIG)


def test_a_tokenizer_larger_than_the_vocabulary(source: Path, tmp_path: Path) -> None:
    (source / "added_tokens.json").write_text('{"<|user|>": 12, "<|system|>": 13}')
    with pytest.warns(UserWarning, match=r"has 14 tokens, the model only 13 rows"):
        run(source, tmp_path / "native")


# ---- refusals


@pytest.mark.parametrize("where", [".", "source", "source/../source"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_source_is_never_the_destination(source: Path, tmp_path: Path, where: str, overwrite: bool) -> None:
    before = tree(tmp_path)
    for src in (source, source / "pytorch_model.bin"):
        with pytest.raises(DestinationExistsError, match="is or contains the source"):
            run(src, tmp_path / where, overwrite=overwrite)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(DestinationExistsError, match="is or contains the source"):
        run(source, tmp_path / "link", overwrite=overwrite)
    assert tree(tmp_path / "source") == {k.removeprefix("source/"): v for k, v in before.items()}


def test_destination_that_exists(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "native", max_shard_size=500)
    before = tree(tmp_path / "native")
    with pytest.raises(DestinationExistsError, match="--overwrite"):
        run(source, tmp_path / "native")
    assert tree(tmp_path / "native") == before
    (tmp_path / "native" / "notes.txt").write_text("mine")
    (source / "added_tokens.json").unlink()
    run(source, tmp_path / "native", overwrite=True)
    names = {path.name for path in (tmp_path / "native").iterdir()}
    ours = {"config.json", "model.safetensors", "conversion.json", *COPIED} - {"added_tokens.json"}
    assert names == {*ours, "notes.txt"}


def test_a_destination_that_appears_before_work_begins_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = conversion.export

    def slow(*arguments: Any) -> Any:
        shutil.copytree(source, tmp_path / "native")
        return export(*arguments)

    monkeypatch.setattr(conversion, "export", slow)
    with pytest.raises(DestinationExistsError, match="--overwrite"):
        run(source, tmp_path / "native")
    assert tree(tmp_path / "native") == tree(source)


def test_folder_that_is_no_checkpoint_is_not_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("meow")
    with pytest.raises(DestinationExistsError, match="not a checkpoint"):
        run(source, tmp_path / "photos", overwrite=True)
    with pytest.raises(DestinationExistsError, match="is a file"):
        run(source, tmp_path / "photos" / "cat.png", overwrite=True)
    assert tree(tmp_path / "photos") == {"cat.png": b"meow"}


def test_config_that_contradicts_the_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", hf_weights(CONFIG), tiny_config(vocab_size=14, num_hidden_layers=3))
    with pytest.raises(KeyMismatchError, match=r"missing \(9\).*tokens\.weight is \(13, 8\), .* implies \(14, 8\)"):
        run(tmp_path / "source", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_refusals(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such file or folder"):
        run(tmp_path / "absent", tmp_path / "native")
    with pytest.raises(ConfigError, match="int8"):
        run(source, tmp_path / "native", dtype="int8")
    with pytest.raises(ValueError, match="is not a size"):
        run(source, tmp_path / "native", max_shard_size="huge")
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="gpt2"):
        run(source, tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("error", [ValueError("any"), OSError(28, "No space left on device")], ids=repr)
@pytest.mark.parametrize("exists", [True, False])
def test_an_error_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, exists: bool
) -> None:
    if exists:
        run(source, tmp_path / "native")
    before = tree(tmp_path)
    real, calls = writer._raw, []

    def failing(piece: torch.Tensor) -> memoryview:
        calls.append(piece)
        if len(calls) == 9:
            raise error
        return real(piece)

    monkeypatch.setattr(writer, "_raw", failing)
    with pytest.raises(type(error)):
        run(source, tmp_path / "native", overwrite=True, max_shard_size=300)
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["native", "source"] if exists else ["source"])


@pytest.mark.parametrize("wrong", [
    {"to": "onnx"}, {"max_shard_size": "4kbb"}, {"max_shard_size": 0}, {"dtype": "int3"}, {"dtype": "q8_0"},
    {"to": "gguf", "max_shard_size": "1GB"},
])  # fmt: skip
def test_arguments_are_checked_before_anything_is_read(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is not one of|is not a size|is for gguf alone|--max-shard-size"):
        convert(tmp_path / "absent", tmp_path / "native", **wrong)


def test_a_broken_generation_config_is_refused_before_work(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text('{"a":')
    with pytest.raises(ConfigError, match=r"generation_config\.json is not valid JSON"):
        run(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()


# ---- verify


def test_verify_finds_numbers_that_are_none(tmp_path: Path) -> None:
    weights = native_weights(CONFIG)
    weights["model.layers.0.mlp.up_proj.weight"][3, 2] = float("nan")
    weights["model.norm.weight"][1] = float("inf")
    write_checkpoint(tmp_path, weights, CONFIG)
    with pytest.raises(CorruptCheckpointError, match=r"NaN or infinity in model\.layers\.0\.mlp\.up_proj.*model\.norm"):
        verify(tmp_path)


def test_verify_finds_differences(source: Path, tmp_path: Path) -> None:
    weights = native_weights(CONFIG)
    weights["model.norm.weight"] = weights["model.norm.weight"].flip(0)
    weights["model.layers.1.attention.q_proj.weight"][0, 0] += 1e-6
    write_checkpoint(tmp_path / "other", weights, CONFIG, "safetensors shards")
    with pytest.raises(
        CheckpointError, match=r"differ in model\.layers\.1\.attention\.q_proj\.weight, model\.norm\.wei"
    ):
        verify(tmp_path / "other", source)
    config = tiny_config(num_hidden_layers=1)
    write_checkpoint(tmp_path / "short", native_weights(config), config)
    with pytest.raises(KeyMismatchError, match=r"only one of .* holds model\.layers\.1"):
        verify(tmp_path / "short", source)
    assert "all 22 tensors" in str(verify(source))


def test_verify_shows_what_rounding_has_changed(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "native", dtype="bfloat16")
    report = verify(tmp_path / "native", source)
    assert report.rounding is not None
    errors = [weight.relative_error for weight in report.rounding.weights if weight.different]
    assert errors
    assert max(errors) < 2**-8
    assert "relative error" in str(report)
    assert verify(source, source).rounding is None


# ---- memory

CHILD = """
import sys
from openllama import OpenLlamaConfig
from openllama.checkpoint import convert, expected_shapes
expected_shapes(OpenLlamaConfig(num_hidden_layers=1))  # for this torch imports more of itself
print("torch is imported", flush=True)
sys.stdin.readline()
convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3] or None, progress=False)
"""


def anonymous_memory(pid: int) -> int:
    """Bytes of a process that are not pages of files."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0  # the process has ended


def write_two_gigabytes(folder: Path) -> None:
    """One .bin, 1.6 of its 2.1 GB in one tensor; a cycle of 32503 numbers (a prime) that bfloat16 holds exactly.

    No power of two is a multiple of the period, so that a permutation of rows, columns or pieces is seen.
    """
    config = OpenLlamaConfig(vocab_size=100_000, hidden_size=4096, intermediate_size=4096, num_hidden_layers=1)
    tensors, start = {}, 0
    for name, shape in expected_shapes(config).items():
        end = start + torch.Size(shape).numel()
        bits = torch.arange(start, end, dtype=torch.int32).remainder_(32503).bitwise_left_shift_(16)
        tensors[name], start = bits.view(torch.float32).view(shape), end
    write_checkpoint(folder, tensors, config)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_two_gigabytes_in_one_file_under_an_eighth_of_memory(tmp_path: Path) -> None:
    source, native = tmp_path / "source", tmp_path / "native"
    try:
        write_two_gigabytes(source)
        assert (source / "pytorch_model.bin").stat().st_size > 2e9
        assert 1e6 < conversion_memory(source, native, "bfloat16") < 250e6
        original, written = open_file(source / "pytorch_model.bin"), open_file(native / "model.safetensors")
        assert original.keys() == written.keys()
        for name, tensor in written.items():
            for start in range(0, len(tensor), 4096):  # by rows here too
                rows = slice(start, start + 4096)
                assert torch.equal(tensor[rows].float(), original[name][rows])
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(native, ignore_errors=True)


def conversion_memory(source: Path, target: Path, dtype: str) -> int:
    """Peak anonymous memory of a process that converts, above what it has with torch imported."""
    command = [sys.executable, "-c", CHILD, str(source), str(target), dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "torch is imported\n"
        before = peak = anonymous_memory(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, anonymous_memory(child.pid))
            time.sleep(0.002)
    assert child.returncode == 0
    print(f"peak {(peak - before) / 1e6:.0f} MB above {before / 1e6:.0f} MB")
    return peak - before
