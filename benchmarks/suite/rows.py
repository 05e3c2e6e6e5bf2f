"""The ways of a training step that are compared, by name."""

THEIRS = ("transformers", "transformers, layers recomputed")
PLAIN, FAST = "model.loss", "model.loss, fast products"
PRODUCTS_KEPT, RECOMPUTED = "model.loss, products kept", "model.loss, layers recomputed"
ROWS = (*THEIRS, "all logits", PLAIN, FAST, PRODUCTS_KEPT, RECOMPUTED)
DTYPES = ("bfloat16", "float16", "float32")
