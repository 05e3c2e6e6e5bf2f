"""What tests/test_parallel.py checks in two processes: ``python -m tests.spread FOLDER``, once per process.

Each function below ``CHECKS`` runs in both processes at the same time, on CPUs over gloo, and raises in either if what
it is named after does not hold. Starting the processes takes most of the time, so that they start once for all.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from openllama import OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.cache import PreallocatedCache
from openllama.checkpoint import writer
from openllama.errors import CheckpointError, DestinationExistsError, InputError, KeyMismatchError
from openllama.generation import score
from openllama.parallel import load, shard, tensor_parallel
from openllama.recompute import keep_products
from tests.tiny import tiny_config, tiny_ids, tiny_model

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
HEADS = (  # the projection is the embedding table; a matrix of its own; a module that holds the table
    {},
    {"shared_input_output_embedding": False},
    {"shared_input_output_embedding": False, "tie_word_embeddings": True},
)
IDS = tiny_ids(4, 7)
PROMPT = tiny_ids(2, 4, seed=5)
BIG = "big"  # the name of a model of 63 MB that was written before
TORCH = "torch"  # the name of a checkpoint of torch
CHECKS: list[Callable[[Path], None]] = []


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS.append(function)
    return function


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mine(ids: Tensor) -> Tensor:
    """The rows of this process."""
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def trained(method: str, **fields: Any) -> tuple[OpenLlamaForCausalLM, list[Tensor]]:
    """A model after the backward pass of all processes' rows, and the loss of each process."""
    model = tiny_model(**NO_DROPOUT, **fields).train()
    losses = [loss_of(model, method, rows) for rows in IDS.chunk(dist.get_world_size())]
    for loss in losses:
        (loss / len(losses)).backward()
    return model, losses


def loss_of(model: Any, method: str, ids: Tensor) -> Tensor:
    return model.loss(ids, ids) if method == "loss" else model(ids, labels=ids, use_cache=False).loss


def assert_same_gradients(model: nn.Module, expected: nn.Module, atol: float = 0.0) -> None:
    named = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        found, wanted = whole(parameter.grad), named[name.removeprefix("module.")].grad
        assert torch.allclose(found, wanted, rtol=0, atol=atol), (name, float((found - wanted).abs().max()))


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def file_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# --- FSDP2 ---


@check
def training_a_model_sharded_by_layer_gives_the_loss_and_gradients_of_one_process(folder: Path) -> None:
    for fields in HEADS:
        for method in ("loss", "forward"):
            expected, losses = trained(method, **fields)
            model = shard(tiny_model(**NO_DROPOUT, **fields).train())
            assert [whole(p).shape for p in model.parameters()] == [p.shape for p in expected.parameters()]
            assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * expected.num_parameters()
            loss = loss_of(model, method, mine(IDS))
            loss.backward()
            assert torch.equal(loss, losses[dist.get_rank()])
            assert_same_gradients(model, expected)


@check
def calling_loss_after_plain_fully_shard_gives_the_same_numbers(folder: Path) -> None:
    expected, losses = trained("loss")
    model = tiny_model(**NO_DROPOUT).train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        loss = model.loss(mine(IDS), mine(IDS))
        loss.backward()
        assert torch.equal(loss, losses[dist.get_rank()])
        assert_same_gradients(model, expected)


@check
def steps_of_an_optimizer_on_a_sharded_model_change_weights_as_in_one_process(folder: Path) -> None:
    expected, _ = trained("loss")
    torch.optim.AdamW(expected.parameters(), lr=0.1, foreach=False).step()
    for recomputation in ({}, {"context_fn": keep_products}):
        model = shard(tiny_model(**NO_DROPOUT).train())
        model.gradient_checkpointing_enable(recomputation)
        model.loss(mine(IDS), mine(IDS)).backward()
        torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False).step()
        for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(whole(found), wanted), name


@check
def a_policy_of_mixed_precision_reaches_every_layer(folder: Path) -> None:
    model = shard(tiny_model(**NO_DROPOUT), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    types = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, arguments, output: types.append(output[0].dtype))
    assert model(IDS).logits.dtype == torch.bfloat16
    assert types == [torch.bfloat16] * 2
    model.train().loss(IDS, IDS).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert model.generate(PROMPT, max_new_tokens=3).shape == (2, 7)


