"""An ordinary ``nn.Module``: it can be compiled, exported, copied, hooked, called with other weights, adapted."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.cache import GrowingCache, PreallocatedCache
from openllama.errors import BackendError, InputError
from openllama.model import RMSNorm
from openllama.outputs import CausalLMOutput
from tests.draw import examples
from tests.parity.draws import batches, configs, is_real, randomise_norms, seeds
from tests.tiny import tiny_config, tiny_ids, tiny_model

BACKENDS = ("eager", "sdpa")
KINDS = (OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
OWN_HEAD = {"shared_input_output_embedding": False, "tie_word_embeddings": False}
TIED_HEAD = {"shared_input_output_embedding": False, "tie_word_embeddings": True}
LEFT_PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# --- compile ---


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("backend", "arguments"),
    [
        ("sdpa", {"logits_to_keep": 2}),
        ("sdpa", {"attention_mask": LEFT_PADDED}),
        ("eager", {"attention_mask": LEFT_PADDED, "labels": tiny_ids()}),
        ("sdpa", {"attention_mask": LEFT_PADDED, "output_hidden_states": True, "output_attentions": True}),
        ("sdpa", {"attention_mask": torch.zeros(1, 1, 7, 7), "position_ids": torch.arange(7), "return_dict": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
@torch.no_grad()
def test_a_forward_pass_is_one_graph(backend: str, arguments: dict[str, Any]) -> None:
    model = tiny_model(attn_implementation=backend, use_cache=False)
    found = torch.compile(model, backend="eager", fullgraph=True)(tiny_ids(), **arguments)
    expected = model(tiny_ids(), **arguments)
    assert type(found) is type(expected)
    values = (expected.to_tuple(), found.to_tuple()) if isinstance(expected, CausalLMOutput) else (expected, found)
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_training_step_is_one_graph(chunked: bool) -> None:
    model = tiny_model(attn_implementation="sdpa", num_hidden_layers=1, **NO_DROPOUT).train()

    def step(ids: Tensor) -> Tensor:
        return model.loss(ids, ids) if chunked else model(ids, labels=ids).loss

    found = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        function(tiny_ids()).backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_can_be_compiled_one_by_one_for_training(checkpointing: bool) -> None:
    model = tiny_model(attn_implementation="sdpa", **NO_DROPOUT).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    graphs: list[Any] = []
    found = []
    for compiled in (False, True):
        for layer in model.model.layers if compiled else ():
            layer.compile(backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
        loss = model.loss(tiny_ids(), tiny_ids())
        loss.backward()
        found.append({**gradients(model), "loss": loss.detach()})
    torch.testing.assert_close(*found)
    assert graphs


@torch.no_grad()
def test_generating_compiles_a_fixed_number_of_graphs() -> None:
    graphs: list[Any] = []
    model = tiny_model(attn_implementation="sdpa")
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    for make in (lambda: None, lambda: PreallocatedCache(model.config, 2, 16)):
        graphs.clear()
        ids, past, expected = tiny_ids(2, 3), make(), None
        for _ in range(6):
            out, wanted = compiled(ids, past_key_values=past), model(ids, past_key_values=expected)
            torch.testing.assert_close(out.logits, wanted.logits)
            ids, past, expected = ids[:, -1:], out.past_key_values, wanted.past_key_values
        assert past.get_seq_length() == 8
        assert len(graphs) <= 4, "prompt, one token, one token with any past"


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
@torch.no_grad()
def test_inductor_gives_the_same_logits() -> None:
    model = tiny_model(attn_implementation="sdpa", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(tiny_ids()).logits, model(tiny_ids()).logits)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_layer_compiled_by_inductor_has_the_same_gradients() -> None:
    model = tiny_model(attn_implementation="sdpa", num_hidden_layers=1, **NO_DROPOUT).train()
    found = []
    for make in (lambda: None, model.model.layers[0].compile):
        make()
        model.loss(tiny_ids(), tiny_ids()).backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# --- export ---


@torch.no_grad()
def test_an_exported_model_gives_the_same_outputs_at_any_size_and_from_a_file() -> None:
    model = tiny_model(attn_implementation="sdpa")
    sizes = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(
        model,
        (tiny_ids(),),
        {"attention_mask": LEFT_PADDED},
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    ids, mask = tiny_ids(3, 11), torch.arange(11) >= torch.tensor([[0], [4], [1]])
    expected = model(ids, attention_mask=mask.long())
    for again in (program, torch.export.load(file)):
        out = again.module()(ids, attention_mask=mask.long())
        assert isinstance(out, CausalLMOutput)
        assert isinstance(out.past_key_values, GrowingCache)
        torch.testing.assert_close(out.to_tuple(), expected.to_tuple())


@torch.no_grad()
def test_a_step_with_a_cache_can_be_exported() -> None:
    model = tiny_model(attn_implementation="sdpa")
    past = model(tiny_ids()).past_key_values
    program = torch.export.export(model, (tiny_ids(2, 1),), {"past_key_values": past})
    out, expected = (f(tiny_ids(2, 1), past_key_values=past) for f in (program.module(), model))
    torch.testing.assert_close(out.to_tuple(), expected.to_tuple())


# --- copies ---


@pytest.mark.parametrize("fields", [{}, OWN_HEAD, TIED_HEAD], ids=["shared", "own", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_whole_and_independent(kind: Any, fields: dict[str, Any]) -> None:
    model = tiny_model(kind, attn_implementation="sdpa", **fields)
    model.gradient_checkpointing_enable()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = model(tiny_ids())[0]
    again = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False))
    for other in again:
        assert torch.equal(other(tiny_ids())[0], expected)
        assert (other.config, other.base_model.gradient_checkpointing) == (model.config, True)
        assert other.base_model.attn_implementation == "sdpa"
        assert other.num_parameters() == model.num_parameters(), "what is tied stays tied"
        nn.init.zeros_(other.base_model.norm.weight)
    assert torch.equal(model(tiny_ids())[0], expected)


@torch.no_grad()
def test_caches_and_outputs_can_be_copied() -> None:
    model = tiny_model()
    place = model(tiny_ids(), past_key_values=PreallocatedCache(model.config, 2, 9)).past_key_values
    for out in (model(tiny_ids()), model(tiny_ids(2, 1), past_key_values=place)):
        for other in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
            assert type(other.past_key_values) is type(out.past_key_values)
            assert torch.equal(other.logits, out.logits)
            following = model(tiny_ids(2, 1), past_key_values=other.past_key_values)
            assert following.past_key_values.get_seq_length() == out.past_key_values.get_seq_length() + 1


@pytest.mark.parametrize("fields", [{}, OWN_HEAD, TIED_HEAD], ids=["shared", "own", "tied"])
def test_a_state_dict_moves_weights_by_copy_or_by_assignment(fields: dict[str, Any]) -> None:
    model, other = tiny_model(seed=1, **fields), tiny_model(seed=2, **fields)
    expected = model(tiny_ids()).logits
    assert not torch.equal(other(tiny_ids()).logits, expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tiny_ids()).logits, expected)
    with torch.device("meta"):
        empty = OpenLlamaForCausalLM(model.config, attn_implementation="eager").eval()
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(tiny_ids()).logits, expected)
    del (state := model.state_dict())["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*model\.norm\.weight"):
        other.load_state_dict(state)


# --- device and dtype ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_the_meta_device_gives_shapes(kind: Any) -> None:
    with torch.device("meta"):
        model = kind(tiny_config())
        ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    out = model(ids, attention_mask=mask)
    assert (model.device.type, out[0].device.type) == ("meta", "meta")
    again = model.to_empty(device="cpu")
    again.load_state_dict(tiny_model(kind).state_dict())
    assert out[0].shape == again.eval()(tiny_ids())[0].shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_floating_dtype_works_throughout(dtype: torch.dtype, backend: str) -> None:
    model = tiny_model(attn_implementation=backend, **NO_DROPOUT).to("cpu", dtype).train()
    assert {t.dtype for t in model.state_dict().values()} == {dtype}
    past = model(tiny_ids(2, 3)).past_key_values
    mask = torch.cat((torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.ones(2, 7)), dim=1)
    out = model(tiny_ids(), past_key_values=past, attention_mask=mask, labels=tiny_ids(), output_hidden_states=True)
    out.loss.backward()
    assert {t.dtype for t in (out.logits, *out.hidden_states, *out.past_key_values[0])} == {dtype}
    assert out.loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert model.eval().generate(tiny_ids(), max_new_tokens=2).shape == (2, 9)


def test_short_forms_of_to_do_the_same() -> None:
    casts = {torch.float16: nn.Module.half, torch.float64: nn.Module.double, torch.bfloat16: nn.Module.bfloat16}
    for dtype, cast in casts.items():
        model = cast(tiny_model(**TIED_HEAD))
        assert model.dtype == dtype
        assert torch.equal(model(tiny_ids()).logits, tiny_model(**TIED_HEAD).to(dtype)(tiny_ids()).logits)
        assert model.lm_head.weight is model.model.embedding.tokens.weight


@examples(25)
@given(data=st.data(), config=configs(initializer_range=0.1), seed=seeds, backend=st.sampled_from(BACKENDS))
@torch.no_grad()
def test_float32_is_near_float64_and_the_backends_agree_in_float64(
    data: st.DataObject, config: OpenLlamaConfig, seed: int, backend: str
) -> None:
    batch = data.draw(batches(config))
    torch.manual_seed(seed)
    model = randomise_norms(OpenLlamaForCausalLM(config, attn_implementation=backend), seed).eval()
    single = model(**batch)
    model.double()
    if "inputs_embeds" in batch:
        batch["inputs_embeds"] = batch["inputs_embeds"].double()
    double = model(**batch)
    real = is_real(batch)
    torch.testing.assert_close(single.logits[real].double(), double.logits[real], rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("eager" if backend == "sdpa" else "sdpa")
    torch.testing.assert_close(model(**batch).logits[real], double.logits[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trained_context_is_no_border_for_the_rotation_of_a_cast_model(dtype: torch.dtype) -> None:
    ids = tiny_ids(2, 20)
    logits = [tiny_model(max_position_embeddings=limit).to(dtype)(ids).logits for limit in (4, 64)]
    assert torch.equal(*logits)


# --- hooks ---


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of the embedding: ids have none
@pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning")  # of a decoder inside a head
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_on_every_module_once_each_way(kind: Any, backend: str) -> None:
    model = tiny_model(kind, attn_implementation=backend, shared_input_output_embedding=False).train()
    names = [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]
    called: dict[str, list[str]] = {"before": [], "after": [], "back": []}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, name=name: called["before"].append(name))
        module.register_forward_hook(lambda module, args, output, name=name: called["after"].append(name))
        module.register_full_backward_hook(lambda module, into, out, name=name: called["back"].append(name))
    model(tiny_ids(), return_dict=False)[0].square().sum().backward()
    assert sorted(called["before"]) == sorted(called["after"]) == sorted(names)
    assert set(called["back"]) | {"model"} == set(names) | {"model"}  # torch looks into tuples, not dataclasses
    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == 5


def test_a_hook_on_a_projection_can_replace_what_it_gives() -> None:
    model, other = tiny_model(), tiny_model()
    other.model.layers[1].attention.v_proj.weight.data.mul_(3)
    model.model.layers[1].attention.v_proj.register_forward_hook(lambda module, args, output: 3 * output)
    torch.testing.assert_close(model(tiny_ids()).logits, other(tiny_ids()).logits)


@pytest.mark.parametrize("arguments", [{"use_cache": True}, {"use_cache": False}, {"output_hidden_states": True}])
def test_a_hook_on_a_layer_may_return_the_vectors_alone(arguments: dict[str, Any]) -> None:
    outputs = []
    for steer in (lambda output: output[0] + 1, lambda output: (output[0] + 1, *output[1:])):
        model = tiny_model(attn_implementation="sdpa")
        model.model.layers[0].register_forward_hook(lambda module, args, output, steer=steer: steer(output))
        texts = model.generate(tiny_ids(), max_new_tokens=4, use_cache=arguments.get("use_cache", True))
        outputs.append((*model(tiny_ids(), **arguments).to_tuple(), texts))
        assert len(model.model.layers[0]._forward_hooks) == 1
    torch.testing.assert_close(*outputs)
    assert not torch.equal(outputs[0][0], tiny_model(attn_implementation="sdpa")(tiny_ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 3])
def test_a_hook_on_a_layer_may_return_the_vectors_alone_in_one_graph(batch: int) -> None:
    model = tiny_model(attn_implementation="sdpa")
    plain = model(tiny_ids(batch)).logits
    model.model.layers[0].register_forward_hook(lambda module, args, output: output[0] + 1)
    found = torch.compile(model, backend="eager", fullgraph=True)(tiny_ids(batch))
    torch.testing.assert_close(found.to_tuple(), model(tiny_ids(batch)).to_tuple())
    assert not torch.allclose(found.logits, plain)


def test_attention_weights_that_a_hook_has_dropped_are_missed() -> None:
    model = tiny_model()
    model.model.layers[0].register_forward_hook(lambda module, args, output: output[0])
    with pytest.raises(BackendError, match="a hook on the layer returned the vectors alone"):
        model(tiny_ids(), output_attentions=True)


def test_a_hook_on_a_layer_may_return_the_vectors_alone_while_layers_are_computed_again() -> None:
    found = []
    for again in (False, True):
        model = tiny_model(**NO_DROPOUT).train()
        model.model.layers[0].register_forward_hook(lambda module, args, output: 2 * output[0])
        if again:
            model.gradient_checkpointing_enable()
        model(tiny_ids(), labels=tiny_ids(), use_cache=False).loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found)


# --- the projection ---


@pytest.mark.parametrize("fields", [{}, OWN_HEAD, TIED_HEAD], ids=["shared", "own", "tied"])
def test_the_projection_is_a_module_that_hooks_see(fields: dict[str, Any]) -> None:
    model, seen = tiny_model(**fields), []
    expected = model.get_output_embeddings()(model.model(tiny_ids()).last_hidden_state)
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0]) or 2 * output)
    assert torch.equal(model(tiny_ids()).logits, 2 * expected)
    assert [hidden.shape for hidden in seen] == [(2, 7, 24)]


def test_a_shared_projection_has_no_weight_of_its_own_and_follows_the_table() -> None:
    model = tiny_model()
    assert list(model.lm_head.parameters()) == list(model.lm_head.state_dict()) == []
    hidden = model.model(tiny_ids()).last_hidden_state
    for change in (
        lambda: model.set_input_embeddings(nn.Embedding(23, 24)),
        lambda: setattr(model.model, "embedding", copy.deepcopy(model.model.embedding)),
        lambda: setattr(model, "model", tiny_model(seed=2).model),
    ):
        before = model.lm_head(hidden)
        change()
        assert torch.equal(model.lm_head(hidden), F.linear(hidden, model.model.embedding.tokens.weight))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.get_input_embeddings().weight.data.add_(1)
        assert not torch.equal(model.lm_head(hidden), before)


@pytest.mark.parametrize("fields", [{"target_modules": ["tokens"]}, {"modules_to_save": ["tokens"]}], ids=str)
def test_an_adapter_on_the_shared_table_acts_on_the_projection_too(fields: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; it is part of the test extra where it can be")
    model = tiny_model(**NO_DROPOUT)
    before = model(tiny_ids()).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **fields})).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        adapted(input_ids=tiny_ids(), labels=tiny_ids(), use_cache=False).loss.backward()
        optimizer.step()
    after = adapted.eval()(input_ids=tiny_ids(), output_hidden_states=True)
    rows = adapted.get_base_model().get_input_embeddings()(torch.arange(23))
    torch.testing.assert_close(after.logits, F.linear(after.hidden_states[-1], rows))
    assert not torch.allclose(after.logits, before, atol=1e-2)
    torch.testing.assert_close(adapted.merge_and_unload()(tiny_ids()).logits, after.logits)


@pytest.mark.parametrize("fields", [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "tokens"]}], ids=str)
def test_an_adapter_that_copies_a_shared_projection_leaves_it_shared(fields: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; it is part of the test extra where it can be")
    model = tiny_model(**NO_DROPOUT)
    saved = ["lm_head"] if "tokens" in fields["target_modules"] else ["lm_head", "tokens"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, modules_to_save=saved, **fields)).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        adapted(input_ids=tiny_ids(), labels=tiny_ids(), use_cache=False).loss.backward()
        optimizer.step()
    after = adapted.eval()(input_ids=tiny_ids()).logits
    adapted.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(OpenLlamaForCausalLM.from_pretrained(tmp_path)(tiny_ids()).logits, after)


def test_a_copied_model_has_a_projection_of_its_own_and_a_copied_projection_the_same_table() -> None:
    model = tiny_model()
    again, head = copy.deepcopy(model), copy.deepcopy(model.lm_head)
    assert head.weight is model.lm_head.weight
    again.get_input_embeddings().weight.data.zero_()
    assert not again(tiny_ids()).logits.any()
    assert model(tiny_ids()).logits.any()


def test_hooks_on_an_adapted_table_see_the_ids_alone() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; it is part of the test extra where it can be")
    model, seen = tiny_model(), []
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["tokens"], r=2))
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    adapted(input_ids=tiny_ids())
    assert seen == [(2, 7, 24)]


def test_a_shared_table_without_numbers_is_refused() -> None:
    model = tiny_model()
    numbers = model.get_input_embeddings().weight
    model.get_input_embeddings().weight = nn.Parameter(numbers.to("meta"))  # as offloading leaves it
    for call in (lambda: model(tiny_ids()), lambda: model.loss(tiny_ids(), tiny_ids())):
        with pytest.raises(InputError, match=r"on the meta device, .*: offload layers alone"):
            call()


# --- embedding ---


@pytest.mark.parametrize("stable", [True, False])
def test_embedded_ids_give_what_the_ids_give(stable: bool) -> None:
    model = tiny_model(use_stable_embedding=stable)
    expected = model(tiny_ids()).logits
    assert torch.equal(model(inputs_embeds=model.embed(tiny_ids())).logits, expected)
    raw = model.get_input_embeddings()(tiny_ids())
    assert torch.equal(model(inputs_embeds=raw).logits, expected) is not stable


def test_attributions_to_the_embedding_sum_to_the_difference_of_the_outputs() -> None:
    model = tiny_model().double()
    ids, baseline = tiny_ids(1, 5), tiny_ids(1, 5) * 0 + 3
    start, end = model.embed(baseline).detach(), model.embed(ids).detach()

    def output(vectors: Tensor) -> Tensor:
        return model(inputs_embeds=vectors).logits[:, -1, 5]

    points = (torch.arange(400) + 0.5) / 400
    paths = (start + points[:, None, None] * (end - start)).requires_grad_()
    [gradient] = torch.autograd.grad(output(paths).sum(), paths)
    attributions = ((end - start) * gradient.mean(0)).sum(-1)  # integrated gradients (Sundararajan et al. 2017)
    torch.testing.assert_close(attributions.sum(), (output(end) - output(start)).sum(), rtol=1e-3, atol=1e-5)


# --- torch.func ---


@pytest.mark.parametrize("fields", [{}, OWN_HEAD, TIED_HEAD], ids=["shared", "own", "tied"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_weights_can_be_called_with(backend: str, fields: dict[str, Any]) -> None:
    model, other = (tiny_model(attn_implementation=backend, seed=seed, **NO_DROPOUT, **fields) for seed in (1, 2))
    weights = {name: p.detach() for name, p in other.named_parameters()}
    assert torch.equal(functional_call(model, weights, (tiny_ids(),)).logits, other(tiny_ids()).logits)
    found = grad(lambda weights: functional_call(model, weights, (tiny_ids(),), {"labels": tiny_ids()}).loss)(weights)
    other(tiny_ids(), labels=tiny_ids()).loss.backward()
    torch.testing.assert_close(found, gradients(other))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap of the fused kernel
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_per_sample_are_those_of_each_row_alone(backend: str) -> None:
    model = tiny_model(attn_implementation=backend, **NO_DROPOUT)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        arguments = {"attention_mask": mask[None], "labels": ids[None]}
        return functional_call(model, weights, (ids[None],), arguments).loss

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, tiny_ids(), LEFT_PADDED)
    for row in range(2):
        model(tiny_ids()[[row]], attention_mask=LEFT_PADDED[[row]], labels=tiny_ids()[[row]]).loss.backward()
        torch.testing.assert_close({name: value[row] for name, value in found.items()}, gradients(model))


def test_forward_mode_derivatives_are_those_of_differences() -> None:
    model = tiny_model(**NO_DROPOUT).double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: torch.randn_like(value) for name, value in weights.items()}

    def logits(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (tiny_ids(),)).logits

    _, found = jvp(logits, (weights,), (direction,))
    step = 1e-6
    ahead, behind = (
        logits({name: value + sign * step * direction[name] for name, value in weights.items()}) for sign in (1, -1)
    )
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-4)


def test_forward_mode_works_through_the_fused_kernel_by_the_plain_one() -> None:
    found = []
    for backend in BACKENDS:
        model = tiny_model(attn_implementation=backend, **NO_DROPOUT).double()
        vectors = model.embed(tiny_ids()).detach()
        direction = torch.ones_like(vectors)
        found.append(jvp(lambda vectors, model=model: model(inputs_embeds=vectors).logits, (vectors,), (direction,)))
    torch.testing.assert_close(*found)


def test_a_symbolic_trace_says_what_to_use_instead() -> None:
    with pytest.raises(InputError, match=r"torch\.fx\.symbolic_trace cannot .* use torch\.export\.export"):
        torch.fx.symbolic_trace(tiny_model())


# --- adapters ---


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_adapts_the_projections_alone_and_merges(task: str | None, checkpointing: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; it is part of the test extra where it can be")
    model = tiny_model(attn_implementation="sdpa", **NO_DROPOUT)
    before = model(tiny_ids()).logits
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=64, task_type=task)
    adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    assert torch.equal(adapted.eval()(input_ids=tiny_ids()).logits, before), "LoRA starts as no change"
    if checkpointing:
        adapted.get_base_model().gradient_checkpointing_enable()
        adapted.get_base_model().enable_input_require_grads()
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step moves B alone, which starts as zeros
        adapted(input_ids=tiny_ids(), labels=tiny_ids(), use_cache=False).loss.backward()
        optimizer.step()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 2 * 2  # layers, projections, A and B
    assert all("lora_" in name for name in trained)
    after = adapted.eval()(input_ids=tiny_ids()).logits
    assert not torch.allclose(after, before)
    assert adapted.generate(input_ids=tiny_ids(), max_new_tokens=2).shape == (2, 9)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert torch.equal(again(input_ids=tiny_ids()).logits, after)
    torch.testing.assert_close(adapted.merge_and_unload()(tiny_ids()).logits, after, rtol=1e-4, atol=1e-4)
