"""Trains tiny models of this package by current transformers' Trainer and current peft, in whose environment this runs.

    PYTHONPATH=. python tests/interop/trainer.py trainer FOLDER

Writes ``trainer.json`` into FOLDER: for each thing that people do, what was found; and the versions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dropin.md"
CONFIG = OpenLlamaConfig(  # as V2: the same model is a plain LLaMA
    vocab_size=23, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, num_labels=3,
    initializer_range=0.3, use_stable_embedding=False, shared_input_output_embedding=False, hidden_dropout_prob=0.0,
    attention_dropout_prob=0.0,
)  # fmt: skip
LM, CLASSIFIER = OpenLlamaForCausalLM, OpenLlamaForSequenceClassification


def make(kind: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return kind(dataclasses.replace(CONFIG), attn_implementation="eager")


def rows(kind: Any) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, 23, (8, 6), generator=torch.Generator().manual_seed(0))
    labels = ids if kind is not CLASSIFIER else ids.sum(-1) % 3
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
            for row, label in zip(ids, labels, strict=True)]  # fmt: skip


def train(model: Any, folder: Path, kind: Any, resume: Path | None = None, **settings: Any) -> Any:
    """Three steps of two rows; a checkpoint after each, with the callback of the page."""
    names: dict[str, Any] = {"transformers": transformers}
    recipe = re.search(r"```py\n(class SaveConfig.*?)\n\n", PAGE.read_text(encoding="utf-8"), re.S)
    exec(recipe[1] if recipe else "", names)
    defaults = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.01, "use_cpu": True,
                "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_steps": 1}  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**defaults, **settings})
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows(kind), eval_dataset=rows(kind), callbacks=[names["SaveConfig"]()]
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def trains_as_its_own(folder: Path) -> Iterator[tuple[str, bool]]:
    """Against current transformers' LLaMA with the same weights."""
    model = make(LM)
    model.save_pretrained(folder / "llama", layout="llama")
    llama = transformers.LlamaForCausalLM.from_pretrained(folder / "llama", attn_implementation="eager")
    found = [losses(train(one, folder / type(one).__name__, LM)) for one in (llama, model)]
    yield "Trainer: the losses of transformers' own LLaMA", found[1] == found[0] and found[0][0] != found[0][1]


def resumes_and_opens(folder: Path) -> Iterator[tuple[str, bool]]:
    for kind in (LM, CLASSIFIER):
        name = kind.__name__
        one = train(make(kind), folder / name, kind, eval_strategy="steps", eval_steps=1)
        again = train(make(kind, seed=5), folder / f"{name} again", kind, resume=folder / name / "checkpoint-2")
        opened = kind.from_pretrained(folder / name / "checkpoint-3")
        yield f"Trainer: resume, {name}", same(again.model, one.model)
        yield f"Trainer: from_pretrained(checkpoint), {name}", same(opened, one.model)
        yield (
            f"Trainer: evaluate and predict, {name}",
            (len(losses(one, "eval_loss")) == 3 and one.predict(rows(kind)).predictions.shape[-1] in (23, 3)),
        )


def other_settings(folder: Path) -> Iterator[tuple[str, bool]]:
    plain = train(make(LM), folder / "plain", LM)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if name in transformers.TrainingArguments.__dataclass_fields__:
            computed = train(make(LM), folder / name, LM, **{name: True})
            yield f"Trainer: {name}", same(computed.model, plain.model)
    best = train(make(LM), folder / "best", LM, learning_rate=5.0, load_best_model_at_end=True, eval_strategy="steps",
                 eval_steps=1)  # fmt: skip
    yield "Trainer: load_best_model_at_end", same(best.model, LM.from_pretrained(folder / "best" / "checkpoint-1"))


def adapters(folder: Path) -> Iterator[tuple[str, bool]]:
    """Two steps change the loss; what is saved gives the same logits on a fresh base."""
    settings: dict[str, Callable[[str], Any]] = {
        "LoRA": lambda task: peft.LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"]),
        "prompt tuning": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
        "prefix tuning": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    }
    for (name, config), (kind, task) in (
        (setting, pair) for setting in settings.items() for pair in ((LM, "CAUSAL_LM"), (CLASSIFIER, "SEQ_CLS"))
    ):
        place = folder / f"{name} {task}"
        model = peft.get_peft_model(make(kind), config(task))
        trainer = train(model, place / "trained", kind, max_steps=2, learning_rate=0.1)
        model.eval().save_pretrained(place)
        loaded = peft.PeftModel.from_pretrained(make(kind), place).eval()
        ids = torch.stack([row["input_ids"] for row in rows(kind)])
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            equal = torch.equal(loaded(**call).logits, model(**call).logits)
        good = equal and len(set(losses(trainer))) == 2
        if kind is LM:
            made = [one.generate(**call, max_new_tokens=4) for one in (model, loaded)]
            good = good and torch.equal(*made)
        yield f"peft: {name}, {task}", good


def generates(folder: Path) -> Iterator[tuple[str, bool]]:
    model, ids = make(LM).eval(), torch.tensor([[5, 9, 13]])
    config = transformers.GenerationConfig(max_new_tokens=6, num_beams=3)
    expected = model.generate(ids, max_new_tokens=6, num_beams=3)
    yield (
        "generate: transformers' GenerationConfig",
        torch.equal(model.generate(inputs=ids, generation_config=config), expected),
    )


def main(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in (trains_as_its_own, resumes_and_opens, other_settings, generates, adapters):
        try:
            found |= dict(part(folder))
        except Exception as error:
            found[part.__name__] = f"{type(error).__name__}: {error}"
    return {"version": f"{transformers.__version__}, peft {peft.__version__}", "found": found}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    where = Path(sys.argv[2])
    (where / "trainer.json").write_text(json.dumps(main(where)), encoding="utf-8")
