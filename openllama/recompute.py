"""Training in less memory: activations that are cheap to compute are computed again in the backward pass.

    model.gradient_checkpointing_enable({"context_fn": keep_products})

keeps the results of matrix products and attention, most of a layer's time, and computes norms, rotations and
activations again; without ``context_fn`` whole layers are computed again. Values and gradients are the same bits.
"""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

KEPT = {  # by name: an operator that a release of torch does not have is not an error
    "aten.mm.default",
    "aten.bmm.default",
    "aten.addmm.default",
    "openllama.mm.default",  # of products.py
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
}


def keep_products() -> Any:
    """The two contexts that ``torch.utils.checkpoint`` asks of a ``context_fn``."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(op) in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
