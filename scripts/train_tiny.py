"""Train a small Open-Llama and its tokenizer on text files, and save them as transformers 4.31.0 does.

    python scripts/train_tiny.py --text FILE [--text FILE ...] --out DIR [--steps N] ...

The middle 10% of each text is held out; a table at the end compares bits per byte on it with xz and a
character 5-gram. After an interruption the same command continues, and the result is the same, bit for bit.
All text is first normalised with NFKC, as in the tokenizer; bytes are counted in the normalised text.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import lzma
import math
import os
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from ngram import CharNgram
from torch import Tensor
from tqdm import tqdm

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.checkpoint import native_to_hf

HELD_OUT = 0.1  # share of each text, from its middle
PAD = 3  # <unk> <s> </s> <pad> are 0..3
SHARD_SIZE = "3MB"
STATE_FILE, TOKENIZER_FILE, SETTINGS_FILE = "state.pt", "tokenizer.model", "settings.json"


class TrainingError(Exception):
    """An error that the user can fix; printed without a traceback."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the weights, besides the texts; every field is a command-line option."""

    steps: int = 1800  # optimizer steps
    vocab_size: int = 4600  # pieces of the tokenizer, byte pieces included
    min_char_count: int = 6  # rarer characters are written as bytes
    hidden_size: int = 256
    intermediate_size: int = 688
    layers: int = 4
    heads: int = 4
    context: int = 256  # tokens of a training window, and max_position_embeddings
    batch: int = 8  # windows in a step, from the texts in turn
    learning_rate: float = 3e-3  # peak; decays to zero along a cosine
    warmup: int = 100  # steps
    weight_decay: float = 0.1  # of matrices, not of norms
    dropout: float = 0.1  # on the output of each MLP
    embedding_dropout: float = 0.15  # on the embeddings; in training only, not part of the model
    eval_every: int = 300  # steps
    save_every: int = 50  # steps
    seed: int = 0
    precision: str = "bfloat16"  # of matrix products in training: bfloat16 or float32

    def model_config(self) -> OpenLlamaConfig:
        """The configuration, as in V1: stable and shared embedding, epsilon 1e-5."""
        return OpenLlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-5,
            pad_token_id=PAD,
            hidden_dropout_prob=self.dropout,
            attention_dropout_prob=0.0,  # sdpa's fast kernel on CPU does not support it
            use_stable_embedding=True,
            shared_input_output_embedding=True,
        )


@dataclass(frozen=True)
class Text:
    """A normalised text, split into three parts at line breaks."""

    name: str
    before: str
    held_out: str
    after: str

    @property
    def train(self) -> str:
        return self.before + self.after

    @property
    def held_out_bytes(self) -> int:
        return len(self.held_out.encode())


