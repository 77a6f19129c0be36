"""judge.py with transformers and peft on tiny random models: what is generated is what an argmax
loop gives, in a batch or alone. Skipped where tools/requirements-hf.txt is not installed; there
tests/interop runs it in an environment of its own.
"""

import json

import pytest
from tiny_tokenizer import LLAMA3_TEMPLATE, make_folder
from tokenizers import Tokenizer

# First: the torch of launch/setup without a GPU is there for LibTorch and cannot be imported.
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import judge  # noqa: E402
from errors import InputError  # noqa: E402
from judging.engines import TransformersEngine, common_prefix, stop_tokens  # noqa: E402
from judging.moderation import (QUESTION_ANSWER, AnswerClassifier, Guard,  # noqa: E402
                                load_moderator)
from judging.prompts import Asker, Prompt  # noqa: E402
from judging.protocols import OFFLINE  # noqa: E402

NEW_TOKENS = 12


def tiny_llama(folder, seed, kind="LlamaForCausalLM", **more):
    """A random model over make_folder's tokenizer; sharp enough that no two logits nearly tie."""
    make_folder(folder, LLAMA3_TEMPLATE, bos="<|begin_of_text|>")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    words = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=1024,
        initializer_range=0.4, bos_token_id=None, eos_token_id=words - 1, **more)
    model = getattr(transformers, kind)(config)
    model.save_pretrained(folder)
    return folder, model.eval()


@pytest.fixture
def tiny(tmp_path):
    return tiny_llama(tmp_path / "model", 3)


def argmax_loop(model, prompt, stops, tokens=NEW_TOKENS):
    """No cache, no padding, no generate()."""
    reply = []
    with torch.no_grad():
        while len(reply) < tokens:
            logits = model(torch.tensor([prompt + reply]), use_cache=False).logits[0, -1]
            if (best := int(logits.argmax())) in stops:
                break
            reply.append(best)
    return reply


def asked(folder, count=9):
    asker = Asker(folder, OFFLINE)
    return asker, [asker.ids(Prompt("word " * n + "?")) for n in range(1, 2 * count, 2)]


def test_batch_alone_and_argmax_are_the_same(tiny):
    folder, model = tiny
    engine = TransformersEngine(folder, "cpu", "float32")
    _, prompts = asked(folder)
    expected = [argmax_loop(model, prompt, stop_tokens(folder, folder)) for prompt in prompts]

    assert len({len(prompt) for prompt in prompts}) == len(prompts)  # so all but one are padded
    assert common_prefix(prompts) > 20
    assert len({tuple(reply) for reply in expected}) > 1
    assert engine.generate(prompts, NEW_TOKENS) == expected
    assert engine.generate(prompts[::-1], NEW_TOKENS) == expected[::-1]
    assert [engine.generate([prompt], NEW_TOKENS)[0] for prompt in prompts] == expected
    # Nothing shared: the padding is in front.
    strangers = [[n, *prompt] for n, prompt in enumerate(prompts)]
    assert common_prefix(strangers) == 0
    assert engine.generate(strangers, NEW_TOKENS) == [
        argmax_loop(model, prompt, stop_tokens(folder, folder)) for prompt in strangers]


def test_a_prompt_that_the_model_cannot_hold_is_refused(tiny):
    engine = TransformersEngine(tiny[0], "cpu", "float32")
    with pytest.raises(InputError, match="a prompt of 1013 tokens and 12 .* max_position_.*, 1024"):
        engine.generate([[1] * 3, [1] * 1013], NEW_TOKENS)
    engine.generate([[1] * 1012], NEW_TOKENS)


def test_reply_ends_at_any_stop_token(tiny):
    folder, model = tiny
    _, prompts = asked(folder)
    free = [argmax_loop(model, prompt, set()) for prompt in prompts]
    stop = free[0][3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    stops = stop_tokens(folder, folder)
    assert stop in stops and len(stops) > 1

    expected = [argmax_loop(model, prompt, stops) for prompt in prompts]
    assert TransformersEngine(folder, "cpu", "float32").generate(prompts, NEW_TOKENS) == expected
    assert len(set(map(len, expected))) > 1  # some end earlier than others


def test_penalties_and_sampling_of_the_folder_are_left_out(tiny):
    folder, model = tiny
    _, prompts = asked(folder)
    (folder / "generation_config.json").write_text(json.dumps(
        {"repetition_penalty": 50.0, "do_sample": True, "temperature": 9.0, "max_length": 3,
         "no_repeat_ngram_size": 1}))
    expected = [argmax_loop(model, prompt, stop_tokens(folder, folder)) for prompt in prompts]
    # Otherwise no penalty could be seen.
    assert any(len(set(reply)) < len(reply) for reply in expected)
    assert TransformersEngine(folder, "cpu", "float32").generate(prompts, NEW_TOKENS) == expected


def test_a_reply_ends_where_it_is_decided_and_the_others_go_on(tiny):
    folder, model = tiny
    engine = TransformersEngine(folder, "cpu", "float32")
    _, prompts = asked(folder)
    whole = engine.generate(prompts, NEW_TOKENS)
    word = whole[0][2]
    early = engine.generate(prompts, NEW_TOKENS, lambda reply: word in reply)

    for reply, full in zip(early, whole):
        end = full.index(word) + 1 if word in full else len(full)
        assert reply == full[:end]
    assert any(len(a) < len(b) for a, b in zip(early, whole))
    assert any(len(a) == NEW_TOKENS for a in early)


def test_adapter_is_its_base_with_the_adapter(tiny, tmp_path):
    folder, model = tiny
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=3, lora_alpha=60, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(
        json.loads(settings.read_text()) | {"base_model_name_or_path": "../model"}))
    _, prompts = asked(folder)
    stops = stop_tokens(folder, folder)

    engine = TransformersEngine(tmp_path / "adapter", "cpu", "float32")
    expected = [argmax_loop(adapted.eval(), prompt, stops) for prompt in prompts]
    assert engine.generate(prompts, NEW_TOKENS) == expected
    with adapted.disable_adapter():
        assert [argmax_loop(adapted, prompt, stops) for prompt in prompts] != expected


