"""Quantised weights: how numbers are rounded and stored, what the modules compute, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from openllama import OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel, OpenLlamaTokenizer
from openllama.checkpoint import convert, diff, inspect, open_checkpoint, verify
from openllama.checkpoint import quantize as rounding_while_reading
from openllama.checkpoint.pieces import pieces
from openllama.config import QUANTIZATIONS
from openllama.errors import CheckpointError, ConfigError, InputError, KeyMismatchError, heard
from openllama.inference import structs
from openllama.parallel import load
from openllama.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedSharedHead, quantize, rounding
from openllama.quantized.modules import QuantizedMatrix
from openllama.quantized.rounding import FORMATS, GROUP, restore_matrix, round_matrix
from tests.draw import examples
from tests.tiny import tiny_ids, tiny_model

SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints" / "open-llama-tiny"
both = pytest.mark.parametrize("quantization", QUANTIZATIONS)
HEADS: Any = (
    {},
    {"shared_input_output_embedding": False},
    {"shared_input_output_embedding": False, "tie_word_embeddings": True},
)
heads = pytest.mark.parametrize("head", HEADS, ids=("shared", "own", "tied"))


def restored(matrix: Tensor, quantization: str) -> Tensor:
    return restore_matrix(*round_matrix(matrix, quantization), matrix.shape[1], torch.float32)


# ---- the stored numbers


def test_int8_is_one_integer_for_each_number_and_a_scale_for_each_row() -> None:
    weight, scale = round_matrix(torch.tensor([[127.0, -64.0, 3.0], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.0]]), "int8")
    assert weight.dtype == torch.int8
    assert weight[:2].tolist() == [[127, -64, 3], [0, 0, 0]]
    assert scale[:2].tolist() == [1.0, 0.0]
    assert weight[2].tolist() == [-127, 64, 0]  # 0.25 is 63.5 steps
    assert abs(scale[2].item() * 127 - 0.5) < 0.002


def test_a_byte_of_int4_holds_the_elements_j_and_j_plus_16_of_its_group() -> None:
    group = torch.zeros(GROUP)
    group[0], group[1], group[16], group[17] = -8.0, 3.0, 7.0, -1.0
    weight, scale = round_matrix(group[None], "int4")
    assert (weight.dtype, scale.dtype) == (torch.uint8, torch.bfloat16)
    assert (tuple(weight.shape), scale.tolist()) == ((1, 16), [[1.0]])
    assert weight[0, :3].tolist() == [0 | 15 << 4, 11 | 7 << 4, 8 | 8 << 4]
    assert torch.equal(restored(group[None], "int4"), group[None])


def test_the_last_group_of_int4_is_filled_up_with_zeros() -> None:
    weight, scale = round_matrix(torch.full((2, 33), 7.0), "int4")
    assert (tuple(weight.shape), tuple(scale.shape)) == ((2, 32), (2, 2))
    assert weight[0, 17:].tolist() == [8 | 8 << 4] * 15
    assert torch.equal(restored(torch.full((2, 33), 7.0), "int4"), torch.full((2, 33), 7.0))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Few rows of many kinds: usual, with heavy tails, with a number alone, of several sizes."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 100))
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    power = draw(st.sampled_from((1, 3, 7)))
    size = draw(st.sampled_from((1e-20, 1e-3, 1.0, 1e4)))
    return size * drawn**power * (torch.rand(rows, columns) < draw(st.sampled_from((0.05, 0.5, 1.0))))


@examples(60)
@given(matrices())
def test_every_number_that_is_not_clipped_is_within_half_a_step(matrix: Tensor) -> None:
    for quantization, form in FORMATS.items():
        _, scale = round_matrix(matrix, quantization)
        steps = scale.float().abs()
        steps = steps[:, None] if quantization == "int8" else steps.repeat_interleave(GROUP, 1)[:, : matrix.shape[1]]
        sign = (
            torch.ones_like(matrix)
            if quantization == "int8"
            else scale.float().sign().repeat_interleave(GROUP, 1)[:, : matrix.shape[1]]
        )
        inside = (matrix * sign >= form.low * steps) & (matrix * sign <= form.high * steps)
        error = (restored(matrix, quantization) - matrix).abs()
        assert (error <= steps / 2 * (1 + 1e-5))[inside].all()
        assert (error <= matrix.abs())[~inside].all()


@examples(60)
@given(matrices())
def test_the_squared_error_is_never_above_that_of_the_nearest_scale(matrix: Tensor) -> None:
    for quantization in FORMATS:
        form, columns = FORMATS[quantization], matrix.T
        if quantization == "int4":
            columns = nn.functional.pad(matrix, (0, -matrix.shape[1] % GROUP)).view(-1, GROUP).T
        nearest = rounding.squared_error(columns, rounding.nearest_scale(columns, form), form)
        found = rounding.squared_error(columns, rounding.best_scale(columns, form), form)
        assert (found <= nearest).all()


def test_least_squares_rounds_normal_numbers_better_than_the_nearest_scale() -> None:
    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    form, groups = FORMATS["int4"], matrix.view(-1, GROUP).T
    nearest = rounding.squared_error(groups, rounding.nearest_scale(groups, form), form).sum()
    assert (restored(matrix, "int4") - matrix).square().sum() < 0.91 * nearest


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(quantization: str, value: float) -> None:
    matrix = torch.ones(3, 40)
    matrix[1, 35] = value
    for refuses in (lambda: round_matrix(matrix, quantization), lambda: rounding.check_finite(matrix)):
        with pytest.raises(InputError, match="NaN or infinity"):
            refuses()


@both
def test_blocks_of_rows_do_not_change_the_result(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openllama.quantized.loops._loops_for", lambda weight: None)
    matrix = torch.randn(13, 70)
    whole = round_matrix(matrix, quantization)
    monkeypatch.setattr(rounding, "BLOCK", 150)
    assert all(map(torch.equal, whole, round_matrix(matrix, quantization)))


def test_the_config_and_the_loops_name_the_formats() -> None:
    assert list(QUANTIZATIONS) == list(FORMATS) == list(structs.QUANTIZED)


@both
def test_every_matrix_of_a_model_has_the_bits_of_its_format(quantization: str) -> None:
    model = quantize(tiny_model(), quantization)
    modules = [module for module in model.modules() if isinstance(module, QuantizedMatrix)]
    assert {module.bits for module in modules} == {FORMATS[quantization].bits}


# ---- modules


def linear(quantization: str, rows: int = 23, columns: int = 70) -> tuple[QuantizedLinear, Tensor]:
    module = nn.Linear(columns, rows, bias=False)
    return QuantizedLinear.of(module, FORMATS[quantization].bits), restored(module.weight.detach(), quantization)


@both
@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (2, 40, 70), (0, 70)])
def test_a_linear_layer_computes_with_the_restored_matrix(
    quantization: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, matrix = linear(quantization)
    monkeypatch.setattr("openllama.quantized.modules.BLOCK", 700)  # several blocks of rows
    assert torch.equal(module.dequantize(), matrix)
    x = torch.randn(shape)
    torch.testing.assert_close(module(x), x @ matrix.T)
    torch.testing.assert_close(module(x.double()), x.double() @ matrix.double().T)
    assert module(x.bfloat16()).dtype == torch.bfloat16


def test_many_rows_of_bfloat16_are_rounded_each_for_itself() -> None:
    module, matrix = linear("int8", 64, 256)
    x = torch.randn(40, 256).bfloat16()
    x[3] *= 1000  # a scale for all rows would lose the others
    expected = x.float() @ matrix.T
    error = (module(x).float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error < 0.015).all()
    assert torch.equal(module(x)[4:], module(x[4:]))
    x[7, 5] = torch.nan
    assert module(x)[7].isnan().all()


@both
def test_gradients_reach_the_input_and_nothing_else(quantization: str) -> None:
    module, matrix = linear(quantization)
    x = torch.randn(5, 70, requires_grad=True)
    grad = torch.randn(5, 23)
    module(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ matrix)
    assert not list(module.parameters())
    with pytest.raises(InputError, match="not trained"):
        module.requires_grad_()
    module.scale.requires_grad_()
    with pytest.raises(InputError, match="not trained"):
        module(torch.randn(5, 70))


def test_a_bias_and_other_numbers_of_bits_are_refused() -> None:
    with pytest.raises(InputError, match="bias"):
        QuantizedLinear.of(nn.Linear(4, 4), 8)
    with pytest.raises(InputError, match="8 or 4, got 3"):
        QuantizedLinear(4, 4, 3)


@both
def test_casting_keeps_the_stored_types_and_changes_what_is_computed(quantization: str) -> None:
    model = quantize(tiny_model(), quantization)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for cast in (model.half, model.double, lambda: model.to(torch.bfloat16), model.float):
        cast()
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        assert all(buffer.dtype == before[name].dtype for name, buffer in model.named_buffers())
    assert model.double()(tiny_ids()).logits.dtype == torch.float64
    assert model.bfloat16().embed(tiny_ids()).dtype == torch.bfloat16


# ---- whole models


@both
@heads
@torch.no_grad()
def test_a_quantised_model_computes_what_the_rounded_weights_do(quantization: str, head: dict[str, Any]) -> None:
    model = tiny_model(**head)
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data = restored(module.weight, quantization)
    rounded.tie_weights()
    assert quantize(model, quantization) is model
    assert model.config.quantization == quantization
    assert model.num_parameters() == rounded.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == rounded.num_parameters(exclude_embeddings=True)
    torch.testing.assert_close(model(tiny_ids()).logits, rounded(tiny_ids()).logits)
    assert torch.equal(model.generate(tiny_ids(), max_new_tokens=5), rounded.generate(tiny_ids(), max_new_tokens=5))


@both
@pytest.mark.parametrize("head", [HEADS[0], HEADS[2]], ids=("shared", "tied"))
def test_table_and_head_are_one_quantised_copy(quantization: str, head: dict[str, Any]) -> None:
    model = quantize(tiny_model(**head), quantization)
    assert type(model.lm_head) is QuantizedSharedHead
    assert not list(model.lm_head.state_dict())
    table: Any = model.get_input_embeddings()
    hidden = torch.randn(3, 24)
    before = model.lm_head(hidden)
    table.scale.mul_(2)
    torch.testing.assert_close(model.lm_head(hidden), 2 * before)


def test_the_memory_of_a_module_goes_before_the_next_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    alive: list[int] = []
    of = QuantizedLinear.of.__func__  # type: ignore[attr-defined]

    def counted(kind: Any, module: nn.Linear, bits: int) -> QuantizedLinear:
        alive.append(sum(isinstance(m, nn.Linear) for m in model.modules()))
        return of(kind, module, bits)

    monkeypatch.setattr(QuantizedLinear, "of", classmethod(counted))
    quantize(model, "int8")
    assert alive == list(range(14, 0, -1))


def test_the_shipped_model_in_int8_continues_a_prompt_as_in_float32() -> None:
    ids = OpenLlamaTokenizer.from_pretrained(SHIPPED)("ROMEO:\nWhat light", return_tensors="pt").input_ids
    model = OpenLlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    expected = model.generate(ids, max_new_tokens=40)
    rounded = OpenLlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, quantize="int8")
    assert torch.equal(rounded.generate(ids, max_new_tokens=40), expected)


@both
def test_copies_and_pickles_compute_the_same_and_share_nothing(quantization: str) -> None:
    model = quantize(tiny_model(), quantization)
    expected = model(tiny_ids()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tiny_ids()).logits, expected)
        assert other.lm_head.owner[0] is other
        other.model.embedding.tokens.scale.zero_()
        assert torch.equal(model(tiny_ids()).logits, expected)


@both
def test_a_state_dict_fits_a_model_of_the_same_quantisation_alone(quantization: str) -> None:
    model, other = quantize(tiny_model(), quantization), quantize(tiny_model(seed=1), quantization)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tiny_ids()).logits, other(tiny_ids()).logits)
    with pytest.raises(InputError, match=r"embedding\.tokens\.weight is torch\.float32"):
        model.load_state_dict(tiny_model().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="scale"):
        tiny_model().load_state_dict(model.state_dict())


# ---- files


@both
@heads
@torch.no_grad()
def test_loading_saving_and_converting_give_the_same_model(
    quantization: str, head: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(**head)
    model.save_pretrained(tmp_path / "plain")
    expected = quantize(model, quantization)(tiny_ids()).logits
    monkeypatch.setattr("openllama.checkpoint.pieces.PIECE", 100)
    with pytest.warns(UserWarning, match="no tokenizer"):
        convert(tmp_path / "plain", tmp_path / "converted", quantize=quantization, progress=False)
    loaded = OpenLlamaForCausalLM.from_pretrained(
        tmp_path / "plain", attn_implementation="eager", quantize=quantization
    )
    assert loaded.get_input_embeddings().weight.data_ptr() % 64 == 0
    loaded.save_pretrained(tmp_path / "saved")
    for folder, asked in (("converted", None), ("saved", quantization)):
        again = OpenLlamaForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="eager", quantize=asked)
        assert again.config.quantization == quantization
        assert torch.equal(again(tiny_ids()).logits, expected)
    assert torch.equal(loaded(tiny_ids()).logits, expected)
    assert diff(tmp_path / "converted", tmp_path / "saved").equal
    assert verify(tmp_path / "converted", tmp_path / "saved").recorded
    found, plain = inspect(tmp_path / "converted"), inspect(tmp_path / "plain")
    assert found.parameters == plain.parameters == verify(tmp_path / "saved").parameters
    assert f"quantised to {quantization}" in str(found)


def test_the_other_weights_of_a_conversion_are_cast_and_the_matrices_rounded_from_the_source(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="no tokenizer"):
        convert(tmp_path / "plain", tmp_path / "int8", quantize="int8", dtype="bfloat16", progress=False)
    tensors, source = (open_checkpoint(tmp_path / name).tensors for name in ("int8", "plain"))
    name = "model.layers.1.mlp.up_proj"
    weight, scale = round_matrix(source[f"{name}.weight"], "int8")
    assert torch.equal(tensors[f"{name}.weight"], weight)
    assert torch.equal(tensors[f"{name}.scale"], scale)
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path / "int8").dtype == torch.bfloat16


@both
@pytest.mark.parametrize("kind", [OpenLlamaModel, OpenLlamaForSequenceClassification])
def test_the_other_classes_are_quantised_and_read_a_folder_of_a_language_model(
    quantization: str, kind: Any, tmp_path: Path
) -> None:
    model = quantize(tiny_model(kind), quantization)
    model.save_pretrained(tmp_path / "own")
    again = kind.from_pretrained(tmp_path / "own", attn_implementation="eager")
    assert torch.equal(again(tiny_ids())[0], model(tiny_ids())[0])
    if kind is OpenLlamaForSequenceClassification:
        assert type(again.score) is nn.Linear
    quantize(tiny_model(**HEADS[1]), quantization).save_pretrained(tmp_path / "language")
    with heard() as warnings, pytest.warns(UserWarning, match=r"lm_head\.weight is not used"):
        kind.from_pretrained(tmp_path / "language")
    assert not any("lm_head.scale" in text for text in warnings)


CHILD = """
import sys, torch
from pathlib import Path
from openllama import OpenLlamaForCausalLM
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
import threading, time
torch.set_num_threads(1)
OpenLlamaForCausalLM.from_pretrained(sys.argv[2], quantize="int4")
before = peak = anonymous()
running = True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
model = OpenLlamaForCausalLM.from_pretrained(sys.argv[1], quantize=sys.argv[3])
running = False; thread.join()
print(peak - before, sum(b.nbytes for b in model.buffers()))
"""


@both
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_loading_takes_little_more_memory_than_the_result(quantization: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 20000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    tiny_model(**sizes).save_pretrained(tmp_path / "plain")  # 350 MB
    tiny_model().save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "plain"), str(tmp_path / "tiny"), quantization]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    peak, result = map(int, done.stdout.split())
    assert result > 40e6
    assert 0.9 * result < peak < result + 30e6


# ---- what is refused


def test_a_folder_of_another_quantisation_is_refused_with_the_way_out(tmp_path: Path) -> None:
    quantize(tiny_model(), "int8").save_pretrained(tmp_path / "int8")
    for options in ({"to": "hf"}, {"to": "llama"}, {"to": "gguf"}, {"dtype": "bfloat16"}, {"quantize": "int4"}):
        with pytest.raises(InputError, match=r"quantised to int8.* made from"):
            convert(tmp_path / "int8", tmp_path / "x.gguf", progress=False, **options)
        assert not (tmp_path / "x.gguf").exists()
    model = OpenLlamaForCausalLM.from_pretrained(tmp_path / "int8")
    with pytest.raises(InputError, match="quantised to int8, not hf"):
        model.save_pretrained(tmp_path / "hf", layout="hf")
    with pytest.raises(InputError, match="not split over processes"):
        load(OpenLlamaForCausalLM, tmp_path / "int8", lambda model: None)


def test_every_way_to_quantise_refuses_an_unknown_format_and_what_is_quantised_already_with_the_same_words(
    tmp_path: Path,
) -> None:
    folder, model = tmp_path / "int8", quantize(tiny_model(), "int8")
    model.save_pretrained(folder)
    ways: dict[object, Any] = {
        "the model": lambda asked: quantize(model, asked),
        folder: lambda asked: OpenLlamaForCausalLM.from_pretrained(folder, quantize=asked),
        str(folder): lambda asked: convert(folder, tmp_path / "new", quantize=asked, progress=False),
    }
    for where, way in ways.items():
        with pytest.raises(InputError) as unknown:
            way("int2")
        assert str(unknown.value) == "the quantisation must be one of int8, int4, got 'int2'"
        with pytest.raises(InputError) as again:
            way("int4")
        assert str(again.value) == (
            f"{where} is quantised to int8 already, and is not rounded again; for int4, take what it was made from"
        )
    with pytest.raises(InputError, match="one of int8, int4, got 'int2'"):  # before anything is fetched or opened
        convert(tmp_path / "none", tmp_path / "new", quantize="int2")


@both
def test_what_is_stored_as_it_is_asked_for_is_copied_as_it_is_loaded(quantization: str, tmp_path: Path) -> None:
    quantize(tiny_model(), quantization).save_pretrained(tmp_path / "stored")
    for name, asked in (("plainly", None), ("asked", quantization)):
        with pytest.warns(UserWarning, match="no tokenizer"):
            convert(tmp_path / "stored", tmp_path / name, quantize=asked, progress=False)
    plainly, asked = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("plainly", "asked")
    )
    assert plainly == asked
    assert verify(tmp_path / "asked", tmp_path / "stored").rounded_to is None


def test_checkpoints_that_are_stored_in_other_ways_are_not_compared_until_one_is_converted(tmp_path: Path) -> None:
    plain, int8, int4 = (tmp_path / name for name in ("plain", "int8", "int4"))
    tiny_model().save_pretrained(plain)
    for folder in (int8, int4):
        quantize(tiny_model(), folder.name).save_pretrained(folder)
    pairs = {(int8, plain): "int8", (plain, int4): "int4", (int8, int4): "int8", (int4, int8): "int4"}
    for (a, b), missing in pairs.items():
        one = f"convert {plain} with --quantize {missing}, and compare the result"
        both_rounded = "convert what one was made from with the --quantize of the other, and compare that"
        for compared in (diff, verify):
            with pytest.raises(CheckpointError, match="cannot be compared") as refused:
                compared(a, b)
            assert (one if plain in (a, b) else both_rounded) in str(refused.value)
        other = a if a.name == missing else b
        with pytest.warns(UserWarning, match="no tokenizer"):
            convert(plain, tmp_path / "new", quantize=missing, overwrite=True, progress=False)
        assert diff(tmp_path / "new", other).equal


def test_a_config_that_does_not_belong_to_the_weights_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(KeyMismatchError, match="quantize='int8'"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization="int8")
    quantize(tiny_model(), "int8").save_pretrained(tmp_path / "int8")
    for wrong in (None, "int4"):
        with pytest.raises(KeyMismatchError, match=r"They are quantised; is their config\.json the one .* int8"):
            OpenLlamaForCausalLM.from_pretrained(tmp_path / "int8", quantization=wrong)
    with pytest.raises(ConfigError, match="new weights are not quantised"):
        OpenLlamaForCausalLM(dataclasses.replace(tiny_model().config, quantization="int8"))
    with pytest.raises(ConfigError, match="quantization must be one of 'int8', 'int4', got 'int3'"):
        dataclasses.replace(tiny_model().config, quantization="int3")


def test_conversions_to_other_forms_and_broken_numbers_are_refused_before_work(tmp_path: Path) -> None:
    model = tiny_model()
    for to in ("hf", "llama", "gguf"):
        with pytest.raises(InputError, match=f"for native alone, not for {to}"):
            convert(tmp_path / "none", tmp_path / "x.gguf", to=to, quantize="int8")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight: .*NaN"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path / "nan", quantize="int4")
    with pytest.warns(UserWarning, match="no tokenizer"), pytest.raises(InputError, match=r"down_proj\.weight: .*NaN"):
        convert(tmp_path / "nan", tmp_path / "x", quantize="int4", progress=False)
    assert not (tmp_path / "x").exists()


def test_a_loss_in_training_needs_something_to_train() -> None:
    model = quantize(tiny_model(), "int8")
    ids = tiny_ids()
    assert model(ids, labels=ids).loss.isfinite()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()
    for loss in (lambda: model(ids, labels=ids), lambda: model.loss(ids, ids)):
        with pytest.raises(InputError, match="not trained: add adapters"):
            loss()
        with torch.no_grad():
            loss()
    prompt = model.embed(ids).detach().requires_grad_()
    model(inputs_embeds=prompt, labels=ids).loss.backward()
    assert prompt.grad.abs().sum() > 0


def test_changes_of_the_vocabulary_and_of_modules_are_refused() -> None:
    model = quantize(tiny_model(**HEADS[1]), "int8")
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    for change in (
        lambda: model.resize_token_embeddings(30),
        lambda: model.set_input_embeddings(nn.Embedding(23, 24)),
        lambda: model.set_output_embeddings(nn.Linear(24, 23, bias=False)),
    ):
        with pytest.raises(InputError, match="quantised to int8 does not change"):
            change()
    with pytest.raises(InputError, match="quantised to int8 already"):
        quantize(model, "int4")
    for wrong in (8, None, ["int8"]):
        with pytest.raises(InputError, match="one of int8, int4, got "):
            quantize(tiny_model(), wrong)  # type: ignore[arg-type]


def test_foreign_modules_are_refused_before_anything_is_changed() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj is a Sequential"):
        quantize(model, "int8")
    assert not any(isinstance(module, QuantizedMatrix) for module in model.modules())
    model = tiny_model()
    model.enable_input_require_grads()
    with pytest.raises(InputError, match="has hooks"):
        quantize(model, "int8")


@both
@pytest.mark.parametrize("broken", ["bias", "NaN"])
def test_a_matrix_that_cannot_be_rounded_leaves_the_model_as_it_was(
    broken: str, quantization: str, tmp_path: Path
) -> None:
    model = tiny_model()
    expected, state = model(tiny_ids()).logits, {name: of.clone() for name, of in model.state_dict().items()}
    last = model.model.layers[1].mlp.down_proj
    if broken == "bias":
        last.bias = nn.Parameter(torch.zeros(24))
    else:
        last.weight.data[3, 3] = torch.nan
    with pytest.raises(InputError, match=rf"model\.layers\.1\.mlp\.down_proj.* {broken}"):
        quantize(model, quantization)
    assert not any(isinstance(module, QuantizedMatrix) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    last.bias = None
    model.load_state_dict(state)
    assert torch.equal(model(tiny_ids()).logits, expected)
    model.save_pretrained(tmp_path)
    quantize(model, quantization)


def test_lora_beside_quantised_weights_is_trained_and_cannot_be_merged() -> None:
    peft = pytest.importorskip("peft")
    model = quantize(tiny_model(), "int8")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2)
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(copy.deepcopy(model), config)
    config._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        adapted = peft.get_peft_model(model, config).train()
    adapted(tiny_ids(), labels=tiny_ids()).loss.backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(grads) == 8
    assert all(grad is not None for grad in grads.values())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    with pytest.raises(RuntimeError):
        adapted.merge_and_unload()


def test_an_embedding_looks_up_rows_in_its_dtype() -> None:
    table = nn.Embedding(11, 40, padding_idx=3, dtype=torch.bfloat16)
    module = QuantizedEmbedding.of(table, 4)
    ids = torch.tensor([[1, 10], [3, 3]])
    assert torch.equal(module(ids), restore_matrix(module.weight, module.scale, 40, torch.bfloat16)[ids])
    assert module(ids).dtype == torch.bfloat16
    assert (module.padding_idx, module.num_embeddings, tuple(module(ids[:, :0]).shape)) == (3, 11, (2, 0, 40))


def test_a_matrix_is_read_once_and_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path)
    seen: list[str] = []
    of = rounding_while_reading._round
    monkeypatch.setattr(rounding_while_reading, "_round", lambda name, *rest: (seen.append(name), of(name, *rest))[1])
    OpenLlamaForCausalLM.from_pretrained(tmp_path, quantize="int8")
    assert len(seen) == len(set(seen)) == 15


EVEN = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}  # scales follow their weights in the file


@both
@pytest.mark.parametrize("shard_size", [None, "5 KiB"])
def test_a_conversion_rounds_every_number_once_and_keeps_the_scales_of_one_matrix(
    quantization: str, shard_size: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(**EVEN).save_pretrained(tmp_path / "plain")
    rounded: dict[str, int] = {}
    kept: list[int] = []
    of, weight = rounding_while_reading._round, rounding_while_reading._Weight

    def counted(name: str, rows: Tensor, *rest: Any) -> Any:
        rounded[name] = rounded.get(name, 0) + rows.numel()
        return of(name, rows, *rest)

    class Watched(weight):
        def pieces(self, read: Any) -> Any:
            yield from super().pieces(read)
            kept.append(len(self.latest))

    monkeypatch.setattr(rounding_while_reading, "_round", counted)
    monkeypatch.setattr(rounding_while_reading, "_Weight", Watched)
    monkeypatch.setattr("openllama.checkpoint.pieces.PIECE", 1000)
    with pytest.warns(UserWarning, match="no tokenizer"):
        convert(tmp_path / "plain", tmp_path / "new", quantize=quantization, max_shard_size=shard_size, progress=False)
    source = open_checkpoint(tmp_path / "plain").tensors
    assert rounded == {name: tensor.numel() for name, tensor in source.items() if name in rounded}
    assert kept == [1] * 15
    tensors = open_checkpoint(tmp_path / "new").tensors
    for name in rounded:
        expected = round_matrix(source[name], quantization)
        assert all(map(torch.equal, (tensors[name], tensors[f"{name.removesuffix('weight')}scale"]), expected))


def test_scales_that_are_not_read_after_their_weight_are_computed_anew() -> None:
    latest: dict[str, list[Tensor]] = {}
    matrices = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(20, 40) for n in range(2)}
    tensors: dict[str, Any] = {}
    for name, matrix in matrices.items():
        tensors |= rounding_while_reading._computed(name, matrix, "int4", latest)
    read = {name: torch.cat(list(pieces(tensors[name]))) for name in sorted(tensors, reverse=True)}
    half_read = pieces(tensors[next(iter(matrices))])
    next(half_read)
    for name, matrix in matrices.items():
        scale = name.replace("weight", "scale")
        assert all(map(torch.equal, (read[name], read[scale]), round_matrix(matrix, "int4")))
        assert torch.equal(torch.cat(list(pieces(tensors[scale]))), read[scale])


@both
@heads
def test_on_the_meta_device_a_quantised_model_has_its_shapes_and_no_number_is_read(
    quantization: str, head: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(**head).save_pretrained(tmp_path)
    expected = OpenLlamaForCausalLM.from_pretrained(tmp_path, quantize=quantization)
    monkeypatch.setattr(rounding, "_blocks", lambda weight: pytest.fail("numbers are read"))
    model = OpenLlamaForCausalLM.from_pretrained(tmp_path, quantize=quantization, device="meta")
    assert model.config == expected.config
    found = model.state_dict()
    assert all(tensor.is_meta for tensor in found.values())
    assert {name: (of.shape, of.dtype) for name, of in found.items()} == {
        name: (of.shape, of.dtype) for name, of in expected.state_dict().items()
    }
