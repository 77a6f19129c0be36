#!/usr/bin/env python3
"""The SafeGrad step as its authors' program takes it: one process, LoRA, two passes, two models.

    .venv-hf/bin/python benchmarks/peer_authors.py runs/quickstart/start/model \
        --data runs/quickstart/data/task.safetensors runs/quickstart/data/align.safetensors

Every sequence is padded to the longest of its data set. A step is
    task pass       forward with labels, backward; gradients are copied by name, then cleared
    alignment pass  forward of a second frozen model, forward, KL over all positions divided by the
                    number of response tokens, backward; gradients are copied
    projection      dot products parameter by parameter, one sum; u' = u - min(ua, 0)/aa a,
                    g = u' + a, written into .grad
    update          gradient clipping and AdamW
--plain leaves out all but the task pass and the update. float32 and adapters on q, k and v as in
configs/quickstart.yaml, without dropout, so that what is timed does the same as safegrad's.

Prints one JSON line. The first step is a warm-up and is not in the median.
"""

import argparse
import json
import pathlib
import resource
import statistics
import time

import peft
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

IGNORED = -100
AA_GUARD = 1e-9


def padded(path):
    """(tokens, labels, attention mask) of a whole token file, padded to its longest sequence."""
    data = safetensors.torch.load_file(path)
    offsets = data["offsets"].tolist()
    spans = list(zip(offsets, offsets[1:]))
    tokens = [data["tokens"][b:e].long() for b, e in spans]
    labels = [torch.where(data["loss_mask"][b:e] > 0, data["tokens"][b:e].long(), IGNORED)
              for b, e in spans]
    masks = [torch.ones(e - b, dtype=torch.long) for b, e in spans]
    pad = torch.nn.utils.rnn.pad_sequence
    return (pad(tokens, True), pad(labels, True, IGNORED), pad(masks, True))


def batches(data, count):
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(43))
    position = 0
    while True:
        chosen = order[torch.arange(position, position + count) % len(order)]
        position += count
        yield tuple(part[chosen] for part in data)


def take_gradients(model):
    taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


def task_pass(model, batch):
    tokens, labels, mask = batch
    model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()


def align_pass(model, reference, batch):
    tokens, labels, mask = batch
    with torch.no_grad():
        target = F.softmax(reference(input_ids=tokens, attention_mask=mask).logits, dim=-1)
    log_model = F.log_softmax(model(input_ids=tokens, attention_mask=mask).logits, dim=-1)
    kl = F.kl_div(log_model, target, reduction="sum") / (labels != IGNORED).sum()
    kl.backward()


def combine(model, task, align):
    ua = sum((task[name] * align[name]).sum() for name in task)
    aa = sum((gradient ** 2).sum() for gradient in align.values())
    factor = ua / aa if ua < 0 and aa > AA_GUARD else 0.0
    for name, parameter in model.named_parameters():
        if name in task:
            parameter.grad = task[name] - factor * align[name] + align[name]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("--data", nargs=2, type=pathlib.Path, metavar=("TASK", "ALIGN"),
                        required=True, help="token files")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one warm-up")
    parser.add_argument("--task-sequences", type=int, default=8)
    parser.add_argument("--align-sequences", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="the task pass alone")
    options = parser.parse_args()

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(options.model,
                                                                 dtype=torch.float32)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    model = peft.get_peft_model(load(), lora)
    reference = None if options.plain else load().requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    task, align = (batches(padded(path), count) for path, count in zip(
        options.data, (options.task_sequences, options.align_sequences)))

    step_s = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        task_pass(model, next(task))
        if not options.plain:
            u = take_gradients(model)
            align_pass(model, reference, next(align))
            combine(model, u, take_gradients(model))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_s.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(dict(
        peer="authors", plain=options.plain, torch=torch.__version__,
        transformers=transformers.__version__, threads=torch.get_num_threads(),
        median_step_s=round(statistics.median(step_s[1:]), 4), peak_rss_gib=round(peak, 3),
        warm_up_s=round(step_s[0], 4), step_s=[round(s, 4) for s in step_s[1:]])))


if __name__ == "__main__":
    main()
