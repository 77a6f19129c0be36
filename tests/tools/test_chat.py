"""The mask marks what the assistant says, for templates of several families."""

import json

import pytest
from chat import Chat
from conftest import decode, scored_runs
from errors import InputError
from tiny_tokenizer import LLAMA3_TEMPLATE, UNSTABLE_TEMPLATE, make_folder


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TWO_TURNS = [user("hi"), assistant("hi there"), user("and?"), assistant("bye  now")]


def test_smollm2_tokens_and_mask_are_those_of_its_template(smollm2_folder):
    tokens, mask = Chat(smollm2_folder).encode([{"role": "system", "content": "Be brief."},
                                                *TWO_TURNS])

    assert decode(smollm2_folder, tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhi there<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\nbye  now<|im_end|>\n")
    assert scored_runs(smollm2_folder, tokens, mask) == ["hi there<|im_end|>", "bye  now<|im_end|>"]


def test_smollm2_ids_of_a_short_chat(smollm2_folder):
    """Ids as transformers 4.57.1 apply_chat_template gives them for the same folder."""
    tokens, mask = Chat(smollm2_folder).encode(
        [{"role": "system", "content": "You are a helpful assistant."}, user("hi"),
         assistant("Yo there")])

    assert tokens == [1, 9690, 198, 2683, 359, 253, 5356, 11173, 30, 2, 198, 1, 4093, 198, 6004, 2,
                      198, 1, 520, 9531, 198, 73, 95, 665, 2, 198]
    assert mask == [0] * 21 + [1, 1, 1, 1, 0]


def test_llama_style_has_one_bos_and_scores_each_reply(llama):
    tokens, mask = llama.encode(TWO_TURNS)

    text = decode(llama.folder, tokens)
    assert text.startswith("<|begin_of_text|><|start_header_id|>user")
    assert text.count("<|begin_of_text|>") == 1
    assert scored_runs(llama.folder, tokens, mask) == ["hi there<|eot_id|>", "bye  now<|eot_id|>"]


def test_qwen_style_thought_of_the_last_reply_is_part_of_it(qwen):
    tokens, mask = qwen.encode(TWO_TURNS)

    assert scored_runs(qwen.folder, tokens, mask) == [
        "hi there<|im_end|>", "<think>\n\n</think>\n\nbye  now<|im_end|>"]


def test_reply_text_that_also_occurs_in_the_question_is_not_scored_there(llama):
    tokens, mask = llama.encode([user("say no"), assistant("no"), user("no"), assistant("no")])

    assert scored_runs(llama.folder, tokens, mask) == ["no<|eot_id|>", "no<|eot_id|>"]
    assert mask[-3:] == [1, 1, 1]


def test_template_that_rewrites_earlier_text_is_refused(tmp_path):
    chat = Chat(make_folder(tmp_path, UNSTABLE_TEMPLATE))

    chat.encode(TWO_TURNS[:2])  # one turn is fine
    with pytest.raises(InputError, match=r"message 1: .*not prefix-stable"):
        chat.encode(TWO_TURNS)


def test_template_that_leaves_the_end_of_a_reply_open_is_refused(tmp_path):
    template = "{% for message in messages %}{{ message.content + '\n' }}{% endfor %}"
    chat = Chat(make_folder(tmp_path, template))

    with pytest.raises(InputError, match="message 1: .*special token"):
        chat.encode([user("a"), assistant("b")])


def test_exception_raised_by_the_template_is_passed_on(tmp_path):
    chat = Chat(make_folder(tmp_path, UNSTABLE_TEMPLATE))

    with pytest.raises(InputError, match="only user and assistant"):
        chat.encode([{"role": "system", "content": "x"}, *TWO_TURNS[:2]])


def test_template_cannot_reach_python_internals(tmp_path):
    chat = Chat(make_folder(tmp_path, "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}"))

    with pytest.raises(InputError):
        chat.render([user("a")])


def test_generation_tags_are_accepted(tmp_path):
    template = LLAMA3_TEMPLATE.replace("{{- bos_token }}", "{% generation %}{% endgeneration %}")
    chat = Chat(make_folder(tmp_path, template))

    tokens, mask = chat.encode(TWO_TURNS[:2])
    assert scored_runs(chat.folder, tokens, mask) == ["hi there<|eot_id|>"]


def test_template_file_wins_over_the_config_and_changes_the_hash(tmp_path, llama):
    folder = make_folder(tmp_path / "other", "{{ raise_exception('not this one') }}", bos="")
    (folder / "chat_template.jinja").write_text(LLAMA3_TEMPLATE)

    assert Chat(folder).template_sha256 == llama.template_sha256
    (folder / "chat_template.jinja").write_text(LLAMA3_TEMPLATE + "{# #}")
    assert Chat(folder).template_sha256 != llama.template_sha256


def test_folder_without_a_template_is_refused(tmp_path):
    folder = make_folder(tmp_path, LLAMA3_TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))

    with pytest.raises(InputError, match="no chat template"):
        Chat(folder)


def test_candidates_of_a_choice_share_the_prompt_and_have_no_end_of_turn(smollm2_folder):
    chat = Chat(smollm2_folder)

    first = chat.encode_choice([user("Is it good?")], "I'm sorry")
    second = chat.encode_choice([user("Is it good?")], "Sure")

    assert scored_runs(smollm2_folder, *first) == ["I'm sorry"]
    assert scored_runs(smollm2_folder, *second) == ["Sure"]
    prompt = first[1].index(1)
    assert first[0][:prompt] == second[0][:prompt]
    assert decode(smollm2_folder, first[0][:prompt]).endswith("<|im_start|>assistant\n")


def test_candidate_that_merges_with_the_prompt_is_refused(smollm2_folder):
    with pytest.raises(InputError, match="changes the tokens of the prompt"):
        Chat(smollm2_folder).encode_choice([user("Is it good?")], "\n\nSure")


def test_a_tokenizer_that_the_library_refuses_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json: cannot be read as a tokenizer"):
        Chat(tmp_path)
