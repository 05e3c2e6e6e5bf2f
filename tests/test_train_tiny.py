"""scripts/train_tiny.py on toy texts, and what it made: the model in checkpoints/open-llama-tiny."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from openllama import OpenLlamaForCausalLM, OpenLlamaTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import train_tiny  # noqa: E402 (found only now)
from ngram import BLOCK, CharNgram  # noqa: E402

SHIPPED = ROOT / "checkpoints" / "open-llama-tiny"
CORPUS = ROOT.parent / "shared" / "corpus"
TEXTS = ("shakespeare", "classical_chinese")
PROMPTS = ("ROMEO:", "春江花月夜")  # the demo's
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="the training texts are not part of the repository")

TOY = train_tiny.Settings(
    steps=6,
    vocab_size=310,
    min_char_count=2,
    hidden_size=16,
    intermediate_size=24,
    layers=2,
    heads=2,
    context=16,
    batch=4,
    eval_every=3,
    save_every=3,
)


@pytest.fixture
def toy_files(tmp_path: Path) -> list[Path]:
    """Two texts of random words, one of letters and one of Chinese characters."""
    draw = random.Random(0)
    files = []
    for name, words in (("letters", "the king and queen of all that is good"), ("characters", "春 江 花 月 夜 見 不")):
        lines = (" ".join(draw.choices(words.split(), k=8)) for _ in range(200))
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text("\n".join(lines), encoding="utf-8")
    return files


@pytest.fixture
def toy(toy_files: list[Path]) -> tuple[bytes, list[train_tiny.Text]]:
    texts = [train_tiny.read_text(path) for path in toy_files]
    return train_tiny.train_tokenizer(texts, TOY.vocab_size, TOY.min_char_count), texts


def command(files: list[Path], out: Path, **changes: object) -> list[str]:
    options = {**dataclasses.asdict(TOY), **changes, "out": out}
    texts = [part for path in files for part in ("--text", str(path))]
    return texts + [part for k, v in options.items() for part in ("--" + k.replace("_", "-"), str(v))]


# --- training ---


def test_resumed_training_is_bit_identical(tmp_path, toy):
    whole = train_tiny.Trainer(TOY, *toy)
    train_tiny.train(whole, tmp_path / "whole.pt")

    first = train_tiny.Trainer(TOY, *toy)
    for _ in range(TOY.save_every):
        first.train_step()
    first.evaluate()
    first.save(tmp_path / "part.pt")
    torch.manual_seed(1234)  # another process has another random state
    second = train_tiny.Trainer(TOY, *toy)
    second.load(tmp_path / "part.pt")
    assert second.step == TOY.save_every
    train_tiny.train(second, tmp_path / "part.pt")

    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    found = torch.load(tmp_path / "part.pt", weights_only=True)
    leaves, other = _leaves(expected), _leaves(found)
    assert leaves.keys() == other.keys()
    for name, value in leaves.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


def _leaves(value: object, name: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _leaves(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return _leaves(dict(enumerate(value)), name)
    return {name: value}


def test_training_learns_and_prices_every_token_once(toy):
    settings = dataclasses.replace(TOY, steps=40, learning_rate=1e-2, warmup=1)
    trainer = train_tiny.Trainer(settings, *toy)
    before = trainer.evaluate()
    for _ in range(settings.steps):
        trainer.train_step()
    assert all(after < b for after, b in zip(trainer.evaluate(), before, strict=True))
    for text in trainer.texts:
        ids = train_tiny.encode(trainer.tokenizer, text.held_out)
        known = settings.context // 2
        scored = [
            int(window[i])
            for windows, fresh in train_tiny._batches(torch.cat([ids[:known], ids]), known, settings.context)
            for window, row in zip(windows, fresh, strict=True)
            for i in row.nonzero().flatten()
        ]
        assert scored == ids.tolist()


def test_command_trains_exports_and_refuses(tmp_path, toy_files, capsys):
    pytest.importorskip("transformers", reason="transformers 4.31.0 writes the model")
    out = tmp_path / "out"
    assert train_tiny.main(command(toy_files, out)) == 0
    assert "| letters |" in capsys.readouterr().out
    model = OpenLlamaForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == TOY.layers
    trained = torch.load(tmp_path / "out-training" / train_tiny.STATE_FILE, weights_only=True)["model"]
    assert all(torch.equal(w.bfloat16(), trained[name].bfloat16()) for name, w in model.state_dict().items())

    assert train_tiny.main(command(toy_files, out)) == 1
    assert "exists" in capsys.readouterr().err
    assert train_tiny.main([*command(toy_files, out, seed=1), "--overwrite"]) == 1
    assert "seed: 0, now 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("", "too short"), (b"\xff\xfe\x00", "cannot read"), ("a b", "line")],
)
def test_bad_text_is_a_clear_error(tmp_path, content, message, capsys):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert train_tiny.main(["--text", str(file), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(file) in error
    assert not (tmp_path / "out").exists()


def test_too_large_a_vocabulary_is_a_clear_error(tmp_path, toy_files, capsys):
    assert train_tiny.main(command(toy_files, tmp_path / "out", vocab_size=50000)) == 1
    assert "50000 pieces" in capsys.readouterr().err


# --- baseline and checker ---


@pytest.mark.parametrize("context", ["", "a", "ab", "abra", "zzzz", "zzzzab", "月月月花"])
def test_ngram_sums_to_one_over_all_of_unicode(context):
    ngram = CharNgram("abracadabra\nabra cadabra\n春江花月夜，月夜\n" * 2)
    seen = set("abracadabra\nabra cadabra\n春江花月夜，月夜\n")
    total = sum(ngram.prob(character, context) for character in seen)
    for block in range(0x110000 // BLOCK):
        if 0xD800 <= block * BLOCK < 0xE000:
            continue  # surrogates
        unseen = [c for c in map(chr, range(block * BLOCK, (block + 1) * BLOCK)) if c not in seen]
        total += len(unseen) * ngram.prob(unseen[0], context)  # all unseen ones of a block are alike
        assert ngram.prob(unseen[0], context) == ngram.prob(unseen[-1], context) > 0
    assert total == pytest.approx(1, abs=1e-9)


def test_ngram_prefers_what_it_has_read():
    ngram = CharNgram("to be or not to be\n" * 20)
    assert ngram.prob("e", "to b") > 0.9
    assert ngram.bits("to be", "not ") < ngram.bits("xo be", "not ")


def test_longest_shared():
    corpus = "It is a sleepy language and thou speak'st"
    assert train_tiny.longest_shared("what sleepy languor", corpus) == " sleepy langu"
    assert train_tiny.longest_shared(corpus, corpus) == corpus
    assert train_tiny.longest_shared("彼黍", corpus) == ""


# --- the shipped model ---


@pytest.fixture(scope="module")
def shipped() -> tuple[OpenLlamaForCausalLM, OpenLlamaTokenizer]:
    return OpenLlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32), OpenLlamaTokenizer.from_pretrained(
        SHIPPED
    )


@pytest.fixture(scope="module")
def corpus() -> list[train_tiny.Text]:
    return [train_tiny.read_text(CORPUS / f"{name}.txt") for name in TEXTS]


def test_shipped_folder_is_small_sharded_and_complete():
    files = {file.name: file for file in SHIPPED.iterdir()}
    assert sum(file.stat().st_size for file in files.values()) <= 10_000_000
    assert files.keys() >= {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"}
    assert files.keys() >= {"special_tokens_map.json", "pytorch_model.bin.index.json"}
    index = json.loads(files["pytorch_model.bin.index.json"].read_text())["weight_map"]
    shards = set(index.values())
    assert len(shards) > 1
    weights = {k: v for shard in shards for k, v in torch.load(files[shard], weights_only=True).items()}
    assert weights.keys() == index.keys()
    rope = [name for name in index if name.endswith("rotary_emb.inv_freq")]
    assert rope
    assert all(weights[name].dtype == torch.float32 for name in rope)
    assert all(weights[name].dtype == torch.bfloat16 for name in index.keys() - set(rope))


def test_shipped_model_has_the_form_of_v1(shipped):
    model, tokenizer = shipped
    config = model.config
    assert config.use_stable_embedding
    assert config.shared_input_output_embedding
    assert not config.tie_word_embeddings
    assert (config.rms_norm_eps, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1e-5, 3, 1, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<unk>", "<s>", "</s>", "<pad>"]
    assert len(tokenizer) == config.vocab_size
    text = "O, speak  again\n\n君不見,黃河 ☃"
    ids = tokenizer(text)["input_ids"]
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == text


@needs_corpus
def test_shipped_model_beats_the_baselines(shipped, corpus):
    """On a slice of each held-out text; the whole takes minutes."""
    model, _ = shipped
    processor = train_tiny.sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED / "tokenizer.model"))
    for text in corpus:
        length = 12000 if text.held_out.isascii() else 6000
        slice_ = dataclasses.replace(text, held_out=text.held_out[:length])
        bits = train_tiny.held_out_bits(model, processor, slice_) / slice_.held_out_bytes
        for name, baseline in train_tiny.baselines(slice_).items():
            assert bits < baseline, (text.name, name)


@needs_corpus
def test_demo_is_not_recited(shipped, corpus):
    model, tokenizer = shipped
    read = "\n".join(text.before + text.held_out + text.after for text in corpus)
    for prompt in PROMPTS:
        ids = tokenizer([prompt] * 4, return_tensors="pt")["input_ids"]
        torch.manual_seed(0)
        sampled = model.generate(ids, max_new_tokens=120, do_sample=True, temperature=0.8, top_p=0.9)
        greedy = model.generate(ids[:1], max_new_tokens=120)
        for text in tokenizer.batch_decode([*sampled.tolist(), *greedy.tolist()]):
            shared = train_tiny.longest_shared(train_tiny.normalise(text), read)
            assert len(shared) < 40, (prompt, shared)