def normalise(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def read_text(path: Path) -> Text:
    """Normalise and split a file; raises ``TrainingError`` if it is missing, unreadable or too short."""
    try:
        text = normalise(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
    start = text.find("\n", int(len(text) * (1 - HELD_OUT) / 2)) + 1
    end = text.find("\n", start + int(len(text) * HELD_OUT)) + 1
    if not (0 < start < end) or not text[start:end].strip():
        raise TrainingError(f"{path}: too short, or without line breaks around the middle {HELD_OUT:.0%}")
    return Text(path.stem, text[:start], text[start:end], text[end:])


# --- tokenizer ---------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[Text], vocab_size: int, min_char_count: int) -> bytes:
    """Train a sentencepiece BPE model like V1's; returns the bytes of its file.

    It has no dummy prefix (V1's has), so that a prompt is encoded like the same words after a line break in
    the text. It is trained on single lines: a line break is always the byte piece <0x0A>.
    """
    counts = Counter(character for text in texts for character in text.train if character != "\n")
    kept = sum(count for count in counts.values() if count >= min_char_count)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.train.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=kept / sum(counts.values()),
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nfkc",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=PAD,
            max_sentence_length=1 << 20,  # bytes; longer lines would be left out
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"sentencepiece cannot learn {vocab_size} pieces from these texts: {error}") from error
    return model.getvalue()


def encode(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> Tensor:
    return torch.tensor(tokenizer.encode(text))


# --- training ----------------------------------------------------------------------------------


class Trainer:
    """A model in training: its weights, optimizers and step number.

    Each step seeds the random numbers with the seed and the step number, so that training continued
    from a file draws the same windows and the same dropout.
    """

    def __init__(self, settings: Settings, tokenizer: bytes, texts: Sequence[Text]) -> None:
        self.settings = settings
        self.texts = texts
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        self.train_ids = [encode(self.tokenizer, text.train) for text in texts]
        for text, ids in zip(texts, self.train_ids, strict=True):
            if len(ids) <= settings.context:
                raise TrainingError(
                    f"{text.name} has {len(ids)} tokens for training; more than {settings.context} are needed"
                )
        torch.manual_seed(settings.seed)
        self.model = OpenLlamaForCausalLM(settings.model_config())
        self.model.model.embedding.register_forward_hook(self._drop_embeddings)
        self.optimizers = self._optimizers()
        self.step = 0

    def _drop_embeddings(self, module: torch.nn.Module, inputs: Any, vectors: Tensor) -> Tensor:
        """Dropout on the embeddings (B, T, C), because the model soon memorises a small text."""
        return F.dropout(vectors, self.settings.embedding_dropout, module.training)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the layers' matrices, because it needs far fewer steps, and AdamW for the rest."""
        layers = self.model.model.layers
        matrices = [p for p in layers.parameters() if p.dim() == 2]
        norms = [p for p in self.model.parameters() if p.dim() == 1]
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        table = {"params": [self.model.model.embedding.tokens.weight], "weight_decay": decay}
        return [
            torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([table, {"params": norms, "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.95)),
        ]

    def _windows(self) -> Tensor:
        """Random windows (batch, context), from the texts in turn."""
        size, windows = self.settings.context, []
        for i in range(self.settings.batch):
            ids = self.train_ids[i % len(self.train_ids)]
            start = int(torch.randint(len(ids) - size, ()))
            windows.append(ids[start : start + size])
        return torch.stack(windows)

    def train_step(self) -> float:
        """Do one optimizer step; returns the loss in nats per token."""
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.settings)
        self.model.train()
        windows = self._windows()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            loss = self.model(windows, labels=windows, use_cache=False, return_dict=False)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        self.step += 1
        return loss.item()

    def evaluate(self) -> list[float]:
        """Bits per byte of each held-out text, only to be shown: no decision depends on them."""
        return [held_out_bits(self.model, self.tokenizer, text) / text.held_out_bytes for text in self.texts]

    def save(self, path: Path) -> None:
        """Save everything that training needs to continue; the old file stays until the new one is complete."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        new = path.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)

    def rounded_model(self) -> OpenLlamaForCausalLM:
        """The model as it will be stored: weights rounded to bfloat16, computed in float32, in eval mode."""
        model = OpenLlamaForCausalLM(self.settings.model_config())
        model.load_state_dict({name: w.bfloat16().float() for name, w in self.model.state_dict().items()})
        return model.eval()


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, with cosine decay to zero."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def train(trainer: Trainer, state: Path) -> None:
    """Train to the last step, with a progress bar; saves to ``state`` every ``save_every`` steps."""
    settings = trainer.settings
    smooth = None
    with tqdm(total=settings.steps, initial=trainer.step, unit="step") as bar:
        while trainer.step < settings.steps:
            loss = trainer.train_step()
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            bar.update()
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            last = trainer.step == settings.steps
            if last or trainer.step % settings.eval_every == 0:
                bits = trainer.evaluate()
                shown = ", ".join(f"{text.name} {b:.4f}" for text, b in zip(trainer.texts, bits, strict=True))
                bar.write(f"step {trainer.step}: loss {smooth:.3f}; held-out bits per byte: {shown}")
            if last or trainer.step % settings.save_every == 0:
                trainer.save(state)


# --- held-out figures --------------------------------------------------------------------------


def held_out_bits(model: OpenLlamaForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, text: Text) -> float:
    """Bits that the model needs to encode the held-out text, given the text before it.

    Every token is predicted once, in windows that move by half their length, so each has at least half a
    window of context. Only one tokenization of the text is scored; the sum over all would need fewer bits.
    """
    context = model.config.max_position_embeddings
    half = context // 2
    before = encode(tokenizer, text.before[-8 * half :])[-half:]
    ids = torch.cat([before, encode(tokenizer, text.held_out)])
    known = len(before)
    nats = 0.0
    model.eval()
    with torch.inference_mode():
        for windows, scored in _batches(ids, known, context):
            logits = model(windows, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
            nats += losses[scored[:, 1:]].sum(dtype=torch.float64).item()
    return nats / math.log(2)


def _batches(ids: Tensor, known: int, context: int, size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Overlapping windows (B, context) of ``ids``, padded at the end, and a mask of the tokens to score."""
    half = context // 2
    starts = list(range(0, max(1, len(ids) - half), half))
    padded = F.pad(ids, (0, context))
    positions = torch.arange(context)
    for i in range(0, len(starts), size):
        at = torch.tensor(starts[i : i + size])[:, None] + positions
        fresh = (positions >= half) | (at < half)  # the first window also scores its first half
        yield padded[at], fresh & (at >= known) & (at < len(ids))


def xz_size(text: str) -> int:
    return len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def baselines(text: Text) -> dict[str, float]:
    """Bits per byte of the held-out text with compressors that are not neural networks."""
    scale = 8 / text.held_out_bytes
    return {
        "xz": xz_size(text.held_out) * scale,
        "xz given train": (xz_size(text.train + text.held_out) - xz_size(text.train)) * scale,
        "5-gram": CharNgram(text.train).bits(text.held_out, text.train) / text.held_out_bytes,
    }


def table(model: OpenLlamaForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, texts: Sequence[Text]) -> str:
    """Markdown table: bits per byte on each held-out text, of the model and of the baselines."""
    lines: list[str] = []
    for text in texts:
        bits = {"model": held_out_bits(model, tokenizer, text) / text.held_out_bytes, **baselines(text)}
        if not lines:
            lines = [f"| held-out text | bytes | {' | '.join(bits)} |", "| --- |" + " ---: |" * (len(bits) + 1)]
        lines.append(f"| {text.name} | {text.held_out_bytes} | {' | '.join(f'{b:.3f}' for b in bits.values())} |")
    return "\n".join(lines)


def longest_shared(text: str, corpus: str) -> str:
    """The longest substring of ``text`` that also occurs in ``corpus``."""
    best = ""
    for start in range(len(text)):
        while start + len(best) < len(text) and text[start : start + len(best) + 1] in corpus:
            best = text[start : start + len(best) + 1]
    return best


# --- export ------------------------------------------------------------------------------------


def export(model: OpenLlamaForCausalLM, tokenizer: bytes, out: Path) -> None:
    """Save model and tokenizer with transformers 4.31.0, the weights as pickled bfloat16 shards with an index."""
    try:
        import transformers
    except ImportError as error:
        raise TrainingError("writing the HF layout needs `pip install transformers==4.31.0` (Python < 3.12)") from error
    if not hasattr(transformers, "OpenLlamaForCausalLM"):
        raise TrainingError(f"transformers {transformers.__version__} has no Open-Llama; use 4.31.0")
    config = transformers.OpenLlamaConfig(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    hf_model = transformers.OpenLlamaForCausalLM(config)
    hf_model.load_state_dict(native_to_hf(model.state_dict(), model.config), strict=True)
    for parameter in hf_model.parameters():  # not .bfloat16(): it would round inv_freq, which is a buffer
        parameter.data = parameter.data.bfloat16()
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    hf_model.save_pretrained(new, max_shard_size=SHARD_SIZE, safe_serialization=False)
    file = new / TOKENIZER_FILE
    file.write_bytes(tokenizer)
    hf_tokenizer = transformers.LlamaTokenizer(
        str(file),
        pad_token="<pad>",
        add_bos_token=False,
        add_eos_token=False,
        model_max_length=model.config.max_position_embeddings,
    )
    hf_tokenizer.save_pretrained(new)
    if out.exists():
        shutil.rmtree(out)
    new.rename(out)


# --- command line ------------------------------------------------------------------------------


def prepare_work(work: Path, settings: Settings, texts: Sequence[Text]) -> bytes:
    """Create the work folder, or check that it belongs to this training; returns the bytes of the tokenizer."""
    sums = {
        text.name: hashlib.sha256((text.before + text.held_out + text.after).encode()).hexdigest() for text in texts
    }
    wanted = {**dataclasses.asdict(settings), "texts": sums}
    file = work / SETTINGS_FILE
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        (work / TOKENIZER_FILE).write_bytes(train_tokenizer(texts, settings.vocab_size, settings.min_char_count))
        file.write_text(json.dumps(wanted, indent=2))
    found = json.loads(file.read_text())
    if differing := sorted(key for key in wanted | found if wanted.get(key) != found.get(key)):
        changes = "; ".join(f"{key}: {found.get(key)!r}, now {wanted.get(key)!r}" for key in differing)
        raise TrainingError(
            f"{work} holds a training with other settings ({changes}); delete it or choose another --work"
        )
    return (work / TOKENIZER_FILE).read_bytes()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, action="append", required=True, help="a UTF-8 text file; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--work", type=Path, help="folder for the state of the training (default: OUT-training)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    for field in dataclasses.fields(Settings):
        option = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        choices = ["bfloat16", "float32"] if field.name == "precision" else None
        parser.add_argument(option, type=kind, default=field.default, choices=choices, help="(default: %(default)s)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    if options.out.exists() and not options.overwrite:
        raise TrainingError(f"{options.out} exists; choose another --out, or pass --overwrite")
    torch.set_num_threads(options.threads)
    texts = [read_text(path) for path in options.text]
    if len({text.name for text in texts}) < len(texts):
        raise TrainingError("two texts have the same name")
    work = options.work or options.out.with_name(options.out.name + "-training")
    tokenizer = prepare_work(work, settings, texts)
    trainer = Trainer(settings, tokenizer, texts)
    if (work / STATE_FILE).exists():
        trainer.load(work / STATE_FILE)
        print(f"continuing {work} at step {trainer.step}")
    print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters")
    train(trainer, work / STATE_FILE)
    model = trainer.rounded_model()
    export(model, tokenizer, options.out)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"wrote {options.out} ({size:,} bytes)\n")
    print(table(model, trainer.tokenizer, texts))


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except (TrainingError, OSError) as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrain_tiny: interrupted; run the same command to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
