"""Training data: rows read from files or the Hugging Face hub, checked, and turned into tokens.

A row is used or refused with its file, line and reason; an example that is too long is left out
and counted in the log. Nothing else happens to data on its way in.
"""

import gzip
import json
import logging
import math
import os
import string
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from reprlib import repr as short  # a value in a message: at most a few dozen characters
from typing import Any, NamedTuple

from tetrad.trainer.tokenizer import Prompt, Tokenizer

log = logging.getLogger("tetrad")

ANSWERS = ("responses", "ranks", "grades", "chosen", "rejected")
REQUIRED = {
    "demonstrations": ("prompt", "response"),
    "comparisons": ("prompt",),
    "prompts": ("prompt",),
    "text": ("text",),
}
OPTIONAL = {"demonstrations": (), "comparisons": ANSWERS, "prompts": ("user", "kind"), "text": ()}
ANSWER_SETS = ({"responses", "ranks"}, {"responses", "grades"}, {"chosen", "rejected"})
ANSWER_RULE = "a comparison has responses and ranks, responses and grades, or chosen and rejected"
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class DataError(ValueError):
    """Data that cannot be used, in one line: "FILE:LINE: reason", "FILE:row N: reason" where a
    file has no lines (arrays, parquet, the hub), or "FILE: reason" for the whole file."""


