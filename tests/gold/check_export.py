"""check_export.py: does transformers see the model that safegrad wrote?

    .venv-gold/bin/python tests/gold/check_export.py runs/quickstart/safegrad/model \
        runs/quickstart/data/heldout.safetensors

Loads a model folder, or a PEFT adapter folder with its base, in transformers and peft, scores a
token file, and compares the loss per scored token with the one that `safegrad evaluate` finds on
two ranks.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile

import peft
import safetensors.torch
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5  # relative; float32 on both sides, sums in another order


def load(folder):
    options = dict(dtype=torch.float32, attn_implementation="eager")
    if (folder / "adapter_config.json").exists():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model = transformers.AutoModelForCausalLM.from_pretrained(base, **options)
        return peft.PeftModel.from_pretrained(model, folder).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def loss_of(model, tokens_file):
    """Mean over the scored tokens of -log p, one sequence at a time."""
    data = safetensors.torch.load_file(tokens_file)
    bounds = data["offsets"].tolist()
    total, scored = 0.0, 0
    for begin, end in zip(bounds, bounds[1:]):
        tokens = data["tokens"][begin:end].long()
        mask = data["loss_mask"][begin + 1:end].bool()
        log_p = torch.log_softmax(model(tokens[None]).logits[0, :-1].double(), dim=-1)
        total -= log_p[mask].gather(1, tokens[1:][mask][:, None]).sum().item()
        scored += int(mask.sum())
    return total / scored


def loss_in_safegrad(folder, tokens_file, program):
    with tempfile.TemporaryDirectory() as scratch:
        config = pathlib.Path(scratch) / "evaluate.yaml"
        config.write_text(f"model: {{path: {folder}}}\nprobe: [{{name: p, file: {tokens_file}}}]\n"
                          f"output: {scratch}/run\n")
        command = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", "-n", "2"]
        command += ["--allow-run-as-root"] if os.getuid() == 0 else []
        done = subprocess.run([*command, program, "evaluate", config], stdout=subprocess.PIPE,
                              text=True, check=True)
        return json.loads(done.stdout)["p"]["loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=pathlib.Path, help="folder that safegrad wrote")
    parser.add_argument("tokens", type=pathlib.Path, help="token file without choices")
    parser.add_argument("--program", default=ROOT / "build" / "safegrad")
    arguments = parser.parse_args()
    theirs = loss_of(load(arguments.model), arguments.tokens)
    ours = loss_in_safegrad(arguments.model, arguments.tokens, arguments.program)
    print(f"{arguments.model}: loss per scored token: transformers {theirs:.8f},"
          f" safegrad {ours:.8f}")
    if abs(ours / theirs - 1) > TOLERANCE:
        raise SystemExit(f"they differ by {ours / theirs - 1:.1e},"
                         f" at most {TOLERANCE:.0e} is allowed")


if __name__ == "__main__":
    main()
