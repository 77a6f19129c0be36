#!/usr/bin/env python3
"""Writes the gold fixtures: small models with numbers computed by Hugging Face transformers.

Every reference number (logits, hidden states, losses, gradients, inner products) is computed in
float64 by autograd over the transformers model classes, one sequence at a time without padding, and
rounded to float32 only where it is stored as float32. transformers computes RMSNorm and the rotary
angles in float32 whatever the model's dtype, so those two modules are replaced by float64 versions;
the script asserts that the unmodified float32 model agrees, and that the gradients agree with
central differences.

    python tests/gold/make_gold.py                                       # the tiny models
    python tests/gold/make_gold.py --smollm2 models/smollm2-135m-instruct  # SmolLM2's logits

Seeds are fixed. Versions other than those in requirements.txt are refused: another version may
give other numbers for reasons that have nothing to do with the code under test.
"""

import argparse
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import pathlib
import shutil

import peft
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from reference import (Batch, align_loss, check_difference, check_llama3_scaling, close, dot,
                       gradient, hidden_of, in_float64, logits_of, projection, task_loss)

HERE = pathlib.Path(__file__).parent
DATA = HERE / "data"
LORA = dict(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj"])


@dataclasses.dataclass
class Sequence:
    """`spans` are half-open ranges of response tokens; position t is scored if token t+1 is one."""

    length: int
    spans: list


@dataclasses.dataclass
class Case:
    name: str
    config: transformers.PretrainedConfig
    task: list
    align: list
    drift: float  # of the reference along the task gradient: > 0 makes the objectives conflict
    conflict: bool
    dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"
    all_positions: bool = False
    lora: bool = False


def cases():
    common = dict(attention_dropout=0.0, use_cache=False)
    return [
        # Wavelengths 6.3, 19.9, 62.8 and 198.7 against 40/4 and 40/1: all three regimes of the
        # llama3 scaling (kept, blended, divided). q_proj is 24 -> 32, wider than the model.
        Case(
            "llama3",
            transformers.LlamaConfig(
                vocab_size=101, hidden_size=24, intermediate_size=44, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
                max_position_embeddings=320, rope_theta=100.0, tie_word_embeddings=False,
                rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                  high_freq_factor=4.0, original_max_position_embeddings=40),
                **common),
            task=[Sequence(9, [(4, 9)]), Sequence(17, [(3, 6), (11, 15)])],
            align=[Sequence(5, [(3, 5)]), Sequence(12, [(5, 12)]), Sequence(7, [(6, 7)])],
            drift=0.5, conflict=True, all_positions=True),
        # One key/value head for five query heads; an eps large enough to matter.
        Case(
            "llama_tied",
            transformers.LlamaConfig(
                vocab_size=96, hidden_size=30, intermediate_size=40, num_hidden_layers=3,
                num_attention_heads=5, num_key_value_heads=1, rms_norm_eps=1e-3,
                max_position_embeddings=128, rope_theta=10000.0, tie_word_embeddings=True,
                **common),
            task=[Sequence(13, [(12, 13)]), Sequence(6, [(1, 6)])],
            align=[Sequence(10, [(4, 7), (8, 10)]), Sequence(8, [(2, 8)])],
            drift=-0.5, conflict=False, dtype=torch.bfloat16),
        Case(
            "qwen2",
            transformers.Qwen2Config(
                vocab_size=107, hidden_size=32, intermediate_size=42, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
                max_position_embeddings=128, rope_theta=1000.0, tie_word_embeddings=True,
                **common),
            task=[Sequence(11, [(5, 11)]), Sequence(4, [(3, 4)])],
            align=[Sequence(14, [(6, 14)]), Sequence(9, [(2, 5)])],
            drift=0.5, conflict=True, lora=True),
        # head_dim 10, not 28 / 4.
        Case(
            "qwen3",
            transformers.Qwen3Config(
                vocab_size=118, hidden_size=28, intermediate_size=46, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-6,
                max_position_embeddings=128, rope_theta=5000.0, tie_word_embeddings=False,
                **common),
            task=[Sequence(15, [(7, 15)]), Sequence(8, [(4, 6)]), Sequence(3, [(1, 3)])],
            align=[Sequence(6, [(5, 6)]), Sequence(16, [(9, 16)])],
            drift=0.5, conflict=True, shard_size="32KB"),
    ]


def refuse_other_versions():
    for line in (HERE / "requirements.txt").read_text().split():
        package, pinned = line.split("==")
        found = importlib.metadata.version(package).split("+")[0]
        if found != pinned:
            raise SystemExit(
                f"error: {package} is {found}, the fixtures are made with {pinned}: "
                f"pip install -r {HERE / 'requirements.txt'}")


