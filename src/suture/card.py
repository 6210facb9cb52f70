"""What stands beside the weights: configuration, tokenizer, and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from suture.checkpoint import Checkpoint, _inside, is_from_hub, read_json
from suture.errors import CheckpointError
from suture.merges import Method
from suture.spec import WORD_OF, readable

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
BESIDE = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
FILE_LIMIT = 200_000_000
"""Bytes of a file beside the weights that will be carried over."""


def carried_files(donors: Sequence[Checkpoint]) -> dict[str, Path]:
    """Tokenizer, generation and processor files of the first donor that has any of each kind.

    Raises:
        CheckpointError: one of them is a link out of its folder.
    """
    found: dict[str, Path] = {}
    for group in (TOKENIZER, BESIDE):
        for donor in donors:
            mine = _files(donor, group)
            if mine:
                found |= mine
                break
    return found


def _files(donor: Checkpoint, names: Sequence[str]) -> dict[str, Path]:
    if not donor.path.is_dir():
        return {}
    found = {}
    for name in names:
        path = donor.folder / name
        if path.is_file() and path.stat().st_size <= FILE_LIMIT:
            found[name] = _inside(path, donor.folder)
    return found


def config_text(config: Mapping[str, Any], dtype: str | None) -> str:
    """The base's ``config.json``, with the dtype that the tensors now have."""
    new = dict(config)
    new.pop("_name_or_path", None)
    if dtype is not None:
        for section in (new, new.get("text_config"), new.get("vision_config")):
            if not isinstance(section, dict):
                continue
            key = "torch_dtype" if "torch_dtype" in section else "dtype"
            if key in section or section is new:
                section[key] = WORD_OF[dtype]
    return json.dumps(new, indent=2, ensure_ascii=False) + "\n"


def model_card(
    record: Mapping[str, Any], method: Method, donors: Sequence[Checkpoint], name: str
) -> str:
    """The README of a merged model: front matter for the hub, then what was done, in words."""
    front: dict[str, Any] = {"tags": ["merge", "suture"], "library_name": "transformers"}
    front["base_model"] = list(dict.fromkeys(model_name(c) for c in donors))
    front["base_model_relation"] = "merge"
    licence = next((x for c in donors if (x := _licence(c))), None)
    if licence:
        front["license"] = licence
    results = record["results"]
    loss = results["writeback_loss"]
    recipe = yaml.safe_dump(_public(record["recipe"], donors), sort_keys=False, allow_unicode=True)
    rows = "\n".join(
        f"| {label} | {Path(i['path']).name} | {i['tensors']} | {readable(i['bytes'])} | "
        f"`{i['fingerprint']}` |"
        for label, i in record["inputs"].items()
    )
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"A merge made with Suture {record['suture']} by **{method.title}** ({method.paper}).\n",
        f"{method.equation}\n",
        f"## Inputs\n\n| | model | tensors | size | fingerprint |\n|---|---|---|---|---|\n{rows}\n",
        f"## Recipe\n\n```yaml\n{recipe}```\n",
        "## Result\n",
        f"- output fingerprint `{record['output']['fingerprint']}`",
        f"- {results['merged_tensors']} tensors merged, {results['copied_tensors']} copied",
    ]
    if loss is not None:
        lines.append(
            f"- {results['moved']:,} entries moved; rounding to the output dtype undid {loss:.2%}"
        )
    for kept in [results["density"]] if "density" in results else []:
        lines.append(f"- share of entries kept, by model: {', '.join(f'{d:.4g}' for d in kept)}")
    lines.append(
        "\nTo make the same tensors again: `suture merge suture.json -o AGAIN`, with the inputs at "
        "the places that `suture.json` names.\n"
    )
    return "\n".join(lines)


def patch_card(record: Mapping[str, Any], model: Checkpoint, name: str) -> str:
    """The README of a patched model: front matter for the hub, then what was done, in words."""
    front: dict[str, Any] = {"tags": ["patch", "suture"], "library_name": "transformers"}
    front["base_model"] = [model_name(model)]
    if licence := _licence(model):
        front["license"] = licence
    rows = "\n".join(
        f"| {Path(p['path']).name} | {p['entries']:,} | {readable(p['bytes'])} | `{p['digest']}` |"
        for p in record["patches"]
    )
    reverted = record["action"] == "revert"
    what = "taken off" if reverted else "put on"
    notes = []
    if record["restricted"]:
        notes.append("**Restricted: it was made from something that must not be passed on.**\n")
    if record["forced"]:
        notes.append(f"Forced: {len(record['forced'])} tensors were not those of the base.\n")
    if not reverted:
        notes.append(f"- scale {record['scale']:g}, overlaps: {record['on_overlap']}")
        notes.append(
            "- to undo it, bit for bit: `suture patch revert . undo.patch.safetensors -o BACK`"
        )
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"A model with patches {what} it by Suture {record['suture']}.\n",
        f"| patch | entries | size | digest |\n|---|---|---|---|\n{rows}\n",
        *notes,
        f"- input `{record['inputs']['model']['fingerprint']}`",
        f"- output `{record['output']['fingerprint']}`\n",
    ]
    return "\n".join(lines)


def is_restricted(checkpoint: Checkpoint) -> bool:
    """Whether a model must not be passed on: it is known, or the record beside it says so."""
    record = checkpoint.folder / "suture.json"
    if checkpoint.restricted or not checkpoint.path.is_dir() or not record.is_file():
        return checkpoint.restricted
    try:
        return read_json(_inside(record, checkpoint.folder)).get("restricted") is True
    except CheckpointError:  # some other file of that name: it says nothing
        return False


def model_name(checkpoint: Checkpoint) -> str:
    """How a card names a model: its hub id, or the last part of its path, never a whole path."""
    hub = is_from_hub(checkpoint)
    return checkpoint.label.partition("@")[0] if hub else checkpoint.path.name


def _public(recipe: Mapping[str, Any], donors: Sequence[Checkpoint]) -> dict[str, Any]:
    models = {
        name: {**entry, "path": Path(entry["path"]).name}
        for name, entry in recipe["models"].items()
    }
    base = recipe["base"]
    found = {**recipe, "base": None if base is None else Path(base).name, "models": models}
    if "stages" in recipe:
        found["stages"] = {n: _public(stage, donors) for n, stage in recipe["stages"].items()}
    return found


def _licence(checkpoint: Checkpoint) -> str | None:
    """The licence that a model's own card or configuration states."""
    card = checkpoint.folder / "README.md"
    if checkpoint.path.is_dir() and card.is_file() and card.stat().st_size < 1 << 22:
        try:
            text = _inside(card, checkpoint.folder).read_text(encoding="utf-8", errors="replace")
        except (CheckpointError, OSError):
            return None
        if text.startswith("---\n") and "\n---" in text[4 : 1 << 16]:
            try:
                front = yaml.safe_load(text[4 : text.index("\n---", 4)])
            except (yaml.YAMLError, RecursionError, ValueError):  # ValueError: no such day, ...
                return None
            if isinstance(front, dict) and isinstance(front.get("license"), str):
                return str(front["license"])
    return None


__all__ = [
    "carried_files",
    "config_text",
    "is_restricted",
    "model_card",
    "model_name",
    "patch_card",
    "read_json",
]
