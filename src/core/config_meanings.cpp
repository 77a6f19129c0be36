// config_meanings.cpp: what each key of the config means; docs/config.md is made of it.
#include <array>

#include "core/config_schema.h"

namespace safegrad {
namespace {

constexpr auto kMeanings = std::to_array<KeyMeaning>({
    {"model", "What is trained."},
    {"model.path",
     "a Hugging Face folder: `config.json`, `*.safetensors`, `tokenizer.json`; or a PEFT adapter "
     "folder, which is merged into its base model when it is read. Training starts from it, and it "
     "is the reference of the KL. Exactly one of `path` and `config`"},
    {"model.config", "a `config.json`: random weights of that shape, for benchmarks"},
    {"model.dtype", "the compute copy of the weights; master weights are float32"},
    {"model.lora", "train low-rank adapters; leave it out for full fine-tuning"},
    {"model.lora.rank", "columns of A and rows of B of each adapter"},
    {"model.lora.alpha", "the adapters' scale is alpha / rank"},
    {"model.lora.dropout", "on the adapters' input"},
    {"model.lora.targets", "the projections that get an adapter"},
    {"model.lora.merge", "write a whole model with the adapters merged in, not an adapter folder"},
    {"model.trainable",
     "without `lora`: the parameters whose whole Hugging Face name matches one of these ECMAScript "
     "regular expressions are trained, the others are frozen; at most 64 of 256 characters"},
    {"data", "What it is trained on: token files, see [data.md](data.md)."},
    {"data.task", "token file of what the user wants the model to learn; `train` needs it"},
    {"data.align", "token file of the alignment set; every rule but `sft` needs it"},
    {"objective",
     "With rule `sft` and an alignment set, the conflict is measured but not acted on."},
    {"objective.rule", "how the two gradients become one, see [step.md](step.md)"},
    {"objective.rho", "weight of the alignment gradient in `safegrad` and `weighted_sum`"},
    {"objective.cagrad_c", "radius of `cagrad`"},
    {"objective.surgery",
     "`global`, as in the paper: the rule sees the inner products over all trained parameters, and "
     "one pair of coefficients holds for all. `block`: it sees those of the embedding, of each "
     "decoder block and of the head one by one, and each has its own pair; clipping is by the norm "
     "of the whole either way"},
    {"objective.align_loss",
     "KL to the start model, or cross-entropy on the alignment responses (`sft`)"},
    {"objective.kl_positions",
     "positions whose KL is summed. `all` is what the SafeGrad authors' program does; the sum is "
     "divided by the number of response tokens either way"},
    {"objective.gradients",
     "`two_pass` runs each objective by itself: the slow comparison for `one_pass`, same result"},
    {"objective.align_every",
     "the alignment gradient is computed in every so many-th step, the first included, with the KL "
     "also in the second; the steps between draw no alignment sequences and use the last one "
     "again, "
     "see [step.md](step.md)"},
    {"objective.gate",
     "a task sample is left out when it comes again if its score, its own gradient along the "
     "alignment gradient, lies more than so many robust deviations (1.4826 · median absolute "
     "deviation) below the median of all scores; 0 = off, 2 or 3 are usual bounds for outliers, "
     "see [step.md](step.md)"},
    {"objective.gram_per_block",
     "also record uu, ua, aa of the embedding, every decoder block and the head (`blocks` in "
     "`metrics.jsonl`); adapters count to their block"},
    {"objective.lisa", "with rule `lisa` only, which takes turns instead of combining gradients"},
    {"objective.lisa.align_steps", "steps of an alignment phase, which come first"},
    {"objective.lisa.task_steps", "steps of a task phase"},
    {"objective.lisa.rho",
     "weight of the proximal term that pulls towards the weights at the end of the phase before; "
     "none in the first tenth of the run"},
    {"batch",
     "A whole optimizer step, all ranks together. The number of ranks changes neither the samples "
     "of a step nor their weight."},
    {"batch.task_sequences", "sequences of the task data in a step"},
    {"batch.align_sequences",
     "sequences of the alignment set in a step; 0 only with rule `sft`, which is the default "
     "without `data.align`"},
    {"batch.max_tokens_per_rank",
     "tokens of one micro-batch of a rank; a step that needs more is run in several. At least the "
     "longest sequence"},
    {"optimizer", "AdamW."},
    {"optimizer.lr", "learning rate at the top of the schedule"},
    {"optimizer.betas", "decay of the first and the second moment"},
    {"optimizer.eps", "added to the root of the second moment"},
    {"optimizer.weight_decay", "on matrices; norms and biases are never decayed"},
    {"optimizer.clip_norm", "largest norm of the combined gradient; 0 = off"},
    {"schedule", "Of the learning rate."},
    {"schedule.kind", "after the warm-up; `linear` and `cosine` go down to 0"},
    {"schedule.warmup_steps", "the learning rate rises linearly over so many steps"},
    {"train", "How long, and from which random numbers."},
    {"train.epochs",
     "passes over the task data; not together with `steps`; 1 where neither is given"},
    {"train.steps", "optimizer steps"},
    {"train.seed", "order of samples, fresh adapters, dropout, random weights"},
    {"train.max_skipped_steps",
     "a step whose losses or gradients are not finite is skipped by all ranks; so many in a row "
     "end "
     "the run with exit code 2, see [reliability.md](reliability.md)"},
    {"parallel",
     "How ranks share the work. The number of ranks is not in the file: it is what the launcher "
     "starts."},
    {"parallel.device",
     "`cuda`: one GPU a rank, NCCL between them; `auto`: `cuda` where the build has it and every "
     "rank sees a GPU, else `cpu` (MPI between ranks)"},
    {"parallel.shards",
     "ranks that share one copy of the weights, a divisor of their number: 1 = data parallel, all "
     "= fully sharded, between = hybrid"},
    {"parallel.recompute",
     "`block`: keep only the input of each block and run it again in the backward pass; less "
     "memory, more time"},
    {"parallel.reduce_dtype", "in which gradients travel"},
    {"parallel.frozen",
     "`replicated`: every rank holds all frozen weights, so LoRA gathers only the adapters"},
    {"parallel.tf32",
     "on a GPU, float32 matrix products may round their inputs to TF32 (10 bits of fraction): "
     "faster, less exact; nothing to do with `bfloat16`"},
    {"parallel.timeout_seconds",
     "a rank that waits longer than this in one collective ends the job, with a report of which "
     "rank is behind, or one whose disk takes nothing of a checkpoint for as long "
     "([reliability.md](reliability.md)); longer than the slowest rank may take to load its "
     "weights"},
    {"probe",
     "A list, scored by likelihood, without generating text. A file with choice groups gives the "
     "share of groups that each class wins, and the share whose greedy reply begins with one of "
     "its candidates; one without gives `loss` and, while training, `kl` to the start model."},
    {"probe.name", "its name in `metrics.jsonl`: letters, digits, `_`, `-`; unique"},
    {"probe.file", "a token file"},
    {"probe.every_steps", "0 = after the last step only, which always counts"},
    {"checkpoint",
     "What is in one and how a run goes on from it: [reliability.md](reliability.md)."},
    {"checkpoint.every_steps", "0 = only where the run is asked to stop"},
    {"checkpoint.keep_last", "the newest so many are kept"},
    {"checkpoint.keep_every",
     "checkpoints whose step is a multiple of it are kept for ever; 0 = none"},
    {"output",
     "the run folder: `config.yaml`, `metrics.jsonl`, `model/`, `reference/`, `checkpoints/`, "
     "`flight/` (reports of a job that stood still), `lock`, with `objective.gate` `gate.jsonl`. "
     "On several machines it is on a file system that all of them see"},
});

}  // namespace

std::span<const KeyMeaning> key_meanings() {
  return kMeanings;
}

}  // namespace safegrad
