"""The SmolLM2 folder: names and shapes of its tensors, and the order of q and k."""

import json

import numpy as np
import pytest
import smollm2
from errors import InputError
from safetensors import safe_open
from tokenizers import Tokenizer


def test_rows_of_q_go_from_pairs_to_halves():
    # Two heads of two pairs: GGUF keeps (0, 1) and (2, 3) together, halves are (0, 2) and (1, 3).
    weight = np.array([[0], [1], [2], [3], [10], [11], [12], [13]], np.float32)

    ordered = smollm2.rotate_half_order(weight, heads=2)
    assert ordered[:, 0].tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


def test_folder_fits_its_config(smollm2_folder):
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 100000.0
    with safe_open(smollm2_folder / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}

    assert dtypes == {"F32"}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 134_515_008
    assert len(shapes) == 2 + 9 * config["num_hidden_layers"]
    assert shapes["model.embed_tokens.weight"] == [config["vocab_size"], config["hidden_size"]]
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == [192, 576]
    assert shapes["model.layers.0.mlp.down_proj.weight"] == [576, 1536]


def test_tokenizer_has_the_ids_of_smollm2(smollm2_folder):
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))

    assert tokenizer.get_vocab_size() == 49_152
    assert [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [
        0, 1, 2]
    assert len(tokenizer.encode("in 1984").ids) == 6  # one for each digit
    tokenizer.encode("\x04\x1d")  # bytes without a token are dropped, not fatal


def test_perplexity_of_a_passage(smollm2_folder):
    """Golden number from an independent numpy forward pass: 9.047; 42.7 with q and k permuted."""
    text = ("The quick brown fox jumps over the lazy dog. It was the best of times, it was the"
            " worst of times, it was the age of wisdom, it was the age of foolishness.")
    ids = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json")).encode(text).ids
    assert len(ids) == 39

    # 0.01: rounding of float32 in another order moves it by less than 0.001.
    assert perplexity(smollm2_folder, ids) == pytest.approx(9.047, abs=0.01)


def perplexity(folder, ids) -> float:
    """A plain float32 Llama forward pass."""
    config = json.loads((folder / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size, count = config["head_dim"], len(ids)
    with safe_open(folder / "model.safetensors", "np") as file:
        weight = {name: file.get_tensor(name) for name in file.keys()}

    angles = np.outer(np.arange(count), config["rope_theta"] ** (-np.arange(0, size, 2) / size))
    cos, sin = (np.tile(f(angles), 2).astype(np.float32) for f in (np.cos, np.sin))
    later = np.triu(np.full((count, count), -np.inf, np.float32), 1)

    def norm(x, name):
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean + config["rms_norm_eps"]) * weight[name]

    def rotate(x):  # [heads, tokens, size]
        turned = np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], axis=-1)
        return x * cos + turned * sin

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    x = weight["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        h = norm(x, name + "input_layernorm.weight")
        q, k, v = (
            (h @ weight[f"{name}self_attn.{part}_proj.weight"].T)
            .reshape(count, -1, size)
            .swapaxes(0, 1)
            for part in "qkv"
        )
        k, v = (np.repeat(part, heads // groups, axis=0) for part in (rotate(k), v))
        scores = softmax(rotate(q) @ k.swapaxes(1, 2) / np.sqrt(size) + later)
        mixed = (scores @ v).swapaxes(0, 1).reshape(count, -1)
        x = x + mixed @ weight[name + "self_attn.o_proj.weight"].T
        h = norm(x, name + "post_attention_layernorm.weight")
        gate = h @ weight[name + "mlp.gate_proj.weight"].T
        up = h @ weight[name + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight[name + "mlp.down_proj.weight"].T
    logits = norm(x, "model.norm.weight") @ weight["model.embed_tokens.weight"].T
    picked = softmax(logits[:-1].astype(np.float64))[np.arange(count - 1), ids[1:]]
    return float(np.exp(-np.log(picked).mean()))


def test_second_build_does_nothing(smollm2_folder, monkeypatch):
    monkeypatch.setattr(smollm2.wheels, "read", lambda *_: pytest.fail("read the package again"))
    assert smollm2.build(smollm2_folder) is False


def test_folder_that_is_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no model.safetensors"):
        smollm2.build(tmp_path)


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.wheels, "read", lambda *_: b"not a GGUF file")
    with pytest.raises(ValueError):
        smollm2.build(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
