"""The same model in four programs: ours, transformers 4.31.0, current transformers, llama.cpp. See ``__main__``."""
