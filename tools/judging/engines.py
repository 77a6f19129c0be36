"""engines.py: greedy generation of a batch of prompts, with transformers or with vLLM.

Both take token ids and return the new ones, up to the token that ends the turn and without it.
Decoding is the plain argmax: penalties and sampling that a folder's generation_config.json asks for
are left out.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from errors import InputError

INSTALL = ("python3 -m venv .venv-hf && .venv-hf/bin/pip install -r tools/requirements-hf.txt; then"
           " run this with .venv-hf/bin/python")

PACKAGES = {"transformers": ["torch", "transformers", "peft"], "vllm": ["vllm"]}

Decided = Callable[[list[int]], bool]


class Engine(Protocol):
    max_rows: int  # of a batch

    def generate(self, prompts: list[list[int]], max_new_tokens: int,
                 decided: Decided | None = None) -> list[list[int]]:
        """The reply to each prompt. A reply may end early where `decided(reply so far)` holds; the
        caller's verdict must not depend on what would follow.
        """


def plan_batches(lengths: list[int], max_new_tokens: int, max_tokens: int,
                 max_rows: int) -> list[list[int]]:
    """Indices of the prompts of each batch: of like length, longest first, so that there is little
    padding and too little memory shows at once. A batch has at most `max_rows` rows and, unless one
    row alone is longer, `max_tokens` tokens with its padding and the replies to come.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not room:
            row = lengths[index] + max_new_tokens  # of the longest: it is first in its batch
            room = max(1, min(max_rows, max_tokens // row))
            batches.append([])
        batches[-1].append(index)
        room -= 1
    return batches


def common_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each prompt is not among them. A
    prompt alone shares nothing.
    """
    if len(prompts) == 1:
        return 0
    first, last = min(prompts), max(prompts)
    room = min(map(len, prompts)) - 1
    return next((i for i in range(room) if first[i] != last[i]), room)


def cut(tokens: list[int], stops: set[int]) -> list[int]:
    """`tokens` up to the first that is in `stops`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


def stop_tokens(folder: Path, base: Path) -> set[int]:
    """Every token that ends a turn: of generation_config.json, config.json, and the eos_token that
    tokenizer_config.json names.
    """
    found: set[int] = set()
    for path in (folder / "generation_config.json", base / "generation_config.json",
                 base / "config.json"):
        if path.exists():
            ids = _load(path).get("eos_token_id")
            found |= set(ids if isinstance(ids, list) else [ids])
    settings = folder if (folder / "tokenizer_config.json").exists() else base
    eos = _load(settings / "tokenizer_config.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    for token in _load(settings / "tokenizer.json").get("added_tokens", []):
        if token["content"] == eos:
            found.add(token["id"])
    found.discard(None)
    if not found:
        raise InputError(f"{folder}: nothing says which token ends a reply; set eos_token_id in"
                         " generation_config.json")
    return found


def _load(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from error


def base_folder(folder: Path) -> Path:
    """The model folder itself, or the base of a PEFT adapter folder: its base_model_name_or_path
    from the working directory, then from the adapter folder, as safegrad reads it.
    """
    path = folder / "adapter_config.json"
    if not path.exists():
        if not (folder / "config.json").exists():
            raise InputError(f"{folder}: is not a model folder: there is neither config.json nor"
                             " adapter_config.json in it")
        return folder
    name = str(_load(path).get("base_model_name_or_path"))
    for place in (Path(name), folder / name):
        if (place / "config.json").exists():
            return place
    raise InputError(f"{path}: base_model_name_or_path: no model folder {name} and none"
                     f" {folder / name}; run from the folder that it is relative to, or write the"
                     " base model's path there")


def check_packages(engine: str) -> None:
    """Before anything is downloaded; the engine finds out only when it is first asked."""
    missing = [name for name in PACKAGES[engine] if importlib.util.find_spec(name) is None]
    if missing and engine == "transformers":
        raise InputError(f"generating needs transformers, peft and torch, without {missing} here;"
                         f" install them once: {INSTALL}")
    if missing:
        raise InputError(f"--engine {engine}: {missing} is not installed here")


def import_transformers():
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise InputError(f"generating needs transformers, peft and torch ({error}); install them"
                         f" once: {INSTALL}") from error
    transformers.logging.set_verbosity_error()
    return torch, transformers, peft


class TransformersEngine:
    """Padded batches with a key-value cache. What all prompts of a batch begin with (system
    message, question) is computed once; the padding stands behind it, so that every row ends in
    its last token. Rows that have ended wait for the longest.
    """

    max_rows = 64

    def __init__(self, folder: Path, device: str, dtype: str):
        self._torch, self._transformers, peft = import_transformers()
        base = base_folder(folder)
        self._stops = stop_tokens(folder, base)
        model = self._transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(self._torch, dtype), local_files_only=True)
        if base != folder:
            # Merged, it runs at the base's speed; in float32 that moves logits by rounding alone.
            model = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
        # What generation_config.json asks for would be mixed into the arguments below.
        model.generation_config = self._transformers.GenerationConfig()
        self._model = model.eval().to(device)

    def generate(self, prompts: list[list[int]], max_new_tokens: int,
                 decided: Decided | None = None) -> list[list[int]]:
        torch, width = self._torch, max(map(len, prompts))
        longest = self._model.config.max_position_embeddings
        if width + max_new_tokens > longest:
            raise InputError(f"a prompt of {width} tokens and {max_new_tokens} of a reply are more"
                             f" than the model's max_position_embeddings, {longest}")
        padding = min(self._stops)  # masked in the prompt, cut away after the reply
        shared = common_prefix(prompts)
        ids = torch.full((len(prompts), width), padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            rest = prompt[shared:]
            gap = [padding] * (width - len(prompt))
            ids[row] = torch.tensor(prompt[:shared] + gap + rest)
            mask[row, :shared] = mask[row, width - len(rest):] = 1
        ids, mask = ids.to(self._model.device), mask.to(self._model.device)
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids, attention_mask=mask,
                past_key_values=self._prefix(ids[:, :shared]) if shared else None,
                generation_config=self._transformers.GenerationConfig(
                    do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
                    eos_token_id=sorted(self._stops), pad_token_id=padding),
                stopping_criteria=self._early(width, decided) if decided else None)
        return [cut(row, self._stops) for row in out[:, width:].tolist()]

    def _prefix(self, ids):
        """Keys and values of columns that are the same in every row."""
        cache = self._model(ids[:1], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(ids))
        return cache

    def _early(self, width: int, decided: Decided):
        torch, stops = self._torch, self._stops

        class Early(self._transformers.StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                rows = input_ids[:, width:].tolist()
                done = [decided(cut(row, stops)) for row in rows]
                return torch.tensor(done, device=input_ids.device)

        return self._transformers.StoppingCriteriaList([Early()])


class VllmEngine:
    """vLLM's offline engine. It batches by itself; `decided` would save time, and is not used."""

    max_rows = 512

    def __init__(self, folder: Path, device: str, dtype: str):
        if device == "cpu":
            raise InputError("--engine vllm: runs on a GPU; say --device cuda too")
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise InputError(f"--engine vllm: vllm is not installed ({error}); install it beside"
                             " transformers, or leave --engine out") from error
        self._vllm = vllm
        base = base_folder(folder)
        self._stops = stop_tokens(folder, base)
        lora = {}
        self._adapter = None
        if base != folder:
            self._adapter = LoRARequest("adapter", 1, str(folder))
            rank = _load(folder / "adapter_config.json")["r"]
            lora = {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}
        self._model = vllm.LLM(model=str(base), tokenizer=str(folder), dtype=dtype, seed=0,
                               generation_config="vllm", **lora)

    def generate(self, prompts: list[list[int]], max_new_tokens: int,
                 decided: Decided | None = None) -> list[list[int]]:
        parameters = self._vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens,
                                               stop_token_ids=sorted(self._stops))
        results = self._model.generate([{"prompt_token_ids": prompt} for prompt in prompts],
                                       parameters, lora_request=self._adapter, use_tqdm=False)
        return [cut(list(result.outputs[0].token_ids), self._stops) for result in results]


ENGINES = {"transformers": TransformersEngine, "vllm": VllmEngine}