def random_model(case, generator):
    model = transformers.AutoModelForCausalLM.from_config(case.config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                p.copy_(0.4 * noise)
            elif "embed" in name or "lm_head" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise * (1.3 / math.sqrt(p.shape[-1])))
            p.copy_(p.to(case.dtype).float())
    return model.eval()


def random_batch(case, generator):
    tokens, scored = [], []
    for sequence in case.task + case.align:
        tokens.append(
            torch.randint(case.config.vocab_size, (sequence.length,), generator=generator))
        mask = torch.zeros(sequence.length, dtype=torch.bool)
        for begin, end in sequence.spans:
            mask[begin - 1:end - 1] = True
        scored.append(mask)
    split = len(case.task)
    return Batch(tokens, scored, range(split), range(split, len(tokens)))


def reference_model(model, u, drift, generator):
    """A nearby model: noise of 3 % on every weight, plus `drift` times its length along u."""
    reference = copy.deepcopy(model)
    names = [n for n, _ in model.named_parameters()]
    with torch.no_grad():
        noise = {}
        for name, p in reference.named_parameters():
            noise[name] = 0.03 * p.abs().mean() * torch.randn(p.shape, generator=generator)
        scale = drift * math.sqrt(dot(noise, noise) / dot(u, u))
        for name, p in zip(names, reference.parameters()):
            p.add_(noise[name] + scale * u[name].float())
    return reference


def scalar(value, dtype=torch.float64):
    return torch.tensor([value], dtype=dtype)


def objective_gold(model, batch, reference, all_positions, check):
    """Losses, gradients and inner products of `model`, plus the scored counts."""
    n_task, n_align = batch.count(batch.task), batch.count(batch.align)
    losses = dict(
        task=lambda m: task_loss(m, batch),
        align=lambda m: align_loss(m, batch, batch.scored, reference["reference_hidden"],
                                   reference["reference_head"]))
    if all_positions:
        everywhere = [torch.ones_like(s) for s in batch.scored]
        losses["align_all"] = lambda m: align_loss(
            m, batch, everywhere, reference["reference_hidden_all"], reference["reference_head"])
    gold, gradients = {}, {}
    for key, loss in losses.items():
        gradients[key] = gradient(model, loss)
        check(loss, gradients[key], key)
        gold[f"loss_{key}_sum"] = scalar(float(loss(model).detach()))
    dots = projection(gradients["task"], gradients["align"], n_task, n_align)
    gold.update({name: scalar(value) for name, value in dots.items()})
    return gold, gradients