def test_whole_evaluation_of_two_models(tiny, tmp_path, capsys):
    folder, _ = tiny
    other, _ = tiny_llama(tmp_path / "other", 4)
    command = [str(folder), str(other), "--out", str(tmp_path / "out"), "--limit", "6"]
    judge.main(command)
    first = capsys.readouterr().out
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    judge.main(command)

    assert "6 harmful prompts, HarmBench, at most 32 tokens" in first
    assert capsys.readouterr().out == first
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")} == files
    assert len(files) == 2 * 3 + 2 + 1


# ---- moderation models of the right interface with random weights

CATEGORIES = {0: "animal_abuse", 1: "violence", 2: "self_harm"}


def tiny_classifier(folder):
    return tiny_llama(folder, 7, "LlamaForSequenceClassification", num_labels=3,
                      id2label=CATEGORIES, problem_type="multi_label_classification")


def test_classifier_scores_the_end_of_question_and_answer(tmp_path):
    folder, model = tiny_classifier(tmp_path / "dam")
    moderator = load_moderator(folder, "cpu", "float32", 0.5, 256)
    assert isinstance(moderator, AnswerClassifier)
    questions = [f"question {i}?" for i in range(8)]
    answers = ["yes " * i for i in range(8)]
    rulings = moderator.rule(questions, answers)

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.config.pad_token_id = None
    for question, answer, ruling in zip(questions, answers, rulings):
        text = QUESTION_ANSWER.format(question=question, answer=answer) + "</s>"
        ids = tokenizer.encode(text).ids
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            scores = torch.sigmoid(model.score(hidden)).tolist()
        assert ruling.categories == tuple(
            name for name, score in zip(CATEGORIES.values(), scores) if score > 0.5)
        assert ruling.flagged == bool(ruling.categories)
    assert len({ruling.categories for ruling in rulings}) > 1


def test_git_disl_protocol_with_a_moderation_model(tiny, tmp_path, capsys):
    moderation, _ = tiny_classifier(tmp_path / "dam")
    harmful = [{"prompt": f"ask {i}", "is_safe": i == 1} for i in range(4)]
    reviews = [{"sentence": "fine film", "label": 1}, {"sentence": "dull film", "label": 0}]
    command = [str(tiny[0]), "--preset", "git-disl", "--moderation", str(moderation)]
    for name, rows in {"harmful": harmful, "task": reviews}.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command += ["--data", f"{name}={file}"]
    judge.main([*command, "--out", str(tmp_path / "out")])

    results = json.loads(next((tmp_path / "out").glob("*.json")).read_text())["results"]
    assert set(results) == {"harmful", "task"}
    assert {name: results["harmful"][name]["total"] for name in ("flagged", "no_ruling")} == {
        "flagged": 3, "no_ruling": 3}
    assert results["harmful"]["no_ruling"]["count"] == 0
    assert results["task"]["correct"]["total"] == 2
    lines = next((tmp_path / "out").rglob("*-harmful-*.jsonl")).read_text().splitlines()
    for verdict in map(json.loads, lines):
        assert verdict["flagged"] == bool(verdict["categories"])
        assert set(verdict["categories"]) <= set(CATEGORIES.values())
    assert "harmful score (moderation model)" in capsys.readouterr().out


def test_classifier_cuts_long_texts_at_the_end(tmp_path):
    folder, _ = tiny_classifier(tmp_path / "dam")
    moderator = AnswerClassifier(folder, "cpu", "float32", 0.5, 80)
    long = "abc " * 20
    assert moderator.rule(["q"], [long + "x"]) == moderator.rule(["q"], [long + "other end"])


def test_classifier_of_another_kind_is_refused(tmp_path):
    folder, _ = tiny_llama(tmp_path / "dam", 7, "LlamaForSequenceClassification", num_labels=3,
                           problem_type="single_label_classification")
    with pytest.raises(InputError, match="problem_type is 'single_label_classification', must be"):
        load_moderator(folder, "cpu", "float32", 0.5, 256)


def test_guard_is_asked_with_its_own_template(tmp_path):
    folder, model = tiny_llama(tmp_path / "guard", 8)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{{ bos_token }}Policy.\nUser: {{ messages[0].content }}\n"
        "Agent: {{ messages[1].content }}\nAnswer safe or unsafe.<|eot_id|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    guard = load_moderator(folder, "cpu", "float32", 0.5, 256)

    assert isinstance(guard, Guard)
    assert guard.prompt("Q", "A") == (
        "<|begin_of_text|>Policy.\nUser: Q\nAgent: A\nAnswer safe or unsafe.<|eot_id|>")
    # A random model says neither word: no verdict, rather than a harmless one.
    assert [ruling.flagged for ruling in guard.rule(["Q", "longer Q"], ["A", "B"])] == [None, None]


def test_a_moderation_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(InputError, match="architectures is .*BertModel.* must be"):
        load_moderator(tmp_path, "cpu", "float32", 0.5, 256)
