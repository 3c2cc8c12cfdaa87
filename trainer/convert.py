"""`tetrad import` and `tetrad export`: models from and for Hugging Face, with their tokenizers."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tetrad.parallel import checkpoint, hf
from tetrad.trainer import config
from tetrad.trainer.tokenizer import load_tokenizer

log = logging.getLogger("tetrad")

TOKENIZER = (  # the files of a tokenizer, as transformers saves or once saved them
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "vocab.txt", "spiece.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
ABOUT = ("config.json", "generation_config.json")  # what else names special tokens


def import_model(cfg: config.Import) -> None:
    """Write the checkpoint of a Hugging Face model; its tokenizer lies in it, unless another is
    named."""
    source, own = Path(cfg.source), "./tokenizer"
    with _new(cfg.out) as draft:
        rows = hf.read_config(source)[0].vocab_size
        if cfg.tokenizer is None:
            (draft / own).mkdir()
            if not _copy(source, draft / own, TOKENIZER):
                raise ValueError(f"{source} has no tokenizer; name one: tokenizer=…")
            _copy(source, draft / own, ABOUT)
        name = cfg.tokenizer or str(source)
        words = load_tokenizer(name).vocab_size
        if words > rows:
            raise ValueError(f"tokenizer {name} has {words} tokens, {source} only {rows}")
        hf.import_model(source, draft, cfg.tokenizer or own)
    log.info(f"import: {source} -> {cfg.out}")


def export_model(cfg: config.Export) -> None:
    """Write a checkpoint's model for Hugging Face, with its tokenizer."""
    source = checkpoint.find(cfg.source)
    description = checkpoint.read_model(source)[1]
    name = description["tokenizer"]
    ids: dict[str, Any] = {"bos_token_id": None, "pad_token_id": None}
    ids["eos_token_id"] = load_tokenizer(name).eos_id
    with _new(cfg.out) as draft:
        about = Path(name) / "config.json"
        if about.is_file():
            known = json.loads(about.read_text())
            ids |= {key: known[key] for key in ids if known.get(key) is not None}
            _copy(Path(name), draft, (*TOKENIZER, "generation_config.json"))
        elif name != "bytes":
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(name).save_pretrained(draft)
        hf.export_model(source, draft, ids, cfg.shard_size, cfg.ema)
    log.info(f"export: {source} -> {cfg.out}")


@contextmanager
def _new(name: str) -> Iterator[Path]:
    """A folder to write into that gets its name when all is written."""
    out = Path(name)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("one process imports or exports; start it without torchrun")
    if out.exists():
        raise ValueError(f"{out} exists; choose another out")
    draft = out.with_name(f".{out.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy(source: Path, to: Path, names: tuple[str, ...]) -> bool:
    """Copy those of the files that are there; whether any was."""
    files = [source / name for name in names if (source / name).is_file()]
    for file in files:
        shutil.copyfile(file, to / file.name)
    return bool(files)
