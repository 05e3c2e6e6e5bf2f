"""Weights that are spread over processes, as FSDP2 and tensor parallelism leave them, for the one process that writes.

A weight is gathered when it is written, so that no process ever holds more than one whole matrix. The first process
asks for weights by name, the others take part until it says how writing ended.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from openllama.errors import CheckpointError


@dataclass(frozen=True)
class Spread:
    """A matrix of which this process holds a part; it has what is asked of a weight that is to be written."""

    part: Tensor  # a DTensor: shape and type are those of the whole
    gather: Callable[[], Tensor]

    @property
    def shape(self) -> torch.Size:
        return self.part.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.part.dtype

    @property
    def nbytes(self) -> int:
        return self.part.numel() * self.part.dtype.itemsize

    def numel(self) -> int:
        return self.part.numel()


def is_spread(tensor: object) -> bool:
    """Whether it is a DTensor; asking does not import them."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "full_tensor")


@contextmanager
def one_writer(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor] | None]:
    """The tensors where they are to be written, None in processes that only lend their parts.

    Where nothing is spread, every process gets its tensors. Else all processes enter together, the first gets vectors,
    which are small, and a ``Spread`` for each matrix, and all leave together: an error of the first is raised in all.
    """
    if not any(map(is_spread, tensors.values())):
        yield dict(tensors)
    elif dist.get_rank():
        yield None
        _lend(tensors)
    else:
        ending: BaseException | None = None
        try:
            yield {name: _asked(name, tensor) if is_spread(tensor) else tensor for name, tensor in tensors.items()}
        except BaseException as error:
            ending = _sendable(error)
            raise
        finally:
            dist.broadcast_object_list([None, ending])
            dist.barrier()  # none leaves the group while another still reads


def _asked(name: str, tensor: Tensor) -> Tensor:
    def gather() -> Tensor:
        dist.broadcast_object_list([name, None])
        return _whole(tensor)

    return gather() if tensor.ndim == 1 else cast(Tensor, Spread(tensor, gather))


def _lend(tensors: Mapping[str, Tensor]) -> None:
    """Take part in gathering until the first process has written."""
    message: list[Any] = [None, None]  # the name of a weight, or the error that writing ended with
    dist.broadcast_object_list(message)
    while message[0] is not None:
        _whole(tensors[message[0]])
        dist.broadcast_object_list(message)
    dist.barrier()
    if message[1] is not None:
        raise message[1]


def _sendable(error: BaseException) -> BaseException:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return CheckpointError(f"the process that writes ended with {type(error).__name__}: {error}")


def _whole(tensor: Any) -> Tensor:
    """The whole of a DTensor, gathered where its processes communicate: the part may have been moved to the CPU."""
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
