"""transformers' Trainer, accelerate and their habits, with this package's models: what people run unchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openllama import OpenLlamaForCausalLM, OpenLlamaForSequenceClassification
from openllama.checkpoint import hf_to_native
from openllama.errors import CheckpointNotFoundError, InputError
from tests.checkpoints import assert_same_tensors
from tests.oracle import compared, transformers
from tests.parity.draws import hf_model, our_twin
from tests.test_dropin import PAGE
from tests.tiny import tiny_config, tiny_model

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed; peft brings it where it can be")
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory'", "ignore:.*AdamW is deprecated"),
    pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE", "ignore:use_cache is switched off"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint", "ignore:The 'warn' method"),  # of transformers' model
]

DROPLESS = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0, "use_memory_efficient_attention": False}
RECIPE, SAVING = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)  # blocks of the page


def texts(count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Rows for a language model, the second half of each padded on the right."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        ids = torch.randint(1, 23, (6,), generator=generator)
        mask = (torch.arange(6) < 6 - number % 3).long()
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask == 1, -100)})
    return rows


def classes(count: int = 8) -> list[dict[str, torch.Tensor]]:
    return [{**row, "labels": row["input_ids"].sum() % 3} for row in texts(count)]


def arguments(folder: Path, **settings: Any) -> Any:
    """Two steps of two rows on the CPU."""
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.01,
        "no_cuda": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": 1,
        "optim": "adamw_torch",
    }
    return transformers.TrainingArguments(str(folder), **{**defaults, **settings})


def trainer(model: Any, folder: Path, rows: list[Any], callbacks: Any = None, **settings: Any) -> Any:
    return transformers.Trainer(
        model, arguments(folder, **settings), train_dataset=rows, eval_dataset=rows[:4], callbacks=callbacks
    )


def losses(of: Any) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


def save_config() -> Any:
    """The callback of the page."""
    names: dict[str, Any] = {"transformers": transformers}
    exec(RECIPE.partition("\n\n")[0], names)
    return names["SaveConfig"]()


# --- training ---


@pytest.mark.parametrize(("kind", "rows"), [
    ("OpenLlamaForCausalLM", texts()), ("OpenLlamaForSequenceClassification", classes())
])  # fmt: skip
@pytest.mark.parametrize("settings", [
    {}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1},
    {"weight_decay": 0.1},
], ids=str)  # fmt: skip
def test_the_trainer_trains_our_model_as_it_trains_its_own(
    tmp_path: Path, kind: str, rows: list[Any], settings: dict[str, Any]
) -> None:
    """To the same bits, but for a shared head, and for the norm of all gradients, whose sum has another order."""
    config = tiny_config(**DROPLESS, num_labels=3, shared_input_output_embedding=False, eos_token_id=None)
    hf = hf_model(config, 0, kind)
    ours = our_twin(hf, config)
    found = []
    for name, model in {"hf": hf, "ours": ours}.items():  # one after the other: making a trainer sets the seed
        one = trainer(model, tmp_path / name, rows, save_steps=9, max_grad_norm=0, **settings)
        one.train()
        found.append(losses(one))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    assert_same_tensors(ours.state_dict(), hf_to_native(hf.state_dict()))
    compared["models that transformers' Trainer trained, bit for bit"] += 1


@pytest.mark.parametrize("labelled", [True, False])
def test_evaluate_and_predict_give_the_logits_alone(tmp_path: Path, labelled: bool) -> None:
    model, rows = tiny_model(), texts(4)
    labels = torch.stack([row["labels"] for row in rows])
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = model(**batch, labels=labels)
    one = trainer(model, tmp_path, rows)
    assert one.evaluate()["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-6)
    predicted = one.predict(rows if labelled else [{**row, "labels": None} for row in rows])
    np.testing.assert_allclose(predicted.predictions, out.logits.numpy(), rtol=1e-6)
    assert np.array_equal(predicted.label_ids, labels.numpy()) if labelled else predicted.label_ids is None


def test_labels_of_another_name_are_those_of_the_arguments(tmp_path: Path) -> None:
    class Renamed(OpenLlamaForCausalLM):
        def forward(self, input_ids: Any = None, targets: Any = None, **named: Any) -> Any:
            return super().forward(input_ids, labels=targets, **named)

    rows = [{"targets": row["labels"], "input_ids": row["input_ids"]} for row in texts(4)]
    torch.manual_seed(0)
    one = trainer(Renamed(tiny_config(**DROPLESS)), tmp_path, rows, label_names=["targets"])
    assert "eval_loss" in one.evaluate()
    one.train()
    assert len(losses(one)) == 2


# --- checkpoints ---


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(("kind", "rows"), [
    (OpenLlamaForCausalLM, texts()), (OpenLlamaForSequenceClassification, classes())
])  # fmt: skip
def test_a_checkpoint_is_resumed_and_opened(
    tmp_path: Path, kind: Any, rows: list[Any], safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as the page says
    settings = {"save_safetensors": safe, "max_steps": 3, "callbacks": [save_config()]}
    model = tiny_model(kind, num_labels=3, **DROPLESS)
    one = trainer(model, tmp_path, rows, **settings)
    one.train()
    opened = kind.from_pretrained(tmp_path / "checkpoint-3", attn_implementation="eager")
    assert_same_tensors(opened.state_dict(), model.state_dict())
    assert opened.config.vocab_size == 23

    again = trainer(tiny_model(kind, seed=5, num_labels=3, **DROPLESS), tmp_path / "again", rows, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again)[-1] == losses(one)[-1]
    assert_same_tensors(again.model.state_dict(), model.state_dict())


def test_a_checkpoint_without_a_config_says_where_to_take_one_from(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    trainer(model, tmp_path, texts()).train()
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json; .*pass config .*the folder that was trained"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    opened = OpenLlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2", config=tmp_path / "base")
    assert_same_tensors(opened.state_dict(), model.state_dict())


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """A learning rate that makes each step worse: the first checkpoint is the best."""
    model = tiny_model(**DROPLESS)
    settings = {"load_best_model_at_end": True, "evaluation_strategy": "steps", "eval_steps": 1, "learning_rate": 5.0}
    one = trainer(model, tmp_path, texts(), max_steps=3, **settings)
    one.train()
    evaluated = [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry]
    assert evaluated.index(min(evaluated)) == 0, evaluated
    assert one.state.best_model_checkpoint.endswith("checkpoint-1")
    stored = torch.load(tmp_path / "checkpoint-1" / "pytorch_model.bin", weights_only=True)
    assert_same_tensors(model.state_dict(), stored)


def test_the_recipe_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"transformers": transformers, "model": tiny_model(), "rows": texts(), "arguments": arguments(tmp_path)}
    exec(RECIPE, names)
    assert names["logits"].shape == (8, 6, 23)
    for folder in ("trained", "checkpoint-2"):
        opened = OpenLlamaForCausalLM.from_pretrained(tmp_path / folder)
        assert_same_tensors(opened.state_dict(), names["model"].state_dict())


# --- accelerate ---


def test_a_model_is_saved_as_the_examples_of_accelerate_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, _ = accelerator.prepare(tiny_model(), torch.optim.SGD(tiny_model().parameters()))
    monkeypatch.chdir(tmp_path)
    exec(SAVING, {"accelerator": accelerator, "model": model})
    assert_same_tensors(load_file(tmp_path / "trained" / "model.safetensors"), model.state_dict())
    with pytest.raises(InputError, match="safe_serialization=False: only safetensors are written"):
        model.save_pretrained(tmp_path / "y", save_function=accelerator.save, safe_serialization=False)
    assert not (tmp_path / "y").exists()


def test_accelerator_save_writes_on_the_main_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "is_main_process", False)
    tiny_model().save_pretrained(tmp_path / "x", save_function=accelerator.save)
    assert not (tmp_path / "x").exists()