def read(
    kind: str,
    path: str | os.PathLike[str] | None,
    *,
    fields: Mapping[str, Any] | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of `path`, at most `limit` of them, with our field names.

    demonstrations  {"prompt", "response"}
    comparisons     {"prompt", "responses": [...], "ranks": [...]}, rank 1 is best, equal is a tie;
                    a row {"prompt", "chosen", "rejected"} becomes two responses ranked 1 and 2
    prompts         {"prompt"}, and "user" and "kind" where the row has them
    text            {"text"}
    A prompt is text or a list of {"role", "content"} messages.

    path: .jsonl, .json (an array) or .txt (kind "text": documents between blank lines), each also
    with .gz; .parquet; else the name of a Hugging Face data set ("name" or "name:configuration"),
    of which `split` is read. Blank lines in .jsonl hold no row.

    fields makes our fields from the file's by format strings over the row, for instance
    {"prompt": "{instruction}\\n{input}", "response": "{output}"}; the results are stripped. Lists
    and messages may be built of them ({"responses": ["{a}", "{b[text]}"], "ranks": [1, 2]}), and a
    string that is one field alone keeps a list as it is: {"prompt": "{conversations}"}, where the
    from/value messages of ShareGPT become role/content. For comparisons "grades" may stand in for
    "ranks": numbers or true/false, higher is better, equal is a tie. A field that is not named
    keeps the row's own value, but naming one of a comparison's answers hides all of the row's.

    Raises DataError for what cannot be read or used, ValueError for a bad argument.
    """
    if kind not in REQUIRED:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(REQUIRED)}")
    if path is None:
        raise ValueError(f"the path of the {kind} is missing")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    fields = fields or {}
    _check_fields(kind, fields)
    hidden = ANSWERS if fields.keys() & set(ANSWERS) else ()

    rows = []
    for where, row in islice(_rows(kind, os.fspath(path), split), limit):
        try:
            if not isinstance(row, Mapping):
                raise DataError(f"the row is {short(row)}, not an object")
            ours = {k: v for k, v in row.items() if v is not None and k not in hidden}
            ours |= {field: _made(field, template, row) for field, template in fields.items()}
            for field in REQUIRED[kind]:
                if field not in ours:
                    raise DataError(f"no {field}; the row has {', '.join(row) or 'nothing'}")
            rows.append(_checked(kind, ours))
        except ValueError as error:  # a format that does not suit the value is a ValueError too
            raise DataError(f"{where}: {error}") from None
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


# Files to rows: pairs of a place, such as "FILE:LINE", and whatever stands there.


def _rows(kind: str, path: str, split: str) -> Iterator[tuple[str, Any]]:
    name = path.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return _jsonl_rows(path)
    if name.endswith(".json"):
        return _json_rows(path)
    if name.endswith(".txt"):
        if kind != "text":
            raise DataError(f"{path}: a .txt file holds text, not {kind}")
        return _documents(path)
    if os.path.isfile(path) and not path.endswith(".parquet"):
        endings = ".jsonl, .json, .txt (also with .gz) or .parquet"
        raise DataError(f"{path}: unknown kind of file; its name must end in {endings}")
    return _dataset_rows(path, split)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines, of UTF-8 text that may be compressed."""
    n = 0
    try:
        # Bytes end a line at \n alone; text mode would also end it inside some JSON strings.
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            for n, line in enumerate(file, 1):
                yield n, line.decode("utf-8-sig").rstrip("\r\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{n}: not UTF-8: {error.reason}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{n + 1}: damaged gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _jsonl_rows(path: str) -> Iterator[tuple[str, Any]]:
    for n, line in _lines(path):
        if line.strip():
            yield f"{path}:{n}", _parsed(line, path, n)


def _json_rows(path: str) -> Iterator[tuple[str, Any]]:
    array = _parsed("\n".join(line for _, line in _lines(path)), path, 1)
    if not isinstance(array, list):
        raise DataError(f"{path}:1: not an array; one object a line belongs in a .jsonl file")
    for n, row in enumerate(array, 1):
        yield f"{path}:row {n}", row


def _parsed(text: str, path: str, line: int) -> Any:
    """The JSON value that `text` holds, whose first line is line `line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{path}:{line + error.lineno - 1}"
        raise DataError(f"{at}: not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        raise DataError(f"{path}:{line}: not usable JSON: {error}") from None


def _documents(path: str) -> Iterator[tuple[str, Any]]:
    lines = (line for _, line in _lines(path))
    for has_text, document in groupby(lines, key=lambda line: bool(line.strip())):
        if has_text:
            yield path, {"text": "\n".join(document)}


def _dataset_rows(path: str, split: str) -> Iterator[tuple[str, Any]]:
    is_file = path.endswith(".parquet")
    if is_file and not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    import datasets  # seconds to import

    name, _, configuration = path.partition(":")
    try:
        if is_file:
            table = datasets.load_dataset("parquet", data_files=path, split="train")
        else:
            table = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise DataError(f"{path}: {reason}") from error
    for n, row in enumerate(table, 1):
        yield f"{path}:row {n}", row


# The file's fields to ours.


class _Formatter(string.Formatter):
    """str.format over one row, for any field name, refusing what is neither text nor a number."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[str(key)]

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value = self.lookup(field_name, kwargs)
        if not isinstance(value, str | int | float):
            raise DataError(f"{{{field_name}}} is {short(value)}, not text")
        return value, field_name

    def lookup(self, field_name: str, row: Mapping[str, Any]) -> Any:
        """What `field_name`, as in "chosen[value]", is in this row: of any type."""
        try:
            return super().get_field(field_name, (), row)[0]
        except (LookupError, TypeError, AttributeError, ValueError):
            has = ", ".join(row) or "nothing"
            raise DataError(f"no {{{field_name}}}; the row has {has}") from None


_formatter = _Formatter()


def _check_fields(kind: str, fields: Mapping[str, Any]) -> None:
    for field, template in fields.items():
        valid = REQUIRED[kind] + OPTIONAL[kind]
        if field not in valid:
            raise ValueError(f"fields has {field!r}; it must be one of {', '.join(valid)}")
        try:
            _check_template(template)
        except ValueError as error:
            raise ValueError(f"fields[{field!r}] is {template!r}: {error}") from None
    answers = fields.keys() & set(ANSWERS)
    if answers and answers not in ANSWER_SETS:
        raise ValueError(f"fields has {_list(answers)}; {ANSWER_RULE}")


def _check_template(template: Any) -> None:
    """Raises ValueError unless every leaf of `template` is a format string or a number."""
    if isinstance(template, str):
        list(_formatter.parse(template))
    elif isinstance(template, Mapping | Sequence):
        for part in template.values() if isinstance(template, Mapping) else template:
            _check_template(part)
    elif not isinstance(template, int | float):
        raise ValueError("a field is made of format strings")


def _made(field: str, template: Any, row: Mapping[str, Any]) -> Any:
    """Our field, made of `row` by its template."""
    value = _filled(template, row)
    if field in ("ranks", "grades") and isinstance(value, list):
        return [_number(v) for v in value]
    return value


def _filled(template: Any, row: Mapping[str, Any]) -> Any:
    if isinstance(template, Mapping):
        return {key: _filled(part, row) for key, part in template.items()}
    if isinstance(template, str):
        match list(_formatter.parse(template)):
            case [("", str(name), "", None)]:
                value = _formatter.lookup(name, row)
                if isinstance(value, list):
                    return [_from_sharegpt(v) for v in value]
        return _formatter.vformat(template, (), row).strip()
    if isinstance(template, Sequence):
        return [_filled(part, row) for part in template]
    return template


def _from_sharegpt(value: Any) -> Any:
    if not (isinstance(value, Mapping) and {"from", "value"} <= value.keys()):
        return value
    role = SHAREGPT_ROLES.get(str(value["from"]), value["from"])
    return {"role": role, "content": value["value"]}


def _number(value: Any) -> Any:
    """The number or truth value that a filled template spells; anything else as it is."""
    try:
        return json.loads(value.lower()) if isinstance(value, str) else value
    except ValueError:
        return value


# Our fields, checked. These raise DataError with the reason alone; `read` puts the place before it.


def _checked(kind: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with the fields of its kind and no others; `row` has those that are required."""
    if kind == "text":
        return {"text": _text("text", row["text"])}
    checked: dict[str, Any] = {"prompt": _prompt(row["prompt"])}
    if kind == "demonstrations":
        checked["response"] = _nonempty("response", row["response"])
    elif kind == "comparisons":
        checked["responses"], checked["ranks"] = _answers(row)
    else:
        checked |= {k: _text(k, row[k]) for k in ("user", "kind") if k in row}
    return checked


def _answers(row: dict[str, Any]) -> tuple[list[str], list[int]]:
    answers = row.keys() & set(ANSWERS)
    if answers not in ANSWER_SETS:
        raise DataError(f"the row has {_list(answers) or 'no answers'}; {ANSWER_RULE}")
    if "chosen" in answers:
        return [_nonempty(key, row[key]) for key in ("chosen", "rejected")], [1, 2]

    key = "ranks" if "ranks" in answers else "grades"
    responses, numbers = row["responses"], row[key]
    for name, value in (("responses", responses), (key, numbers)):
        if not isinstance(value, list):
            raise DataError(f"{name} is {short(value)}, not a list")
    if len(responses) < 2:
        raise DataError(f"a comparison needs two responses or more, this has {len(responses)}")
    if len(numbers) != len(responses):
        raise DataError(f"{len(numbers)} {key} for {len(responses)} responses")
    responses = [_nonempty(f"responses[{i}]", text) for i, text in enumerate(responses)]
    return responses, _ranks(numbers) if key == "ranks" else _ranks_of_grades(numbers)


def _ranks(ranks: list[Any]) -> list[int]:
    for i, rank in enumerate(ranks):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise DataError(f"ranks[{i}] is {short(rank)}; a rank is an integer, 1 is best")
    return ranks


def _ranks_of_grades(grades: list[Any]) -> list[int]:
    for i, grade in enumerate(grades):
        if not isinstance(grade, int | float) or not math.isfinite(grade):
            raise DataError(f"grades[{i}] is {short(grade)}; a grade is a number, or true or false")
    best_first = sorted(set(grades), reverse=True)
    return [best_first.index(grade) + 1 for grade in grades]


def _prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return _nonempty("prompt", prompt)
    if not isinstance(prompt, list):
        raise DataError(f"prompt is {short(prompt)}, neither text nor a list of messages")
    if not prompt:
        raise DataError("prompt is empty")
    for i, message in enumerate(prompt):
        if not (isinstance(message, Mapping) and {"role", "content"} <= message.keys()):
            raise DataError(f"prompt[{i}] is not a message with role and content")
        if message["role"] not in ROLES:
            role = short(message["role"])
            raise DataError(f"prompt[{i}] has role {role}, not one of {', '.join(ROLES)}")
        _text(f"prompt[{i}]'s content", message["content"])
    return [{"role": m["role"], "content": m["content"]} for m in prompt]


def _nonempty(name: str, value: Any) -> str:
    if not _text(name, value).strip():
        raise DataError(f"{name} is empty")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {short(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} holds half a surrogate pair, which is no character") from None
    return value


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


# Rows to tokens.


class Demonstration(NamedTuple):
    prompt: list[int]
    response: list[int]  # ends with eos


class Comparison(NamedTuple):
    prompt: list[int]
    responses: list[list[int]]  # two or more, each ends with eos
    ranks: list[int]  # one per response, 1 is best, equal is a tie


def tokenize_demonstrations(
    rows: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, max_length: int
) -> list[Demonstration]:
    """Demonstrations of at most max_length tokens, prompt, response and eos together.

    Those longer are left out, with one log line; DataError when none is left.
    """
    every = [
        Demonstration(_prompt_ids(row, tokenizer), _response_ids(row["response"], tokenizer))
        for row in rows
    ]
    kept = [d for d in every if len(d.prompt) + len(d.response) <= max_length]
    _report(kept, len(every) - len(kept), f"{len(every)} demonstrations", max_length)
    return kept


def tokenize_comparisons(
    rows: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, max_length: int
) -> list[Comparison]:
    """Comparisons whose prompt with any one response and eos is at most max_length tokens.

    A response that makes it longer is left out, and with it the comparison if fewer than two
    remain: one log line counts both. DataError when no comparison is left.
    """
    kept, n_rows, n_responses = list[Comparison](), 0, 0
    for row in rows:
        n_rows, n_responses = n_rows + 1, n_responses + len(row["responses"])
        prompt = _prompt_ids(row, tokenizer)
        responses = [_response_ids(text, tokenizer) for text in row["responses"]]
        fit = [i for i, ids in enumerate(responses) if len(prompt) + len(ids) <= max_length]
        if len(fit) >= 2:
            ranks = [row["ranks"][i] for i in fit]
            kept.append(Comparison(prompt, [responses[i] for i in fit], ranks))
    lost = n_responses - sum(len(c.responses) for c in kept)
    total = f"{n_responses} responses, {n_rows - len(kept)} of {n_rows} comparisons"
    _report(kept, lost, total, max_length)
    return kept


def tokenize_prompts(
    rows: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, max_length: int
) -> list[list[int]]:
    """Prompts of at most max_length tokens. Those longer are left out, with one log line;
    DataError when none is left."""
    every = [_prompt_ids(row, tokenizer) for row in rows]
    kept = [prompt for prompt in every if len(prompt) <= max_length]
    _report(kept, len(every) - len(kept), f"{len(every)} prompts", max_length)
    return kept


def tokenize_text(
    rows: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, length: int
) -> list[list[int]]:
    """Blocks of exactly `length` tokens, cut from all documents in order, each ended by eos.

    The tail that fills no block is left out, with one log line; DataError when no block is full.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it must be at least 1")
    tokens = list[int]()
    for row in rows:
        tokens += [*tokenizer.encode(row["text"]), tokenizer.eos_id]
    tail = len(tokens) % length
    blocks = [tokens[i : i + length] for i in range(0, len(tokens) - tail, length)]
    line = f"{tail} of {len(tokens)} tokens of text left out: less than a block of {length} tokens"
    if not blocks:
        raise DataError(line)
    if tail:
        log.warning(line)
    return blocks


def _prompt_ids(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode(tokenizer.render(row["prompt"]))
    if not ids:  # the first response token would have nothing to be predicted from
        raise DataError(f"the tokenizer makes no token of the prompt {short(row['prompt'])}")
    return ids


def _response_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode(text), tokenizer.eos_id]


def _report(kept: Sequence[Any], left_out: int, total: str, max_length: int) -> None:
    line = f"{left_out} of {total} left out: longer than {max_length} tokens"
    if not kept:
        raise DataError(line)
    if left_out:
        log.warning(line)


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, compressed where the name ends in .gz. Creates folders.

    `path` appears whole or not at all: readers never see half a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(unfinished, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
