"""Arguments of transformers that this package does not have, and what to do instead.

Code passes many of them from habit, at a value that asks for nothing. Those are accepted; any other value is refused,
because leaving it out would change what the code does without a word. ``docs/dropin.md`` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from openllama.errors import InputError


class Foreign(NamedTuple):
    """An argument that is not taken."""

    instead: str  # ends the message
    neutral: tuple[Any, ...] = (None, False)  # values that ask for nothing


_LOCAL = Foreign("nothing is downloaded; `openllama convert ORG/NAME DST` downloads a checkpoint")
_ALWAYS = Foreign("give True or False; it is always so", (None, False, True))
_QUANTISED = Foreign("quantize='int8' or 'int4' rounds the weights")
_ONE_DEVICE = Foreign("a model is loaded onto one device; give device, or device_map with one device")
_PARALLEL = Foreign("openllama.parallel.load loads a model in parts")
_UPLOAD = Foreign("nothing is uploaded; upload the folder with huggingface_hub")

#: of ``from_pretrained``
LOADING: dict[str, Foreign] = {
    # always so, whatever is asked for: nothing is held twice, fetched or executed
    "low_cpu_mem_usage": _ALWAYS,
    "local_files_only": _ALWAYS,
    "trust_remote_code": _ALWAYS,
    "cache_dir": _LOCAL,
    "force_download": _LOCAL,
    "resume_download": _LOCAL,
    "proxies": _LOCAL,
    "token": _LOCAL,
    "use_auth_token": _LOCAL,
    "mirror": _LOCAL,
    "revision": _LOCAL._replace(neutral=(None, "main")),
    "subfolder": Foreign("give the path of the subfolder itself", (None, "")),
    "variant": Foreign("give the path of the file of weights itself", (None,)),
    "from_tf": Foreign("only weights of PyTorch are read"),
    "from_flax": Foreign("only weights of PyTorch are read"),
    "gguf_file": Foreign("files of llama.cpp hold rounded numbers; load the checkpoint they were made from"),
    "weights_only": Foreign("pickles are only opened with weights_only=True", (None, True)),
    "state_dict": Foreign("model.load_state_dict(openllama.checkpoint.hf_to_native(state_dict)) loads one"),
    "key_mapping": Foreign("rename the weights, then model.load_state_dict"),
    "output_loading_info": Foreign("a weight that does not fit is an error, one that is not used a warning"),
    "ignore_mismatched_sizes": Foreign(
        "a weight of another shape is an error; `openllama convert --ignore score.weight` leaves a classifier out"
    ),
    "load_in_8bit": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "quantization_config": _QUANTISED,
    "max_memory": _ONE_DEVICE,
    "offload_folder": _ONE_DEVICE,
    "offload_state_dict": _ONE_DEVICE,
    "offload_buffers": _ONE_DEVICE,
    "tp_plan": _PARALLEL,
    "tp_size": _PARALLEL,
    "device_mesh": _PARALLEL,
    "distributed_config": _PARALLEL,
    "use_kernels": Foreign("attn_implementation chooses how attention is computed"),
    "generation_config": Foreign("assign model.generation_config"),
    "adapter_kwargs": Foreign("peft.PeftModel.from_pretrained(model, folder) loads an adapter", (None,)),
    "adapter_name": Foreign("peft.PeftModel.from_pretrained(model, folder) loads an adapter", (None, "default")),
}

#: of ``save_pretrained``
SAVING: dict[str, Foreign] = {
    "safe_serialization": Foreign(
        "only safetensors are written; layout='hf' is what transformers 4.31.0 reads, too", (None, True)
    ),
    "push_to_hub": _UPLOAD,
    "token": _UPLOAD,
    "use_auth_token": _UPLOAD,
    "repo_id": _UPLOAD,
    "commit_message": _UPLOAD,
    "private": _UPLOAD,
    "create_pr": _UPLOAD,
    "save_config": Foreign("is_main_process says whether files are written", (None, True)),
    "variant": Foreign("files have the names that from_pretrained looks for", (None,)),
    "save_peft_format": Foreign("save an adapter with its own save_pretrained", (None, True)),
    "save_original_format": Foreign("give layout: 'native', 'hf' or 'llama'", (None, True)),
    "distributed_checkpoint": Foreign("torch.distributed.checkpoint saves a model that is sharded"),
}

_TEXT_ONLY = Foreign("there is no encoder")
#: of ``generate`` and of a ``GenerationConfig``
GENERATING: dict[str, Foreign] = {
    "prefix_allowed_tokens_fn": Foreign("give a logits_processor that sets the scores of all other tokens to -inf"),
    "synced_gpus": Foreign("each process generates by itself"),
    "force_words_ids": Foreign("beams are not constrained; sequence_bias favours sequences", (None,)),
    "constraints": Foreign("beams are not constrained; sequence_bias favours sequences", (None,)),
    "forced_decoder_ids": Foreign("forced_bos_token_id and forced_eos_token_id force the first and the last token"),
    "guidance_scale": Foreign("give a logits_processor that compares with the scores of another prompt", (None, 1)),
    "negative_prompt_ids": Foreign("give a logits_processor that compares with the scores of another prompt"),
    "negative_prompt_attention_mask": Foreign("give a logits_processor that compares with another prompt"),
    "encoder_repetition_penalty": _TEXT_ONLY._replace(neutral=(None, 1)),
    "encoder_no_repeat_ngram_size": _TEXT_ONLY._replace(neutral=(None, 0)),
    "encoder_outputs": _TEXT_ONLY,
    "decoder_input_ids": _TEXT_ONLY,
    "decoder_start_token_id": _TEXT_ONLY._replace(neutral=(None,)),
    "token_type_ids": Foreign("the model has no types of tokens", (None,)),
    "position_ids": Foreign("positions follow from attention_mask", (None,)),
    "head_mask": Foreign("a hook on a layer's attention changes its heads", (None,)),
    "stop_strings": Foreign("give openllama.generation.text.stop_at(tokenizer, strings, length) as stopping_criteria"),
    "tokenizer": Foreign("openllama.generation.text.stream_text takes a tokenizer", (None,)),
    "cache_implementation": Foreign("give past_key_values: a PreallocatedCache, or a GrowingCache"),
    "max_cache_len": Foreign("give past_key_values: a PreallocatedCache of that length"),
    "cache_config": Foreign("give past_key_values: a PreallocatedCache, or a GrowingCache"),
    "watermarking_config": Foreign("give a logits_processor"),
    "token_healing": Foreign("end the prompt where a token ends"),
    "dola_layers": Foreign("layers are not contrasted"),
    "top_h": Foreign("top_p, min_p, typical_p and eta_cutoff filter by probability"),
    "custom_generate": Foreign("model.stream hands each token to a loop of your own"),
    "generation_kwargs": Foreign("give each setting by its name", (None, {})),
}


PLAIN = (type(None), bool, int, float, str)


def without_neutral(what: str, given: Mapping[str, Any], table: Mapping[str, Foreign]) -> dict[str, Any]:
    """The arguments of ``given`` that are not in ``table``.

    Raises ``InputError``, that ``what`` has no such argument, for one in ``table`` that asks for something.
    """
    for name, value in given.items():
        if name in table and not _is_neutral(value, table[name].neutral):
            shown = f"{name}={value!r}" if isinstance(value, PLAIN) else f"{name} ({type(value).__name__})"
            raise InputError(f"{what} does not take {shown}: {table[name].instead}")
    return {name: value for name, value in given.items() if name not in table}


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether ``value`` is one of ``neutral``: 1.0 is 1, and 0 is not False."""
    return any(
        value is one or (isinstance(value, (int, float, str, dict)) and value == one)
        for one in neutral
        if isinstance(value, bool) == isinstance(one, bool)
    )