@check
def generating_from_a_sharded_model_gives_the_ids_of_one_process(folder: Path) -> None:
    for backend in ("eager", "sdpa"):
        expected = tiny_model(attn_implementation=backend)
        model = shard(tiny_model(attn_implementation=backend))
        for arguments in ({}, {"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 3}):
            wanted = expected.generate(PROMPT, max_new_tokens=8, **arguments)
            assert torch.equal(model.generate(PROMPT, max_new_tokens=8, **arguments), wanted), (backend, arguments)


@check
def torch_warns_of_nothing_while_a_sharded_model_trains(folder: Path) -> None:
    model = shard(tiny_model().train())
    with warnings.catch_warnings(record=True) as caught:
        model(IDS, labels=IDS).loss.backward()
        model.loss(IDS, IDS).backward()
        model.eval().generate(PROMPT, max_new_tokens=2)
    assert [str(warning.message) for warning in caught] == []


@check
def a_table_that_is_spread_apart_from_the_head_that_shares_it_is_refused(folder: Path) -> None:
    own_group, decoder_first, split = tiny_model(), tiny_model(), tiny_model()
    fully_shard(own_group.model.embedding.tokens)
    fully_shard(own_group)
    fully_shard(decoder_first.model)
    fully_shard(decoder_first)
    parallelize_module(split, mesh(), {"model.embedding.tokens": RowwiseParallel(input_layouts=Replicate())})
    for model in (own_group, decoder_first, split):
        for call in (lambda m: m(IDS), lambda m: m.loss(IDS, IDS), lambda m: m.generate(PROMPT, max_new_tokens=2)):
            with pytest.raises(InputError, match=r"apart from the head .*\(openllama\.parallel\.shard\)"):
                call(model)


# --- tensor parallelism ---


@check
def training_with_tensor_parallelism_gives_the_loss_and_gradients_of_one_process(folder: Path) -> None:
    for fields in HEADS:
        for method in ("loss", "forward"):
            expected = tiny_model(**NO_DROPOUT, **fields).train()
            wanted = loss_of(expected, method, IDS)
            wanted.backward()
            model = tensor_parallel(tiny_model(**NO_DROPOUT, **fields).train(), mesh())
            if method == "loss":
                model.gradient_checkpointing_enable({"context_fn": keep_products})
            assert model.model.layers[0].attention.q_proj.weight.to_local().shape == (12, 24)
            loss = loss_of(model, method, IDS)
            loss.backward()
            torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-6)
            assert_same_gradients(model, expected, atol=2e-6)


@check
def heads_that_processes_cannot_share_are_refused_before_anything_is_split(folder: Path) -> None:
    model = tiny_model(hidden_size=24, num_attention_heads=3)
    with pytest.raises(InputError, match="num_attention_heads 3 is not divisible by the 2 processes"):
        tensor_parallel(model, mesh())
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


@check
def a_function_that_calls_parts_of_a_sharded_model_works_as_a_registered_method(folder: Path) -> None:
    class Scorer(OpenLlamaForCausalLM):
        scored = score

    expected = score(tiny_model(), PROMPT)
    model = shard(tiny_model(Scorer))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        model.scored(PROMPT)
    model = shard(tiny_model(Scorer))
    register_fsdp_forward_method(model, "scored")
    split = tensor_parallel(tiny_model(), mesh())
    for found, atol in ((model.scored(PROMPT), 0.0), (score(split, PROMPT), 1e-5)):
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one.log_probs, wanted.log_probs, rtol=0, atol=atol)


@check
def steps_with_clipped_gradients_and_tensor_parallelism_change_weights_as_in_one_process(folder: Path) -> None:
    expected = tiny_model(**NO_DROPOUT).train()
    model = tensor_parallel(tiny_model(**NO_DROPOUT).train(), mesh())
    for one in (expected, model):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            one.loss(IDS, IDS).backward()
            with implicit_replication():
                nn.utils.clip_grad_norm_(one.parameters(), 0.5)
                optimizer.step()
            optimizer.zero_grad()
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(found), wanted, rtol=0, atol=1e-6, msg=name)


@check
def training_and_generating_with_both_at_once_gives_the_numbers_of_one_process(folder: Path) -> None:
    grid = mesh(1, 2, names=("dp", "tp"))

    def both(model: Any) -> Any:
        return shard(tensor_parallel(model, grid["tp"]), mesh=grid["dp"])

    one = folder / f"one-{dist.get_rank()}"
    tiny_model(**NO_DROPOUT).save_pretrained(one)
    expected = tiny_model(**NO_DROPOUT).train()
    expected.loss(IDS, IDS).backward()
    for model in (both(tiny_model(**NO_DROPOUT)), load(OpenLlamaForCausalLM, one, both, attn_implementation="eager")):
        model.train().loss(IDS, IDS).backward()
        assert_same_gradients(model, expected, atol=2e-6)
        model.eval().set_attn_implementation("sdpa")
        found = model.generate(PROMPT, max_new_tokens=8)
        assert torch.equal(found, tiny_model(attn_implementation="sdpa").generate(PROMPT, max_new_tokens=8))


