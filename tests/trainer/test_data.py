import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of a Hugging Face package

import gzip
import json
import logging
from pathlib import Path

import pytest

from tetrad.trainer import data
from tetrad.trainer.data import DataError, read
from tetrad.trainer.tokenizer import ByteTokenizer, load_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
BYTES = ByteTokenizer()
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")

ALPACA = {"prompt": "{instruction}\n{input}", "response": "{output}"}
DPO = {
    "prompt": "{conversations}",
    "chosen": "{chosen[value]}",
    "rejected": "{rejected[value]}",
}
GSM8K = {"prompt": "{question}", "response": "{answer}"}
SOLUTIONS = {
    "prompt": "{question}",
    "responses": [f"{{{solver}[solution]}}" for solver in SOLVERS],
    "grades": [f"{{{solver}[is_correct]}}" for solver in SOLVERS],
}


@pytest.fixture
def write(tmp_path):
    """Writes a file of this name, compressed if it says so, from text, bytes or rows."""

    def write_file(name: str, content) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            array = json.dumps(content, indent=1)
            lines = "".join(json.dumps(row) + "\n" for row in content)
            content = array if ".json" in name and ".jsonl" not in name else lines
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write_file


@pytest.fixture
def hf_datasets(tmp_path, monkeypatch):
    """The `datasets` package, with its cache in this test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


# Formats


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "json.gz"])
def test_json_files_give_their_rows(write, ending) -> None:
    rows = [{"prompt": "naïve", "response": "a\nb"}, {"prompt": "2", "response": "c\u2028d"}]
    assert read("demonstrations", write(f"d.{ending}", rows)) == rows


@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_blank_lines_separate_the_documents_of_a_text_file(write, ending) -> None:
    path = write(f"d.{ending}", "\n\none\n  more\r\n \t\n\n\ntwo\n")
    assert read("text", path) == [{"text": "one\n  more"}, {"text": "two"}]


def test_parquet_gives_its_rows_and_counts_them(tmp_path, hf_datasets) -> None:
    path = str(tmp_path / "d.parquet")
    messages = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": messages, "response": "a", "note": 1},
        {"prompt": messages, "response": "", "note": 2},
    ]
    hf_datasets.Dataset.from_list(rows).to_parquet(path)
    assert read("demonstrations", path, limit=1) == [{"prompt": messages, "response": "a"}]
    with pytest.raises(DataError) as error:
        read("demonstrations", path)
    assert str(error.value) == f"{path}:row 2: response is empty"


def test_a_data_set_is_read_by_name_configuration_and_split(hf_datasets, monkeypatch) -> None:
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"question": "1+1?", "answer": "2"}, {"question": "1+2?", "answer": ""}]

    monkeypatch.setattr(hf_datasets, "load_dataset", load_dataset)
    rows = read("demonstrations", "openai/gsm8k:main", fields=GSM8K, split="test", limit=1)
    assert rows == [{"prompt": "1+1?", "response": "2"}]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    with pytest.raises(DataError, match="^openai/gsm8k:row 2: response is empty$"):
        read("demonstrations", "openai/gsm8k", fields=GSM8K)
    assert asked[1] == (("openai/gsm8k", None), {"split": "train"})


def test_a_data_set_that_does_not_load_is_named(hf_datasets, monkeypatch, tmp_path) -> None:
    def load_dataset(*args, **kwargs):
        raise ConnectionError("cannot reach the hub\nlong story")

    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR0")
    with pytest.raises(DataError, match=f"^{bad}: ."):
        read("text", str(bad))
    monkeypatch.setattr(hf_datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="^who/what: cannot reach the hub$"):
        read("text", "who/what")


def test_each_kind_keeps_its_own_fields_alone(write) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi", "name": "Ann"},
    ]
    prompts = [
        {"prompt": messages, "user": "u1", "kind": "chat", "id": 7},
        {"prompt": "hi", "user": None},
    ]
    bare = [{"role": m["role"], "content": m["content"]} for m in messages]
    assert read("prompts", write("p.jsonl", prompts)) == [
        {"prompt": bare, "user": "u1", "kind": "chat"},
        {"prompt": "hi"},
    ]
    comparisons = [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "id": 7},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    assert read("comparisons", write("c.jsonl", comparisons)) == [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]},
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]},
    ]
    assert read("text", write("t.jsonl", [{"text": "", "id": 7}])) == [{"text": ""}]


def test_limit_stops_before_later_lines_are_looked_at(write) -> None:
    path = write("t.jsonl", '{"text": "a"}\n{"text": "b"}\nnot JSON\n')
    assert read("text", path, limit=2) == [{"text": "a"}, {"text": "b"}]


def test_blank_lines_count_as_lines_and_a_byte_order_mark_as_nothing(write) -> None:
    path = write("t.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": 3}\r\n')
    assert read("text", path, limit=1) == [{"text": "a"}]
    with pytest.raises(DataError) as error:
        read("text", path)
    assert str(error.value) == f"{path}:3: text is 3, not text"


# Malformed files


GOOD = {
    "demonstrations": {"prompt": "p", "response": "r"},
    "comparisons": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "prompts": {"prompt": "p"},
    "text": {"text": "t"},
}
RULE = data.ANSWER_RULE


def asked(content) -> dict:
    return {"prompt": content}


def ranked(responses, **numbers) -> dict:
    return {"prompt": "p", "responses": responses, **numbers}


MALFORMED = [
    ("text", ["a"], "the row is ['a'], not an object"),
    ("text", {}, "no text; the row has nothing"),
    ("text", {"text": None}, "no text; the row has text"),
    ("text", {"text": ["a"]}, "text is ['a'], not text"),
    ("text", {"text": "\ud800"}, "text holds half a surrogate pair, which is no character"),
    ("demonstrations", {"prompt": "p", "output": "r"}, "no response; the row has prompt, output"),
    ("demonstrations", {"response": "r"}, "no prompt; the row has response"),
    ("demonstrations", {"prompt": "p", "response": 3}, "response is 3, not text"),
    ("demonstrations", {"prompt": "p", "response": " \n"}, "response is empty"),
    ("prompts", asked(3), "prompt is 3, neither text nor a list of messages"),
    ("prompts", asked(""), "prompt is empty"),
    ("prompts", asked([]), "prompt is empty"),
    ("prompts", asked(["hi"]), "prompt[0] is not a message with role and content"),
    ("prompts", asked([{"role": "user"}]), "prompt[0] is not a message with role and content"),
    ("prompts", asked([{"content": "hi"}]), "prompt[0] is not a message with role and content"),
    (
        "prompts",
        asked([{"role": "user", "content": "hi"}, {"role": "gpt", "content": "hi"}]),
        "prompt[1] has role 'gpt', not one of system, user, assistant",
    ),
    ("prompts", asked([{"role": "user", "content": 3}]), "prompt[0]'s content is 3, not text"),
    ("prompts", {"prompt": "p", "user": 3}, "user is 3, not text"),
    ("comparisons", {"prompt": "p"}, f"the row has no answers; {RULE}"),
    ("comparisons", {"prompt": "p", "chosen": "a"}, f"the row has chosen; {RULE}"),
    ("comparisons", ranked(["a", "b"]), f"the row has responses; {RULE}"),
    (
        "comparisons",
        ranked(["a", "b"], ranks=[1, 2], chosen="a"),
        f"the row has chosen, ranks, responses; {RULE}",
    ),
    ("comparisons", {"prompt": "p", "chosen": "a", "rejected": ""}, "rejected is empty"),
    ("comparisons", ranked("ab", ranks=[1, 2]), "responses is 'ab', not a list"),
    ("comparisons", ranked(["a", "b"], ranks=1), "ranks is 1, not a list"),
    (
        "comparisons",
        ranked(["a"], ranks=[1]),
        "a comparison needs two responses or more, this has 1",
    ),
    ("comparisons", ranked(["a", "b", "c"], ranks=[1, 2]), "2 ranks for 3 responses"),
    ("comparisons", ranked(["a", ""], ranks=[1, 2]), "responses[1] is empty"),
    ("comparisons", ranked(["a", 3], ranks=[1, 2]), "responses[1] is 3, not text"),
    (
        "comparisons",
        ranked(["a", "b"], ranks=[0, 1]),
        "ranks[0] is 0; a rank is an integer, 1 is best",
    ),
    (
        "comparisons",
        ranked(["a", "b"], ranks=[1, 1.5]),
        "ranks[1] is 1.5; a rank is an integer, 1 is best",
    ),
    (
        "comparisons",
        ranked(["a", "b"], ranks=[True, 2]),
        "ranks[0] is True; a rank is an integer, 1 is best",
    ),
    (
        "comparisons",
        ranked(["a", "b"], grades=[float("nan"), 2]),
        "grades[0] is nan; a grade is a number, or true or false",
    ),
]


@pytest.mark.parametrize("kind, row, reason", MALFORMED)
def test_a_malformed_row_is_named_by_line_or_row_number(write, kind, row, reason) -> None:
    rows = [GOOD[kind], GOOD[kind], row]
    for name, place in (("d.jsonl", "3"), ("d.jsonl.gz", "3"), ("d.json", "row 3")):
        path = write(name, rows)
        with pytest.raises(DataError) as error:
            read(kind, path)
        assert str(error.value) == f"{path}:{place}: {reason}"


BAD_FILES = [
    ("d.jsonl", b'{"text": "a"}\n{"text": }\n', ":2: not JSON: Expecting value (column 10)"),
    ("d.json", b'[{"text": "a"},\n {"text": ]', ":2: not JSON: Expecting value (column 11)"),
    ("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ":2: not UTF-8: invalid start byte"),
    ("d.txt", b"a\n\nb\n\xc3", ":4: not UTF-8: unexpected end of data"),
    ("d.json", b'{"text": "a"}', ":1: not an array; one object a line belongs in a .jsonl file"),
    ("d.jsonl", b"", ": no rows"),
    ("d.json", b"[]", ": no rows"),
    ("d.txt", b"\n \n", ": no rows"),
    ("d.csv", b"a,b", ": unknown kind of file; its name must end in "),
]


@pytest.mark.parametrize("name, content, reason", BAD_FILES)
def test_a_bad_file_is_named(write, name, content, reason) -> None:
    path = write(name, content)
    with pytest.raises(DataError) as error:
        read("text", path)
    assert str(error.value).startswith(path + reason)


def test_json_beyond_what_python_parses_is_named(write) -> None:
    for value in ("9" * 5000, "[" * 100_000):  # int() stops at 4300 digits, the parser at a depth
        path = write("d.jsonl", '{"text": "a"}\n{"text": ' + value)
        with pytest.raises(DataError, match=f"^{path}:2: not usable JSON: "):
            read("text", path)


def test_damaged_compressed_files_are_named(write, tmp_path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for damaged in (b"plain text", whole[: len(whole) // 2], whole[:-8] + b"\0" * 8):
        path = tmp_path / "d.jsonl.gz"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"^{path}:\d+: damaged gzip file: "):
            read("text", path)


@pytest.mark.parametrize("name", ["no.jsonl", "no.json.gz", "no.txt", "no.parquet"])
def test_a_missing_file_is_named(tmp_path, name) -> None:
    with pytest.raises(DataError) as error:
        read("text", tmp_path / name)
    assert str(error.value) == f"{tmp_path / name}: no such file"


def test_a_folder_and_a_text_file_of_other_kinds_are_refused(write, tmp_path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(DataError, match="d.jsonl: Is a directory$"):
        read("text", tmp_path / "d.jsonl")
    with pytest.raises(DataError, match="d.txt: a .txt file holds text, not prompts$"):
        read("prompts", write("d.txt", "hi"))


# Templates


def test_alpaca_rows_become_demonstrations(write) -> None:
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": " 3 "},
        {"instruction": "Say {hi}.", "input": "", "output": "{hi}"},  # braces in data stay
    ]
    assert read("demonstrations", write("alpaca.json", rows), fields=ALPACA) == [
        {"prompt": "Add.\n1, 2", "response": "3"},
        {"prompt": "Say {hi}.", "response": "{hi}"},
    ]


def test_dpo_rows_become_comparisons(write) -> None:
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Why?")]
    row = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "chosen": {"from": "gpt", "value": "Because."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    path = write("dpo.json", [row])
    roles = ["system", "user", "assistant", "user"]
    conversation = [{"role": r, "content": t} for r, (_, t) in zip(roles, turns, strict=True)]
    answers = {"responses": ["Because.", "No."], "ranks": [1, 2]}
    assert read("comparisons", path, fields=DPO) == [{"prompt": conversation, **answers}]
    first = DPO | {"prompt": "{conversations[0][value]}\n\n{conversations[1][value]}"}
    assert read("comparisons", path, fields=first) == [{"prompt": "Be brief.\n\nHi", **answers}]


def test_gsm8k_solutions_become_ranked_comparisons(write) -> None:
    row = {"question": "1+1?", "ground_truth": "2"}
    for solver, is_correct in zip(SOLVERS, [False, True, False, True], strict=True):
        row[solver] = {"is_correct": is_correct, "solution": f"by {solver}"}
    assert read("comparisons", write("s.jsonl", [row]), fields=SOLUTIONS) == [
        {"prompt": "1+1?", "responses": [f"by {s}" for s in SOLVERS], "ranks": [2, 1, 2, 1]}
    ]


@pytest.mark.parametrize(
    "numbers, ranks",
    [
        ({"ranks": [3, 1, 1]}, [3, 1, 1]),
        ({"ranks": ["{r}", "1", "{r}"]}, [2, 1, 2]),
        ({"ranks": "{all}"}, [1, 2, 3]),
        ({"grades": ["{g}", "-1e3", "0.5"]}, [1, 2, 1]),  # dense: ties take one rank
        ({"grades": ["false", "TRUE", "{g}"]}, [3, 1, 2]),
    ],
)
def test_ranks_are_given_or_made_from_grades(write, numbers, ranks) -> None:
    # The row's own chosen and ranks must not meet the answers that are made.
    row = {"r": 2, "g": 0.5, "all": [1, 2, 3], "ranks": [9], "chosen": "x"}
    fields = {"prompt": "p", "responses": ["a", "b", "c"], **numbers}
    path = write("c.jsonl", [row])
    assert read("comparisons", path, fields=fields)[0]["ranks"] == ranks


def test_messages_may_be_built_and_other_fields_stay(write) -> None:
    fields = {"prompt": [{"role": "user", "content": "{q} "}], "kind": "math"}
    path = write("p.jsonl", [{"q": "1+1?", "user": "u1"}])
    assert read("prompts", path, fields=fields) == [
        {"prompt": [{"role": "user", "content": "1+1?"}], "user": "u1", "kind": "math"}
    ]


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{answer}", "no {answer}; the row has text, turns, null"),
        ("{turns[1][value]}", "no {turns[1][value]}; the row has text, turns, null"),
        ("{text[value]}", "no {text[value]}; the row has text, turns, null"),
        ("{text!s:d}", "Unknown format code 'd' for object of type 'str'"),
        ("{}", "no {}; the row has text, turns, null"),
        ("{null}", "{null} is None, not text"),
        ("{text} {turns}", "{turns} is [{'value': 3}], not text"),
        ("{text.upper}", "{text.upper} is <built-in met"),
        ("{turns}", "response is [{'value': 3}], not text"),
    ],
)
def test_a_template_that_does_not_suit_the_row_is_named(write, template, reason) -> None:
    path = write("d.jsonl", [{"text": "a", "turns": [{"value": 3}], "null": None}])
    with pytest.raises(DataError) as error:
        read("demonstrations", path, fields={"prompt": "{text}", "response": template})
    assert str(error.value).startswith(f"{path}:1: {reason}")


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("ranking", None, "kind is 'ranking'; it must be one of demonstrations, comparisons, "),
        ("text", {"prompt": "{a}"}, "fields has 'prompt'; it must be one of text"),
        ("prompts", {"user_id": "{a}"}, "fields has 'user_id'; it must be one of prompt, user, "),
        ("text", {"text": "{a"}, "fields['text'] is '{a': expected '}' before end of string"),
        ("text", {"text": None}, "fields['text'] is None: a field is made of format strings"),
        ("comparisons", {"chosen": "{a}"}, f"fields has chosen; {RULE}"),
    ],
)
def test_wrong_arguments_are_refused_before_the_file_is_opened(kind, fields, message) -> None:
    with pytest.raises(ValueError) as error:
        read(kind, "no.jsonl", fields=fields)
    assert str(error.value).startswith(message) and not isinstance(error.value, DataError)


def test_limit_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="^limit is 0; it must be at least 1$"):
        read("text", "no.jsonl", limit=0)


# Real files


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
def test_real_files_are_read_whole() -> None:
    alpaca = read("demonstrations", SHARED / "instruct-demo/alpaca_en_demo.json.gz", fields=ALPACA)
    assert len(alpaca) == 999
    assert alpaca[0]["prompt"] == "Describe a process of making crepes."
    dpo = read("comparisons", SHARED / "instruct-demo/dpo_en_demo.json.gz", fields=DPO)
    assert len(dpo) == 300 and sum(m["role"] == "system" for r in dpo for m in r["prompt"]) == 80
    assert len(read("text", SHARED / "instruct-demo/c4_demo.jsonl.gz")) == 300
    assert len(read("demonstrations", SHARED / "gsm8k/train.jsonl.gz", fields=GSM8K)) == 7473

    path = SHARED / "gsm8k/example_model_solutions.jsonl.gz"
    solutions = read("comparisons", path, fields=SOLUTIONS)
    assert len(solutions) == 1319 and {len(r["responses"]) for r in solutions} == {4}
    assert sum(len(set(r["ranks"])) == 1 for r in solutions) == 588  # all right or all wrong


# Tokenizers


TEXT = "naïve 日本語 🙂\n\ttab\0"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TRANSCRIPT = "system: Be brief.\nuser: Hi\nassistant:"


def test_bytes_round_trip() -> None:
    ids = BYTES.encode(TEXT)
    assert BYTES.decode(ids) == TEXT and max(ids) < BYTES.eos_id < BYTES.vocab_size
    assert BYTES.decode([*BYTES.encode("é")[:1], 97, 256, 300]) == "\ufffda"
    assert BYTES.render(TEXT) == TEXT and BYTES.render(MESSAGES) == TRANSCRIPT
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


@pytest.fixture
def save_tokenizer(tmp_path):
    """Saves a byte-level tokenizer without merges, which puts <s> before a text when it may."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def save(chat_template: str | None = None, **special: str) -> str:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<s>"])
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 256)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **special)
        fast.chat_template = chat_template
        fast.save_pretrained(tmp_path / "tokenizer")
        return str(tmp_path / "tokenizer")

    return save