def lora_gold(case, model, batch, reference, folder, generator):
    """PEFT's own adapters on the float64 model; also writes them as a PEFT adapter folder."""
    config = peft.LoraConfig(lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **LORA)
    wrapped = peft.get_peft_model(in_float64(model), config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    wrapped = wrapped.double().eval()
    adapted = wrapped.base_model.model

    def check(loss, gradients, key):
        check_difference(adapted, loss, gradients, f"{case.name} lora {key}")

    gold, gradients = objective_gold(adapted, batch, reference, False, check)
    gold = {f"lora.{name}": value for name, value in gold.items()}
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            plain = name.replace(".default", "")
            gold[f"lora.{plain}"] = p.detach().float()
            for key in gradients:
                gold[f"grad_{key}.lora.{plain}"] = gradients[key][name].float()

    wrapped.float()
    wrapped.peft_config["default"].base_model_name_or_path = f"tests/gold/data/{case.name}"
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink()
    adapter_config = folder / "adapter" / "adapter_config.json"
    settings = json.loads(adapter_config.read_text())
    settings["target_modules"] = sorted(settings["target_modules"])  # saved from a set
    adapter_config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return gold


def write_case(case, seed):
    generator = torch.Generator().manual_seed(seed)
    folder = DATA / case.name
    shutil.rmtree(folder, ignore_errors=True)

    model = random_model(case, generator)
    batch = random_batch(case, generator)
    exact = in_float64(model)
    u = gradient(exact, lambda m: task_loss(m, batch))
    reference = reference_model(model, u, case.drift, generator)
    if case.config.model_type == "llama" and case.config.rope_scaling:
        check_llama3_scaling(model, batch)

    packed_mask = [torch.cat((torch.zeros(1, dtype=torch.bool), s[:-1])) for s in batch.scored]
    lengths = [len(t) for t in batch.tokens]
    gold = dict(
        tokens=torch.cat(batch.tokens).int(),
        loss_mask=torch.cat(packed_mask).to(torch.uint8),
        offsets=torch.tensor([0] + lengths).cumsum(0),
        n_task_sequences=scalar(len(batch.task), torch.int64),
        n_task=scalar(batch.count(batch.task), torch.int64),
        n_align=scalar(batch.count(batch.align), torch.int64))
    with torch.no_grad():
        exact_reference = in_float64(reference)
        hidden = [hidden_of(exact_reference, batch.tokens[i]).float() for i in batch.align]
        gold["reference_head"] = reference.lm_head.weight.detach().clone()
        gold["reference_hidden"] = torch.cat(
            [h[batch.scored[i]] for h, i in zip(hidden, batch.align)])
        if case.all_positions:
            gold["reference_hidden_all"] = torch.cat(hidden)
        logits = [logits_of(exact, t) for t in batch.tokens]
        gold["logits"] = torch.cat(logits).float()
        model.set_attn_implementation("eager")
        close(torch.cat([logits_of(model, t) for t in batch.tokens]), torch.cat(logits), 5e-6,
              f"{case.name}: logits of the float32 model")

    def check(loss, gradients, key):
        check_difference(exact, loss, gradients, f"{case.name} {key}")
        plain = gradient(model, loss)
        for name in gradients:
            close(plain[name], gradients[name], 1e-4, f"{case.name} {key}: {name} in float32")

    numbers, gradients = objective_gold(exact, batch, gold, case.all_positions, check)
    gold.update(numbers)
    for key in gradients:
        gold.update({f"grad_{key}.{n}": g.float() for n, g in gradients[key].items()})
    cosine = float(gold["ua"] / (gold["uu"] * gold["aa"]).sqrt())
    assert cosine < -0.02 if case.conflict else cosine > 0.02, f"{case.name}: cosine {cosine}"

    copy.deepcopy(model).to(case.dtype).save_pretrained(folder, max_shard_size=case.shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case.lora:
        gold.update(lora_gold(case, model, batch, gold, folder, generator))
    save(gold, folder / "gold.safetensors")
    print(f"{case.name:12} {sum(lengths):3} tokens  task {float(gold['loss_task_sum']):8.4f}  "
          f"align {float(gold['loss_align_sum']):8.5f}  cosine {cosine:+.3f}  "
          f"c_align {float(gold['safegrad_c_align']):.4f}")


def save(gold, path):
    # One metadata key: safetensors writes several in random order, and the files are to be the same
    # bytes every time.
    made_with = f"torch {torch.__version__}, transformers {transformers.__version__}"
    safetensors.torch.save_file({n: t.detach().contiguous() for n, t in gold.items()}, path,
                                metadata=dict(made_with=made_with))


# ------------------------------------------------------------------ SmolLM2

PASSAGE = ("The quick brown fox jumps over the lazy dog. It was the best of times, it was the "
           "worst of times, it was the age of wisdom, it was the age of foolishness.")
CHAT = ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>\n")
SHORT = "def add(a, b):\n    return a + b  # 42"


def write_smollm2(folder):
    """Logits at 64 fixed vocabulary ids and the five best, and the log-sum-exp, per position."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    sequences = [torch.tensor(tokenizer.encode(text).ids) for text in (PASSAGE, CHAT, SHORT)]
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocab = plain.config.vocab_size
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(64))[:64].sort().values
    with torch.no_grad():
        float32 = torch.cat([logits_of(plain, t) for t in sequences])
        exact = in_float64(plain)
        per_sequence = [logits_of(exact, t) for t in sequences]
        logits = torch.cat(per_sequence)
    close(float32, logits, 1e-5, "SmolLM2: logits of the float32 model")
    perplexity = math.exp(float(F.cross_entropy(per_sequence[0][:-1], sequences[0][1:])))
    # 9.047 was found by an independent numpy program on the same weights.
    assert abs(perplexity - 9.047) < 0.01, perplexity
    top = logits.topk(5)
    with open(folder / "model.safetensors", "rb") as f:
        digest = hashlib.file_digest(f, "sha256").digest()
    gold = dict(
        tokens=torch.cat(sequences).int(),
        offsets=torch.tensor([0] + [len(t) for t in sequences]).cumsum(0),
        vocab_ids=ids.int(), logits=logits[:, ids].float(),
        top5_ids=top.indices.int(), top5_logits=top.values.float(),
        logsumexp=logits.logsumexp(-1), passage_perplexity=scalar(perplexity),
        model_sha256=torch.frombuffer(bytearray(digest), dtype=torch.uint8))
    save(gold, DATA / "smollm2.safetensors")
    print(f"smollm2      lengths {[len(t) for t in sequences]}  passage perplexity "
          f"{perplexity:.4f}  float32 differs by {float((float32 - logits).abs().max()):.1e}")


def main():
    refuse_other_versions()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smollm2", type=pathlib.Path, metavar="FOLDER",
                        help="write the SmolLM2 fixture from this Hugging Face folder instead")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    DATA.mkdir(exist_ok=True)
    if arguments.smollm2:
        write_smollm2(arguments.smollm2)
    else:
        for i, case in enumerate(cases()):
            write_case(case, seed=1000 + i)


if __name__ == "__main__":
    main()
