"""More than one process: FSDP2, tensor parallelism, DistributedDataParallel, checkpoints of torch, workers."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.utils.data import DataLoader

from openllama import OpenLlamaForCausalLM, OpenLlamaTokenizer
from openllama.errors import InputError
from openllama.parallel import tensor_parallel_plan
from tests.spread import BIG, CHECKS, HEADS, TORCH
from tests.spread import a_checkpoint_of_torch_holds_the_parts_and_is_read_into_others as a_checkpoint_of_torch
from tests.tiny import tiny_config, tiny_model
from tests.workers import Scored

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "checkpoints" / "open-llama-tiny"
PROCESSES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes write: one folder for each check."""
    return tmp_path_factory.mktemp("spread")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, str]]:
    """What each process found: an empty text or a traceback for each check that it came to."""
    tiny_model(hidden_size=512, intermediate_size=1024, num_hidden_layers=6).save_pretrained(folder / BIG)
    command = [sys.executable, "-m", "tests.spread", str(folder)]
    environment = {**os.environ, "WORLD_SIZE": str(PROCESSES), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(PROCESSES)
    ]
    try:
        printed = [process.communicate(timeout=180)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    places = [folder / f"found-{rank}.json" for rank in range(PROCESSES)]
    assert all(place.exists() for place in places), printed
    return [json.loads(place.read_text()) for place in places]


@pytest.mark.parametrize("name", [function.__name__ for function in CHECKS])
def test_in_two_processes(found: list[dict[str, str]], name: str) -> None:
    for rank, results in enumerate(found):
        assert results.get(name, "was not reached") == "", f"process {rank}: {results.get(name)}"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_torch_from_two_processes_becomes_a_folder_in_one(
    found: list[dict[str, str]], folder: Path, tmp_path: Path
) -> None:
    model = tiny_model()
    dcp.load(model.state_dict(), checkpoint_id=folder / a_checkpoint_of_torch.__name__ / TORCH)
    model.save_pretrained(tmp_path)
    loaded, expected = OpenLlamaForCausalLM.from_pretrained(tmp_path).state_dict(), tiny_model(seed=1).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        (3, "num_attention_heads 2 is not divisible by the 3 processes of the mesh"),
        (2, "intermediate_size 21 is not divisible by the 2 processes of the mesh"),
    ],
)
def test_heads_and_columns_that_processes_cannot_share_are_refused_with_both_numbers(
    processes: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tensor_parallel_plan(tiny_config(intermediate_size=21), processes)


@pytest.mark.parametrize("fields", HEADS)
def test_the_plan_splits_every_matrix_but_a_shared_table(fields: dict[str, bool]) -> None:
    model = tiny_model(**fields)
    plan = tensor_parallel_plan(model.config, 2)
    matrices = {name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.ndim == 2}
    split = {name for name in matrices if any(fnmatch.fnmatch(name, pattern) for pattern in plan)}
    assert matrices - split == {"model.embedding.tokens"}
    assert len(plan) == 7 + ("lm_head" in matrices)


def test_spawned_workers_of_a_loader_get_model_config_and_tokenizer() -> None:
    model = OpenLlamaForCausalLM.from_pretrained(TINY, dtype="float32")
    data = Scored(["To be, or not to be", "春眠不觉晓"], OpenLlamaTokenizer.from_pretrained(TINY), model, model.config)
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert list(loader) == [data[0], data[1]]
    assert data[0][2] == model.config.num_hidden_layers
