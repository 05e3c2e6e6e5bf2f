"""The ways of a training step that are compared, by name."""

THEIRS = ("transformers", "transformers, layers recomputed")
PLAIN, FAST = "model.loss", "model.loss, fast products"
ROWS = (*THEIRS, "all logits", PLAIN, FAST, "model.loss, products kept", "model.loss, layers recomputed")
DTYPES = ("bfloat16", "float16", "float32")
