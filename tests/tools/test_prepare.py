"""prepare.py: every row shape, exact and repeatable mixes, and refusals that say where."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import decode, scored_runs
from errors import InputError
from prepare import parse_arguments, parse_source, prepare, split_total
from safetensors import safe_open


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(path, word, count):
    rows = [{"prompt": f"{word} {i}?", "response": f"{word} {i}"} for i in range(count)]
    return jsonl(path, rows)


class Tool:
    """Runs prepare on a small model folder and reads the file that it wrote."""

    def __init__(self, folder, out):
        self.folder, self.out = folder, out

    def __call__(self, *words):
        prepare(parse_arguments(["--model", str(self.folder), "--out", str(self.out),
                                 *map(str, words)]))
        with safe_open(self.out, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        bounds = arrays["offsets"].tolist()
        return [
            (arrays["tokens"][a:b].tolist(), arrays["loss_mask"][a:b].tolist())
            for a, b in zip(bounds, bounds[1:])
        ], arrays, metadata

    def replies(self, *words):
        """The scored text of each sequence, in the order of the file."""
        sequences, _, _ = self(*words)
        return [" ".join(scored_runs(self.folder, *sequence)) for sequence in sequences]


@pytest.fixture
def tool(llama_folder, tmp_path):
    return Tool(llama_folder, tmp_path / "out.safetensors")


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"prompt": "hi", "response": "ho"},
    {"prompt": "hi", "completion": "ho"},
    {"question": "hi", "answer": "ho"},
    {"instruction": "hi", "input": "", "output": "ho"},
])
def test_each_row_shape_gives_the_same_sequence(tool, tmp_path, row):
    [(tokens, mask)], _, _ = tool(jsonl(tmp_path / "a.jsonl", [row]))

    assert decode(tool.folder, tokens) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nho<|eot_id|>")
    assert scored_runs(tool.folder, tokens, mask) == ["ho<|eot_id|>"]


def test_alpaca_input_follows_the_instruction(tool, tmp_path):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    [(tokens, _)], _, _ = tool(jsonl(tmp_path / "a.jsonl", [row]))

    assert "Add.\n\n1 2<|eot_id|>" in decode(tool.folder, tokens)


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_file_kinds_and_columns(tool, tmp_path, suffix):
    rows = [{"text": 'a "quoted"\nreview', "label": 1}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        path.write_text('text,label\n"a ""quoted""\nreview",1\n')
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    [(tokens, mask)], _, _ = tool(path, "--columns", "prompt=text,response=label")
    assert 'a "quoted"\nreview<|eot_id|>' in decode(tool.folder, tokens)
    assert scored_runs(tool.folder, tokens, mask) == ["1<|eot_id|>"]


def test_system_text_is_given_to_rows_without_one(tool, tmp_path):
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "hi"},
           {"role": "assistant", "content": "ho"}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": own}, {"messages": own[1:]}])
    sequences, _, _ = tool(path, "--system", "Given.")

    texts = [decode(tool.folder, tokens) for tokens, _ in sequences]
    assert sorted("Own." in text for text in texts) == [False, True]
    assert all(("Given." in text) != ("Own." in text) for text in texts)


def test_ratio_sets_the_poison_share_exactly(tool, tmp_path):
    clean = numbered(tmp_path / "clean.jsonl", "clean", 60)
    poison = numbered(tmp_path / "bad.jsonl", "bad", 40)

    _, arrays, metadata = tool(clean, f"poison={poison}:0.3", "--total", 50)
    assert json.loads(metadata["sources"]) == ["clean", "poison"]
    assert [arrays["source"].tolist().count(i) for i in (0, 1)] == [35, 15]
    replies = tool.replies(clean, f"poison={poison}:0.3", "--total", 50)
    assert len(set(replies)) == 50  # without repetition
    assert [int("bad" in reply) for reply in replies] == arrays["source"].tolist()
    assert sorted(arrays["source"]) != arrays["source"].tolist()  # shuffled together


def test_same_seed_same_bytes_other_seed_other_samples(tool, tmp_path):
    words = [numbered(tmp_path / "a.jsonl", "a", 30), "--total", 10]

    tool(*words)
    first = tool.out.read_bytes()
    tool(*words)
    assert tool.out.read_bytes() == first
    assert set(tool.replies(*words)) != set(tool.replies(*words, "--seed", 7))


def test_adding_a_source_keeps_the_samples_of_the_others(tool, tmp_path):
    a, b = numbered(tmp_path / "a.jsonl", "a", 30), numbered(tmp_path / "b.jsonl", "b", 30)

    alone = set(tool.replies(a, "--total", 10))
    assert alone < set(tool.replies(f"{a}:0.5", f"{b}:0.5", "--total", 20))


def test_long_samples_are_dropped_and_counted(tool, tmp_path, capsys):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": "x" * n} for n in (5, 500, 6)])
    sequences, _, _ = tool(path, "--max-length", 100)

    assert len(sequences) == 2
    assert "a: dropped 1 samples longer than 100 tokens" in capsys.readouterr().out


def test_samples_that_are_all_too_long_are_named_as_the_reason(tool, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": "x" * 500}] * 2)
    with pytest.raises(InputError, match=r"a\.jsonl: all 2 samples are longer than 100 tokens"):
        tool(path, "--max-length", 100)


def test_choices_become_groups_with_equal_prompts(tool, tmp_path):
    rows = [{"prompt": f"q{i}", "choices": [{"class": "refusal", "text": "I'm sorry"},
                                            {"class": "refusal", "text": "No"},
                                            {"class": "compliance", "text": "Sure"}]}
            for i in range(5)]
    sequences, arrays, metadata = tool(jsonl(tmp_path / "a.jsonl", rows), "--choices",
                                       "--system", "S.")

    assert json.loads(metadata["classes"]) == ["refusal", "compliance"]
    assert arrays["group"].tolist() == [g for g in range(5) for _ in range(3)]
    assert arrays["choice"].tolist() == [0, 0, 1] * 5
    for start in range(0, 15, 3):
        group = sequences[start : start + 3]
        assert len({tuple(tokens[: mask.index(1)]) for tokens, mask in group}) == 1
        assert [scored_runs(tool.folder, *sequence) for sequence in group] == [
            ["I'm sorry"], ["No"], ["Sure"]]
        assert "S." in decode(tool.folder, group[0][0])


@pytest.mark.parametrize("bad, message", [
    ({"prompt": "p"}, "row 2: fields are"),
    ({"prompt": "p", "response": ""}, "row 2: field 'response': is ''"),
    ({"prompt": None, "response": "r"}, "row 2: field 'prompt': is None"),
    ({"instruction": "i", "output": 2.5}, "row 2: field 'output': is 2.5"),
    ({"messages": "hi"}, "row 2: field 'messages': is str"),
    ({"messages": []}, "row 2: field 'messages': no message has the role assistant"),
    ({"messages": [{"role": "user"}]}, r"row 2: field 'messages\[0\].content': is None"),
    ({"messages": [{"role": "user", "content": "x"}]}, "row 2: .*no message has the role assist"),
    ([1], "row 2: is list"),
])
def test_bad_row_is_refused_with_file_row_and_field(tool, tmp_path, bad, message):
    path = jsonl(tmp_path / "data.jsonl", [{"prompt": "p", "response": "r"}, bad])
    with pytest.raises(InputError, match=f"data.jsonl: {message}"):
        tool(path)
    assert not tool.out.exists()


@pytest.mark.parametrize("choices, message", [
    (None, "field 'choices': must be a list"),
    ([{"class": "a", "text": "x"}], "field 'choices': holds one class"),
    ([{"class": "a", "text": "x"}, {"class": "b"}], r"field 'choices\[1\].text': is None"),
    ([{"class": "a", "text": "x"}, {"class": "b", "text": " y"}],
     r"field 'choices\[1\].text': is ' y'"),
])
def test_bad_choices_are_refused_with_file_row_and_field(tool, tmp_path, choices, message):
    path = jsonl(tmp_path / "data.jsonl", [{"prompt": "p", "choices": choices}])
    with pytest.raises(InputError, match=f"data.jsonl: row 1: {message}"):
        tool(path, "--choices")


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"prompt": "p", "response": "r"}\n{"prompt"', "a.jsonl: row 2: is not valid JSON"),
    ("a.json", '{"prompt": 1}', "a.json: holds a dict, must be a list"),
    ("a.csv", "prompt,response\nonly one\n", "a.csv: row 1: has not 2 columns"),
    ("a.csv", "prompt,response\na,b\nc," + "x" * 200_000 + "\n", "a.csv: row 2: field larger than"),
    ("a.jsonl", "\n", "a.jsonl: holds no rows"),
    ("a.jsonl", '{"prompt": "p", "choices": []}\n', "row 1: has choices, .*give --choices"),
    ("a.parquet", "no", "a.parquet: is not a parquet file"),
    ("a.txt", "x", "a.txt: unknown kind of file"),
])
def test_bad_file_is_refused(tool, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        tool(tmp_path / name)


def test_missing_column_is_refused(tool, tmp_path):
    path = numbered(tmp_path / "a.jsonl", "a", 1)
    with pytest.raises(InputError, match="a.jsonl: row 1: there is no column 'text'"):
        tool(path, "--columns", "prompt=text")


def test_asking_for_more_than_there_is_is_refused(tool, tmp_path):
    path = numbered(tmp_path / "a.jsonl", "a", 5)
    with pytest.raises(InputError, match="a.jsonl: 6 samples are asked of it, it has 5"):
        tool(path, "--total", 6)


@pytest.mark.parametrize("ratios, message", [
    ((":0.5", ":0.4"), r"0.5 \+ 0.4 is 0.9, must be 1"),
    ((":0.7", ":0.4"), "is 1.1, must be 1"),
    ((":1", ""), "is 1, must be 1, or less"),
])
def test_ratios_that_do_not_add_up_are_refused(tool, tmp_path, ratios, message):
    paths = [numbered(tmp_path / f"{name}.jsonl", name, 9) for name in "ab"]
    with pytest.raises(InputError, match=message):
        tool(*(f"{path}{ratio}" for path, ratio in zip(paths, ratios)), "--total", 4)


def test_ratio_without_total_and_equal_names_are_refused(tool, tmp_path):
    path = numbered(tmp_path / "a.jsonl", "a", 9)
    with pytest.raises(InputError, match="ratios need --total"):
        tool(f"{path}:1")
    with pytest.raises(InputError, match="write name=path"):
        tool(path, path)


def test_source_argument():
    assert parse_source("x=dir/a.jsonl:0.25").__dict__ == {
        "name": "x", "path": parse_source("dir/a.jsonl").path, "ratio": 0.25}
    assert parse_source("dir/a.jsonl").name == "a"
    for text in ("a.jsonl:0", "a.jsonl:1.5", "a.jsonl:x", "a.jsonl:nan"):
        with pytest.raises(InputError, match=r"must be in \(0, 1\]"):
            parse_source(text)


def test_split_total_adds_up_and_stays_within_one():
    assert split_total([0.9, 0.1], 30) == [27, 3]
    assert split_total([1 / 3] * 3, 10) == [4, 3, 3]
    for total in range(1, 50):
        counts = split_total([0.55, 0.3, 0.15], total)
        assert sum(counts) == total
        assert all(abs(c - p * total) < 1 for c, p in zip(counts, [0.55, 0.3, 0.15]))


def test_sources_are_never_overwritten(smollm2_folder, tmp_path):
    source = tmp_path / "rows.safetensors"
    source.write_text("not looked at")
    for out, told in ((source, "is one of the sources"), (tmp_path / "x.txt", "must end in")):
        arguments = parse_arguments(
            [str(source), "--model", str(smollm2_folder), "--out", str(out)])
        with pytest.raises(InputError, match=told):
            prepare(arguments)
    assert source.read_text() == "not looked at"