@check
def generating_with_tensor_parallelism_gives_the_ids_of_one_process(folder: Path) -> None:
    strategies = ({}, {"do_sample": True}, {"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 3})
    for fields in HEADS:
        for backend in ("eager", "sdpa"):
            expected = tiny_model(attn_implementation=backend, **fields)
            model = tensor_parallel(tiny_model(attn_implementation=backend, **fields), mesh())
            for arguments in (*strategies, {"prompt_lookup_num_tokens": 2}):
                ids = PROMPT[:1] if "prompt_lookup_num_tokens" in arguments else PROMPT
                found = []
                for one in (expected, model):
                    torch.manual_seed(3)
                    found.append(one.generate(ids, max_new_tokens=8, **arguments))
                assert torch.equal(*found), (fields, backend, arguments)


@check
def a_conversation_goes_on_from_the_cache_of_each_process(folder: Path) -> None:
    expected, model = (tiny_model(attn_implementation="sdpa") for _ in range(2))
    tensor_parallel(model, mesh())
    arguments = {"max_new_tokens": 3, "return_dict_in_generate": True}
    first = model.generate(PROMPT, **arguments)
    assert isinstance(first.past_key_values, PreallocatedCache)
    assert first.past_key_values[0][0].shape == (2, 1, 6, 12)
    longer = torch.cat((first.sequences, PROMPT), dim=1)
    second = model.generate(longer, past_key_values=first.past_key_values, **arguments)
    assert torch.equal(second.sequences, expected.generate(longer, **arguments).sequences)
    with pytest.raises(InputError, match=r"room for 2 heads, this process has 1; PreallocatedCache\(\.\.\., heads=1\)"):
        model.generate(PROMPT, past_key_values=PreallocatedCache(model.config, 2, 20), max_new_tokens=3)
    place = PreallocatedCache(model.config, 2, 20, heads=1)
    assert torch.equal(model.generate(PROMPT, past_key_values=place, max_new_tokens=3), first.sequences)
    with pytest.raises(InputError, match="heads"):
        model.generate(PROMPT, past_key_values=PreallocatedCache(tiny_config(num_attention_heads=4), 2, 20))


@check
def activations_that_are_dtensors_need_implicit_replication(folder: Path) -> None:
    expected, model = tiny_model(), tiny_model()
    layer = "model.layers.*.attention."
    plan = {layer + name: ColwiseParallel(use_local_output=False) for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(model, mesh(), plan | {layer + "o_proj": RowwiseParallel()})
    with implicit_replication(), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        model(IDS)


# --- saving and loading ---


@check
def a_model_saved_from_its_parts_is_the_file_of_the_whole_model(folder: Path) -> None:
    two = mesh(2, 1, names=("dp", "tp"))
    spreads: dict[str, Callable[[Any], Any]] = {
        "fsdp": shard,
        "tp": lambda model: tensor_parallel(model, mesh()),
        "both": lambda model: shard(tensor_parallel(model, two["tp"]), mesh=two["dp"]),
    }
    for number, fields in enumerate(HEADS):
        for layout in ("native", "hf", "llama"):
            one = folder / f"one-{number}-{layout}-{dist.get_rank()}"
            tiny_model(**fields).save_pretrained(one, layout=layout)
            for name, spread in spreads.items():
                model, place = spread(tiny_model(**fields)), folder / f"{name}-{number}-{layout}"
                if name == "fsdp":
                    model(IDS)  # leaves the root's weights whole
                model.save_pretrained(place, layout=layout)
                assert file_of(place) == file_of(one), (name, fields, layout)
                assert (place / "config.json").read_bytes() == (one / "config.json").read_bytes()
    shard(tiny_model()).save_pretrained(folder / "files", max_shard_size=4000)
    assert len(list((folder / "files").glob("model-*.safetensors"))) > 3
    loaded = OpenLlamaForCausalLM.from_pretrained(folder / "files").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny_model().state_dict().items())


@check
def an_error_of_the_process_that_writes_reaches_all(folder: Path) -> None:
    model = shard(tiny_model())
    model.save_pretrained(folder / "there")
    with pytest.raises(DestinationExistsError, match="there exists"):
        model.save_pretrained(folder / "there", overwrite=False)
    before = file_of(folder / "there")
    full, unsendable = OSError(28, "No space left on device"), RuntimeError(lambda: None)  # which has no pickle
    for error, elsewhere in ((full, OSError), (unsendable, CheckpointError)):
        kind = elsewhere if dist.get_rank() else type(error)
        with mock.patch.object(writer._File, "compare", side_effect=error), pytest.raises(kind, match=r"space|lambda"):
            model.save_pretrained(folder / "there")
    assert file_of(folder / "there") == before
    model.save_pretrained(folder / "there")


@check
def loading_into_parts_gives_the_model_that_was_saved(folder: Path) -> None:
    for fields in HEADS:
        for kind in (OpenLlamaForCausalLM, OpenLlamaModel, OpenLlamaForSequenceClassification):
            one = folder / f"{kind.__name__}-{HEADS.index(fields)}-{dist.get_rank()}"
            model = tiny_model(kind, **fields)
            model.save_pretrained(one)
            expected = kind.from_pretrained(one, attn_implementation="eager")
            for spread in (shard, lambda model: tensor_parallel(model, mesh())):
                found = load(kind, one, spread, attn_implementation="eager")
                assert not found.training
                for name, tensor in expected.state_dict().items():
                    assert torch.equal(whole(found.state_dict()[name]), tensor), name
                torch.testing.assert_close(found(IDS)[0], expected(IDS)[0], rtol=0, atol=0 if spread is shard else 2e-6)
    half = load(
        OpenLlamaForCausalLM,
        one.with_name(one.name.replace("SequenceClassification", "CausalLM")),
        shard,
        dtype="bfloat16",
    )
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@check
def a_loaded_model_trains(folder: Path) -> None:
    for number, fields in enumerate(HEADS):
        expected, losses = trained("loss", **fields)
        one = folder / f"trains-{number}-{dist.get_rank()}"
        tiny_model(**NO_DROPOUT, **fields).save_pretrained(one)
        model = load(OpenLlamaForCausalLM, one, shard, attn_implementation="eager").train()
        loss = model.loss(mine(IDS), mine(IDS))
        loss.backward()
        assert torch.equal(loss, losses[dist.get_rank()])
        assert_same_gradients(model, expected)


@check
def a_classifier_without_trained_classes_cannot_be_loaded_into_parts(folder: Path) -> None:
    one = folder / f"no-score-{dist.get_rank()}"
    tiny_model().save_pretrained(one)
    with pytest.raises(KeyMismatchError, match=r"has no score\.weight"):
        load(OpenLlamaForSequenceClassification, one, shard)


@check
def loading_into_parts_takes_the_memory_of_a_part(folder: Path) -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

    if sys.platform != "linux":
        return
    big = folder.parent / BIG
    kept = []  # freed memory would be used again
    for spread in (shard, lambda model: tensor_parallel(model, mesh())):
        before = anonymous()
        kept.append(load(OpenLlamaForCausalLM, big, spread))
        share = (anonymous() - before) / (big / "model.safetensors").stat().st_size
        assert 0.45 < share < 0.6, share


# --- torch.distributed.checkpoint ---


@check
def a_checkpoint_of_torch_holds_the_parts_and_is_read_into_others(folder: Path) -> None:
    model = shard(tiny_model(seed=1))
    dcp.save(model.state_dict(), checkpoint_id=folder / TORCH)
    for other in (tensor_parallel(tiny_model(), mesh()), shard(tiny_model()), tiny_model()):
        state = other.state_dict()
        dcp.load(state, checkpoint_id=folder / TORCH)
        for name, tensor in tiny_model(seed=1).state_dict().items():
            assert torch.equal(whole(other.state_dict()[name]), tensor), name


@check
def training_goes_on_from_a_checkpoint_of_torch(folder: Path) -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        model.loss(mine(IDS), mine(IDS)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def fresh(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        model = shard(tiny_model(seed=seed, **NO_DROPOUT).train())
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    first, second = fresh(1), fresh(2)
    step(*first)
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(*first), strict=True)), checkpoint_id=folder / TORCH)
    state = dict(zip(("model", "optimizer"), get_state_dict(*second), strict=True))
    dcp.load(state, checkpoint_id=folder / TORCH)
    set_state_dict(*second, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for one in (first, second):
        step(*one)
    for found, wanted in zip(second[0].parameters(), first[0].parameters(), strict=True):
        assert torch.equal(whole(found), whole(wanted))


# --- DistributedDataParallel ---


@check
def training_under_ddp_gives_the_loss_and_gradients_of_one_process(folder: Path) -> None:
    for fields in HEADS:
        expected, losses = trained("forward", **fields)
        model = DistributedDataParallel(tiny_model(**NO_DROPOUT, **fields).train())
        if fields:
            model.module.gradient_checkpointing_enable({"context_fn": keep_products})
        loss = loss_of(model, "forward", mine(IDS))
        loss.backward()
        assert torch.equal(loss, losses[dist.get_rank()])
        assert_same_gradients(model, expected)


def main(folder: Path) -> None:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=30),
    )
    found = {}
    for function in CHECKS:
        place = folder / function.__name__
        place.mkdir(exist_ok=True)
        try:
            torch.manual_seed(0)
            function(place)
            found[function.__name__] = ""
        except BaseException:
            found[function.__name__] = traceback.format_exc()
        (folder / f"found-{rank}.json").write_text(json.dumps(found))
        if found[function.__name__]:
            break  # the other process waits for this one somewhere else
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
