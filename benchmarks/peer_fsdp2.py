#!/usr/bin/env python3
"""The SafeGrad step as one writes it on PyTorch FSDP2: the peer that safegrad is timed against.

    torchrun --nproc-per-node 2 benchmarks/peer_fsdp2.py --steps 5 \
        --task-sequences 2 --align-sequences 1 --sequence-length 256

SmolLM2-135M's shape with random float32 weights, gloo on the CPU, one thread a rank. Every decoder
layer and the root are a fully_shard group. A step is
    task pass       forward, cross-entropy, backward; the sharded gradients u are put aside
    alignment pass  forward of a frozen, equally sharded reference model; forward, KL, backward: a
    projection      [uu, ua, aa] over the local shards, one all-reduce; u' = u - min(ua, 0)/aa a,
                    g = u' + a
    update          gradient clipping and fused AdamW
Sequence counts are per rank. Without --data all sequences are random and of --sequence-length
tokens. With --data TASK ALIGN (token files) each batch is padded to its longest sequence, longer
ones are cut at --sequence-length, and every token that is not padding is scored. The losses are
means over each rank's own tokens, which FSDP2 averages over the ranks.

glibc returns every large block to the system at once; MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=100000000000 in the environment keeps them, for more memory and less time.
Run both ways and compare with the better.

Prints one JSON line on rank 0. The first step is a warm-up and is not in the median.
"""

import argparse
import json
import pathlib
import resource
import statistics
import time

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

PAD = -100  # ignored by cross_entropy
RHO = 1.0
AA_GUARD = 1e-9  # no projection below: at the reference the KL gradient is zero

SMOLLM2_135M = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
    rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True, use_cache=False)


def sharded_model(mesh, seed):
    """Built on meta and filled shard by shard, so that no rank ever holds a whole model."""
    config = transformers.LlamaConfig(**SMOLLM2_135M, attn_implementation="sdpa",
                                      dtype=torch.float32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    # Its frequencies are a buffer outside the state dict: to_empty left them without values.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.to_local().fill_(1.0)
            else:
                p.to_local().normal_(0.0, 0.02, generator=generator)
    return model


def random_batches(count, length):
    generator = torch.Generator().manual_seed(43 + dist.get_rank())
    while True:
        yield torch.randint(SMOLLM2_135M["vocab_size"], (count, length), generator=generator), None


def file_batches(path, count, limit):
    """(tokens, labels), right-padded to the longest of the batch; ranks take turns."""
    data = safetensors.torch.load_file(path)
    offsets = data["offsets"].tolist()
    tokens = data["tokens"].long()
    sequences = [tokens[b:e][:limit] for b, e in zip(offsets, offsets[1:])]
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(43)).tolist()
    position = dist.get_rank() * count
    while True:
        batch = [sequences[order[(position + i) % len(order)]] for i in range(count)]
        position += dist.get_world_size() * count
        labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=PAD)
        yield labels.clamp_min(0), labels


# Right padding needs no attention mask under a causal one: no real token sees a padded one. Left
# out, scaled_dot_product_attention keeps its fast causal kernel.
def logits_of(model, tokens):
    return model(input_ids=tokens).logits


def task_loss(model, tokens, labels):
    labels = tokens if labels is None else labels
    # Labels are shifted, not the logits: a slice of the logits would be copied.
    labels = F.pad(labels[:, 1:], (0, 1), value=PAD)
    return F.cross_entropy(logits_of(model, tokens).flatten(0, 1), labels.flatten(),
                           ignore_index=PAD)


def align_loss(model, reference, tokens, labels):
    with torch.no_grad():
        log_reference = F.log_softmax(logits_of(reference, tokens), dim=-1)
    log_model = F.log_softmax(logits_of(model, tokens), dim=-1)
    if labels is None:
        log_model, log_reference = log_model.flatten(0, 1), log_reference.flatten(0, 1)
    else:
        log_model, log_reference = log_model[labels != PAD], log_reference[labels != PAD]
    return F.kl_div(log_model, log_reference, log_target=True, reduction="batchmean")


def local_gradients(parameters):
    return [p.grad.to_local() for p in parameters]


def dot(x, y):
    return sum(torch.dot(a.flatten(), b.flatten()).double() for a, b in zip(x, y))


def train_step(model, reference, parameters, optimizer, task, align):
    """One optimizer step; returns (task loss, alignment loss, cosine) of this rank."""
    loss_task = task_loss(model, *task)
    loss_task.backward()
    u = local_gradients(parameters)
    optimizer.zero_grad(set_to_none=True)

    loss_align = align_loss(model, reference, *align)
    loss_align.backward()
    a = local_gradients(parameters)

    dots = torch.stack([dot(u, u), dot(u, a), dot(a, a)])
    dist.all_reduce(dots)
    uu, ua, aa = dots.tolist()
    c_align = RHO - min(ua, 0.0) / aa if aa > AA_GUARD else RHO
    # g = u + c_align a, written over a, which is what the parameters' .grad holds.
    torch._foreach_mul_(a, c_align)
    torch._foreach_add_(a, u)

    torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    cosine = ua / (uu * aa) ** 0.5 if uu * aa > 0 else 0.0
    return float(loss_task.detach()), float(loss_align.detach()), cosine


def count_tokens(*batches):
    return sum(int((tokens if labels is None else labels).ne(PAD).sum())
               for tokens, labels in batches)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one warm-up")
    parser.add_argument("--task-sequences", type=int, default=2, help="per rank")
    parser.add_argument("--align-sequences", type=int, default=1, help="per rank")
    parser.add_argument("--sequence-length", type=int, default=256, help="with --data: the longest")
    parser.add_argument("--data", nargs=2, type=pathlib.Path, metavar=("TASK", "ALIGN"),
                        help="token files; without them: random tokens")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = sharded_model(mesh, seed=1)
    reference = sharded_model(mesh, seed=1).requires_grad_(False).eval()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
    counts = (arguments.task_sequences, arguments.align_sequences)
    if arguments.data:
        task_data, align_data = (file_batches(path, count, arguments.sequence_length)
                                 for path, count in zip(arguments.data, counts))
    else:
        task_data, align_data = (random_batches(c, arguments.sequence_length) for c in counts)

    step_s, tokens, results = [], [], []
    for _ in range(arguments.steps + 1):
        task, align = next(task_data), next(align_data)
        dist.barrier()
        start = time.perf_counter()
        results.append(train_step(model, reference, parameters, optimizer, task, align))
        dist.barrier()
        step_s.append(time.perf_counter() - start)
        tokens.append(count_tokens(task, align))

    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    total = torch.tensor(tokens)
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        timed, timed_tokens = step_s[1:], total[1:].tolist()
        print(json.dumps(dict(
            peer="fsdp2", torch=torch.__version__, transformers=transformers.__version__,
            ranks=dist.get_world_size(), task_sequences=counts[0], align_sequences=counts[1],
            median_step_s=round(statistics.median(timed), 4),
            tokens_per_s=round(sum(timed_tokens) / sum(timed), 1),
            peak_rss_gib=round(float(peak), 3), warm_up_s=round(step_s[0], 4),
            step_s=[round(s, 4) for s in timed], tokens=timed_tokens,
            loss_task=round(results[-1][0], 4), loss_align=results[-1][1],
            cosine=round(results[-1][2], 4))), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
