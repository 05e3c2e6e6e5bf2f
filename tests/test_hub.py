"""Where a checkpoint lies: home folders, the hub's cache, and the hub, for which a stand-in answers here."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaTokenizer
from openllama.checkpoint import convert, inspect, open_checkpoint
from openllama.checkpoint.hub import fetch, local_path
from openllama.cli import main
from openllama.errors import BackendError, CheckpointError, CheckpointNotFoundError, DestinationExistsError
from tests.checkpoints import assert_same_tensors, hf_weights, native_weights, tiny_config, write_checkpoint
from tests.sentencepieces import trained

CONFIG = tiny_config(vocab_size=420)
NAME = "s-JoL/Open-Llama-V2"


def cached(cache: Path, *revisions: str, main: str | None = None) -> Path:
    """A repository in the hub's cache."""
    root = cache / "models--s-JoL--Open-Llama-V2"
    for revision in revisions:
        folder = write_checkpoint(root / "snapshots" / revision, hf_weights(CONFIG), CONFIG)
        (folder / "tokenizer.model").write_bytes(trained("v1-like"))
    if main is not None:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main + "\n")
    return root


class Hub(types.ModuleType):
    """Stands in for huggingface_hub: one repository, perhaps out of reach."""

    def __init__(self, files: list[str], snapshot: Path | None, offline: bool = False) -> None:
        super().__init__("huggingface_hub")
        self.files, self.snapshot, self.offline = files, snapshot, offline
        self.calls: list[dict[str, Any]] = []

    def list_repo_files(self, name: str, revision: str | None) -> list[str]:
        if self.offline:
            raise ConnectionError("offline mode is enabled\nmore about it")
        return self.files

    def snapshot_download(self, name: str, **arguments: Any) -> str:
        self.calls.append({"name": name, **arguments})
        if self.snapshot is None:
            raise ConnectionError("reset by peer")
        return str(self.snapshot)


def use(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


# ---- on the disk


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_checkpoint(tmp_path / "model", hf_weights(CONFIG), CONFIG)
    (folder / "tokenizer.model").write_bytes(trained("v1-like"))
    convert("~/model", "~/native", progress=False)
    assert inspect("~/native").layout == "native"
    assert OpenLlamaConfig.from_pretrained("~/native") == OpenLlamaConfig.from_pretrained(tmp_path / "native")
    assert len(OpenLlamaTokenizer.from_pretrained("~/native")) == 420


@pytest.mark.parametrize(("revisions", "main", "chosen"), [
    (["abc", "def"], "def", "def"), (["abc"], "gone", "abc"), (["abc"], None, "abc"),
])  # fmt: skip
def test_the_root_in_the_hub_s_cache(tmp_path: Path, revisions: Any, main: Any, chosen: str) -> None:
    root = cached(tmp_path, *revisions, main=main)
    assert local_path(root) == root / "snapshots" / chosen
    assert open_checkpoint(root).folder == root / "snapshots" / chosen
    assert_same_tensors(OpenLlamaForCausalLM.from_pretrained(root).state_dict(), native_weights(CONFIG))


@pytest.mark.parametrize("main", [None, "gone"])
def test_several_snapshots_are_listed(tmp_path: Path, main: Any) -> None:
    with pytest.raises(CheckpointNotFoundError, match="choose one of its snapshots: snapshots/abc, snapshots/def"):
        inspect(cached(tmp_path, "abc", "def", main=main))


def test_commands_take_the_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(cached(tmp_path, "abc")), "--prompt", "To be", "--max-new-tokens", "2"]) == 0
    assert "To be" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "content"), [
    ("model.gguf", b"GGUF\x03"), ("ggml-model-q4_0.bin", b"tjgg\x01"), ("model.bin", b"lmgg"), ("x.gguf", b"")
])  # fmt: skip
def test_files_of_llama_cpp(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for path in [tmp_path / name] + [tmp_path] * (name != "model.bin"):
        with pytest.raises(CheckpointError, match=rf"{name} is a file of llama\.cpp"):
            inspect(path)
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG)
    inspect(tmp_path)  # beside a checkpoint it is of no interest


# ---- on the hub


@pytest.mark.parametrize(("weights", "wanted"), [
    (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],) * 2,
    (["model.safetensors", "pytorch_model.bin", "consolidated.00.pth"], ["model.safetensors"]),
    (["consolidated.00.pth", "consolidated.01.pth"],) * 2,
    (["adapter_model.bin", "adapter_model.safetensors"], ["adapter_model.safetensors"]),
    (["tf_model.h5", "onnx/model.safetensors", "onnx/config.json", "training_args.bin", "modeling.py"], []),
])  # fmt: skip
def test_what_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any, wanted: Any) -> None:
    hub = use(
        monkeypatch,
        Hub(["config.json", "tokenizer.model", "chat_template.jinja", "README.md", "run.py", *weights], tmp_path),
    )
    assert fetch(NAME, "v1") == tmp_path
    (call,) = hub.calls
    assert (call["name"], call["revision"]) == (NAME, "v1")
    assert sorted(call["allow_patterns"]) == sorted(["config.json", "tokenizer.model", "chat_template.jinja", *wanted])


def test_the_command_downloads_and_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = use(monkeypatch, Hub(["config.json"], cached(tmp_path, "abc") / "snapshots" / "abc"))
    assert main(["convert", NAME, str(tmp_path / "native"), "--revision", "v1.0"]) == 0, capsys.readouterr().err
    assert hub.calls[0]["revision"] == "v1.0"
    assert_same_tensors(open_checkpoint(tmp_path / "native").tensors, native_weights(CONFIG))
    with pytest.raises(DestinationExistsError, match="--overwrite"):
        convert(NAME, tmp_path / "native")
    assert len(hub.calls) == 1, "the destination is looked at before a download"


def test_a_folder_of_that_name_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub([], tmp_path))
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert fetch(NAME) == Path(NAME)
    for path in ("/absent/model", "./absent", "absent", "a/b/c", "../absent", "~/absent"):
        assert not fetch(path).exists()
    assert not hub.calls
    with pytest.raises(CheckpointNotFoundError, match=r"revision v1: .* is not a repository"):
        fetch(NAME, "v1")


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Hub([], None, offline=True))
    with pytest.raises(CheckpointNotFoundError, match=r"cannot be reached: offline mode is enabled$"):
        fetch(NAME)
    hub = use(monkeypatch, Hub([], tmp_path, offline=True))
    with pytest.warns(UserWarning, match=r"cannot be reached .* an earlier download"):
        assert fetch(NAME) == tmp_path
    assert hub.calls[0]["local_files_only"]
    use(monkeypatch, Hub(["config.json"], None))
    with pytest.raises(CheckpointNotFoundError, match="could not be downloaded: reset by peer; a second try resumes"):
        fetch(NAME)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendError, match=r"openllama\[hub\]"):
        fetch(NAME)
    with pytest.raises(CheckpointNotFoundError, match="openllama convert ORG/NAME DST"):
        OpenLlamaForCausalLM.from_pretrained(NAME)