def test_a_saved_tokenizer_has_the_same_interface(save_tokenizer) -> None:
    tokenizer = load_tokenizer(save_tokenizer(eos_token="</s>"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (258, 257)  # 256 bytes, <s>, </s>
    ids = tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode()) and 256 not in ids
    assert tokenizer.decode([256, *ids, 257]) == TEXT
    assert tokenizer.decode(tokenizer.encode("so , it 's")) == "so , it 's"  # spaces are kept
    assert tokenizer.render(TEXT) == TEXT and tokenizer.render(MESSAGES) == TRANSCRIPT


def test_messages_go_through_the_chat_template(save_tokenizer) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = load_tokenizer(save_tokenizer(template, eos_token="</s>"))
    assert tokenizer.render(MESSAGES) == "<system>Be brief.<user>Hi<assistant>"
    assert tokenizer.render("Hi") == "Hi"


def test_a_tokenizer_without_end_of_text_or_without_files_is_refused(
    save_tokenizer, tmp_path
) -> None:
    name = save_tokenizer()
    with pytest.raises(ValueError, match=f"^tokenizer '{name}' has no end-of-text token"):
        load_tokenizer(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"^tokenizer '{tmp_path}/empty': .*$"):
        load_tokenizer(str(tmp_path / "empty"))


# Tokens


def lines(caplog) -> list[str]:
    assert all(r.name == "tetrad" and r.levelno == logging.WARNING for r in caplog.records)
    return [r.getMessage() for r in caplog.records]


def test_demonstrations_end_with_eos_and_fit(caplog) -> None:
    rows = [{"prompt": "ab", "response": "c" * n} for n in (1, 2, 3)]
    demonstrations = data.tokenize_demonstrations(rows, BYTES, 5)
    assert demonstrations == [([97, 98], [99, 256]), ([97, 98], [99, 99, 256])]
    assert lines(caplog) == ["1 of 3 demonstrations left out: longer than 5 tokens"]
    with pytest.raises(DataError, match="^3 of 3 demonstrations left out: longer than 3 tokens$"):
        data.tokenize_demonstrations(rows, BYTES, 3)


def test_a_long_response_is_dropped_and_the_comparison_with_the_last_but_one(caplog) -> None:
    rows = [
        {"prompt": "p", "responses": ["aaa", "b", "c"], "ranks": [1, 2, 3]},
        {"prompt": "p", "responses": ["aaa", "b"], "ranks": [1, 2]},
        {"prompt": "p", "responses": ["d", "e"], "ranks": [1, 1]},
    ]
    assert data.tokenize_comparisons(rows, BYTES, 4) == [
        ([112], [[98, 256], [99, 256]], [2, 3]),
        ([112], [[100, 256], [101, 256]], [1, 1]),
    ]
    assert lines(caplog) == ["3 of 7 responses, 1 of 3 comparisons left out: longer than 4 tokens"]
    with pytest.raises(DataError, match="^7 of 7 responses, 3 of 3 comparisons left out"):
        data.tokenize_comparisons(rows, BYTES, 2)


def test_prompts_fit_after_rendering(caplog) -> None:
    rows = [{"prompt": "abc"}, {"prompt": [{"role": "user", "content": "Hi"}]}]
    rendered = BYTES.encode("user: Hi\nassistant:")
    assert data.tokenize_prompts(rows, BYTES, len(rendered)) == [[97, 98, 99], rendered]
    assert lines(caplog) == []
    assert data.tokenize_prompts(rows, BYTES, len(rendered) - 1) == [[97, 98, 99]]
    assert lines(caplog) == ["1 of 2 prompts left out: longer than 18 tokens"]
    with pytest.raises(DataError, match="^2 of 2 prompts left out: longer than 2 tokens$"):
        data.tokenize_prompts(rows, BYTES, 2)


def test_a_prompt_of_no_tokens_is_refused() -> None:
    class Deaf(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return []

    with pytest.raises(DataError, match="^the tokenizer makes no token of the prompt 'p'$"):
        data.tokenize_prompts([{"prompt": "p"}], Deaf(), 9)


def test_text_is_cut_into_full_blocks(caplog) -> None:
    rows = [{"text": "ab"}, {"text": "cde"}]  # 7 tokens with an eos after each document
    assert data.tokenize_text(rows, BYTES, 3) == [[97, 98, 256], [99, 100, 101]]
    assert lines(caplog) == ["1 of 7 tokens of text left out: less than a block of 3 tokens"]
    assert data.tokenize_text(rows, BYTES, 7) == [[97, 98, 256, 99, 100, 101, 256]]
    assert len(lines(caplog)) == 1
    with pytest.raises(DataError, match="^7 of 7 tokens of text left out: less than a block of 8"):
        data.tokenize_text(rows, BYTES, 8)
    with pytest.raises(ValueError, match="^length is 0"):
        data.tokenize_text(rows, BYTES, 0)


# Writing


@pytest.mark.parametrize("name", ["new/folder/d.jsonl", "d.jsonl.gz"])
def test_what_is_written_is_read_back(tmp_path, name) -> None:
    rows = [{"text": TEXT}, {"text": "two\nlines\u2028"}]
    data.write_jsonl(tmp_path / name, rows)
    assert read("text", tmp_path / name) == rows


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    data.write_jsonl(path, [{"text": "old"}])

    def rows():
        yield {"text": "new"}
        raise RuntimeError("out of rows")

    with pytest.raises(RuntimeError):
        data.write_jsonl(path, rows())
    assert read("text", path) == [{"text": "old"}] and list(tmp_path.iterdir()) == [path]
