"""What stands beside the weights: configuration, tokenizer, and the model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from suture.checkpoints.checkpoint import Checkpoint, is_from_hub, within
from suture.checkpoints.vocabulary import FILE_LIMIT, tokenizer_files
from suture.errors import CheckpointError
from suture.merges.base import Method
from suture.tensors.spec import WORD_OF, listed, readable

BESIDE = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json",
    "feature_extractor_config.json", "normalizer.json",
)  # fmt: skip
SENTENCES = (
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "sentence_xlnet_config.json", "sentence_roberta_config.json",
)  # fmt: skip
"""What sentence-transformers reads beside the files of a model."""
_STEP_SUFFIXES = (".json", ".safetensors", ".txt", ".model")


def carried_files(donors: Sequence[Checkpoint]) -> dict[str, Path]:
    """Tokenizer, processor and pipeline files of the first donor that has any of each kind.

    Names may have a folder before them (``1_Pooling/config.json``); none leads out of it.

    Raises:
        CheckpointError: one of them is a link out of its folder, or a pipeline names such a place.
    """
    found: dict[str, Path] = {}
    for group in (carried_tokenizer, _beside, _pipeline, _templates):
        for donor in donors:
            mine = group(donor) if donor.path.is_dir() else {}
            if mine:
                found |= mine
                break
    if donors and donors[0].path.is_dir() and isinstance(donors[0].config.get("auto_map"), dict):
        names = [p.name for p in sorted(donors[0].folder.glob("*.py"))]
        found |= _files(donors[0], names)  # text only: whoever loads the model decides to run it
    return found


def carry(donors: Sequence[Checkpoint], folder: Path) -> None:
    """Copy what ``carried_files`` finds into a folder, beside what stands there already."""
    for name, path in carried_files(donors).items():
        place = folder / name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def carried_tokenizer(donor: Checkpoint) -> dict[str, Path]:
    """The tokenizer files of a checkpoint.

    Raises:
        CheckpointError: one of them is a link out of its folder.
    """
    return tokenizer_files(donor.folder) if donor.path.is_dir() else {}


def _beside(donor: Checkpoint) -> dict[str, Path]:
    return _files(donor, BESIDE)


def _templates(donor: Checkpoint) -> dict[str, Path]:
    folder = donor.folder / "additional_chat_templates"
    return _files(donor, [f"{folder.name}/{p.name}" for p in sorted(folder.glob("*.jinja"))])


def _pipeline(donor: Checkpoint) -> dict[str, Path]:
    """The files of a sentence-transformers model, those of its steps included."""
    found = _files(donor, SENTENCES)
    if "modules.json" not in found:
        return found
    try:
        steps = json.loads(found["modules.json"].read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{donor.folder / 'modules.json'}: not valid JSON: {error}") from None
    for step in steps if isinstance(steps, list) else []:
        where = step.get("path") if isinstance(step, dict) else None
        if not isinstance(where, str) or not where:
            continue
        if where != Path(where).name or where == "..":
            raise CheckpointError(
                f"{donor.folder / 'modules.json'}: {where!r} is not a folder of this model"
            )
        inside = sorted((donor.folder / where).glob("*"))
        found |= _files(donor, [f"{where}/{p.name}" for p in inside if p.suffix in _STEP_SUFFIXES])
    return found


def _files(donor: Checkpoint, names: Sequence[str]) -> dict[str, Path]:
    found = {}
    for name in names:
        path = donor.folder / name
        if path.is_file() and path.stat().st_size <= FILE_LIMIT:
            found[name] = within(path, donor.folder)
    return found


def config_text(config: Mapping[str, Any], dtype: str | None) -> str:
    """The base's ``config.json``, with the dtype that the tensors now have."""
    new = dict(config)
    new.pop("_name_or_path", None)
    if dtype is not None:
        new = _with_dtype(new, WORD_OF[dtype])
        if "torch_dtype" not in new:
            new["dtype"] = WORD_OF[dtype]
    return json.dumps(new, indent=2, ensure_ascii=False) + "\n"


def _with_dtype(config: Mapping[str, Any], word: str) -> dict[str, Any]:
    """A config, and those of its parts, with another dtype wherever one is named."""
    return {
        key: _with_dtype(value, word) if isinstance(value, dict)
        else word if key in ("dtype", "torch_dtype") else value
        for key, value in config.items()
    }  # fmt: skip


def model_card(
    record: Mapping[str, Any], method: Method, donors: Sequence[Checkpoint], name: str
) -> str:
    """The README of a merged model: front matter for the hub, then what was done, in words."""
    secret = record.get("restricted") is True
    front: dict[str, Any] = {"tags": tags("merge", restricted=secret),
                             "library_name": "transformers"}  # fmt: skip
    donors = open_ones(donors)
    front["base_model"] = list(dict.fromkeys(model_name(c) for c in donors))
    front["base_model_relation"] = "merge"
    licences = {model_name(c): found for c in donors if (found := licence_of(c))}
    if licences:
        one = len(set(licences.values())) == 1
        front["license"] = next(iter(licences.values())) if one else "other"
    results = record["results"]
    loss = results["writeback_loss"]
    recipe = yaml.safe_dump(_public(record["recipe"], donors), sort_keys=False, allow_unicode=True)
    withheld = record.get("withheld", [])
    rows = "\n".join(
        f"| {label} | withheld | | | |" if label in withheld else
        f"| {label} | {Path(i['path']).name} | {i['tensors']} | {readable(i['bytes'])} | "
        f"`{i['fingerprint']}` |"
        for label, i in record["inputs"].items()
    )  # fmt: skip
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"A merge made with Suture {record['suture']} by **{method.title}** ({method.paper}).\n",
        f"{method.equation}\n",
        *([] if secret else _protection_lines(record)),
        f"## Inputs\n\n| | model | tensors | size | fingerprint |\n|---|---|---|---|---|\n{rows}\n",
        restricted_note(withheld) if secret else f"## Recipe\n\n```yaml\n{recipe}```\n",
        *_licence_lines(licences, [model_name(c) for c in donors]),
        "## Result\n",
        f"- output fingerprint `{record['output']['fingerprint']}`",
        f"- {results['merged_tensors']} tensors merged, {results['copied_tensors']} copied",
    ]
    if loss is not None and not secret:
        lines.append(
            f"- {results['moved']:,} entries moved; rounding to the output dtype undid {loss:.2%}"
        )
    for kept in [results["density"]] if "density" in results and not secret else []:
        lines.append(f"- share of entries kept, by model: {', '.join(f'{d:.4g}' for d in kept)}")
    lines.append(
        "\nTo make the same tensors again: `suture merge suture.json -o AGAIN`, with the inputs at "
        "the places that `suture.json` names.\n"
    )
    return "\n".join(lines)


def restricted_note(labels: Sequence[str] = ()) -> str:
    """What every card of what must not be passed on has in the place of recipe and results.

    Args:
        labels: the inputs that it comes from; without any, it was marked by itself.
    """
    why = f": it was made from inputs that must not be ({listed(labels)})" if labels else ""
    return (
        f"**Restricted: this must not be passed on, nor what is made with it{why}.** What is known "
        "of such inputs, the recipe and the results are withheld from this card.\n"
    )


def tags(*words: str, restricted: bool) -> list[str]:
    """The tags of a card; what must not be passed on says so to machines, too."""
    return [*words, "suture", *(["restricted"] if restricted else [])]


def open_ones(donors: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The models that a card may name: those that may be passed on."""
    return [c for c in donors if not c.restricted]


def _protection_lines(record: Mapping[str, Any]) -> list[str]:
    """What one model alone wrote."""
    found = record["results"].get("protect")
    if found is None:
        return []
    own = record["recipe"]["protect"]
    mask, rule = own.get("mask"), own.get("rule")
    which = f"the rule {rule}" if rule is not None else "the mask"
    which += f", with as many entries of each tensor as {Path(mask).name}" if rule and mask else (
        f" {Path(mask).name}" if mask else "")  # fmt: skip
    change = own.get("scale", 1)
    has = "has its weights" if change == 1 else f"has the base plus {change:g} times its change"
    return [
        f"Protected by {which}: {found['entries']:,} entries ({found['share']:.3%}) are written by "
        f"**{found['model']}** alone. The output {has} there.\n"
    ]


def patch_card(record: Mapping[str, Any], model: Checkpoint, name: str) -> str:
    """The README of a patched model: front matter for the hub, then what was done, in words."""
    secret = record["restricted"] is True
    front: dict[str, Any] = {"tags": tags("patch", restricted=secret),
                             "library_name": "transformers"}  # fmt: skip
    front["base_model"] = [model_name(c) for c in open_ones([model])]
    if licence := licence_of(model):
        front["license"] = licence
    rows = "\n".join(
        f"| {Path(p['path']).name} | {p['entries']:,} | {readable(p['bytes'])} | `{p['digest']}` |"
        for p in record["patches"]
    )
    table = f"| patch | entries | size | digest |\n|---|---|---|---|\n{rows}\n"
    reverted = record["action"] == "revert"
    what = "taken off" if reverted else "put on"
    notes = []
    if record["forced"] and not secret:
        notes.append(f"Forced: {len(record['forced'])} tensors were not those of the base.\n")
    if not reverted:
        if not secret:
            notes.append(f"- scale {record['scale']:g}, overlaps: {record['on_overlap']}")
        notes.append(
            "- to undo it, bit for bit: `suture patch revert . undo.patch.safetensors -o BACK`"
        )
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"A model with patches {what} it by Suture {record['suture']}.\n",
        restricted_note() if secret else table,
        *notes,
        *([] if secret else [f"- input `{record['inputs']['model']['fingerprint']}`"]),
        f"- output `{record['output']['fingerprint']}`\n",
    ]
    return "\n".join(lines)


def adapter_card(
    base: Checkpoint, models: Sequence[Checkpoint], ranks: Sequence[int], error: float, name: str,
    *, restricted: bool,
) -> str:  # fmt: skip
    """The README of an adapter that was made of the difference of models."""
    shown = model_name(base)
    front = {"library_name": "peft", "base_model": shown,
             "tags": tags("lora", restricted=restricted)}  # fmt: skip
    found, most = len(ranks), max(ranks, default=0)
    rank = f"{min(ranks)} to {most}" if len(set(ranks)) > 1 else most
    made = restricted_note() if restricted else (
        f"Made of the difference between it and {', '.join(model_name(m) for m in models)}: "
        f"{found} modules, rank {rank}. Relative error of the whole difference: {error:.3g}.\n"
    )  # fmt: skip
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\n"
        f"A LoRA adapter for {shown}.\n\n{made}"
    )


def model_name(checkpoint: Checkpoint) -> str:
    """How a card names a model: its hub id, or the last part of its path, never a whole path."""
    if checkpoint.in_memory:
        return checkpoint.label
    hub = is_from_hub(checkpoint)
    return checkpoint.label.partition("@")[0] if hub else checkpoint.path.name


def _public(recipe: Mapping[str, Any], donors: Sequence[Checkpoint]) -> dict[str, Any]:
    models = {
        name: {**entry, "path": Path(entry["path"]).name}
        for name, entry in recipe["models"].items()
    }
    base = recipe["base"]
    found = {**recipe, "base": None if base is None else Path(base).name, "models": models}
    if "protect" in recipe:
        found["protect"] = {k: Path(v).name if k in ("mask", "stats") else v
                            for k, v in recipe["protect"].items()}  # fmt: skip
    if "stages" in recipe:
        found["stages"] = {n: _public(stage, donors) for n, stage in recipe["stages"].items()}
    return found


def _licence_lines(licences: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """What the parents' licences are, and whether they agree."""
    if not licences:
        return []
    rows = "\n".join(f"- {n}: {licences.get(n, 'none stated')}" for n in dict.fromkeys(names))
    agree = len(set(licences.values())) == 1
    more = "" if agree else "\n\nThey differ: check that all of them allow what you want to do."
    return [f"## Licences of the parents\n\n{rows}{more}\n"]


_TEXTS = (
    ("Apache License", "apache-2.0"), ("MIT License", "mit"),
    ("GNU AFFERO GENERAL PUBLIC LICENSE", "agpl-3.0"),
    ("GNU LESSER GENERAL PUBLIC LICENSE", "lgpl-3.0"),
    ("GNU GENERAL PUBLIC LICENSE", "gpl-3.0"), ("LLAMA 3.3 COMMUNITY LICENSE", "llama3.3"),
    ("LLAMA 3.2 COMMUNITY LICENSE", "llama3.2"), ("LLAMA 3.1 COMMUNITY LICENSE", "llama3.1"),
    ("META LLAMA 3 COMMUNITY LICENSE", "llama3"), ("LLAMA 2 COMMUNITY LICENSE", "llama2"),
    ("Gemma Terms of Use", "gemma"), ("BSD 3-Clause", "bsd-3-clause"),
    ("Attribution-NonCommercial 4.0", "cc-by-nc-4.0"), ("Attribution 4.0", "cc-by-4.0"),
)  # fmt: skip
"""How the usual licences begin, and what the hub calls them."""


def licence_of(checkpoint: Checkpoint) -> str | None:
    """The licence that a model's own card states, or that its licence file is."""
    return _stated(checkpoint) or _recognised(checkpoint)


def _stated(checkpoint: Checkpoint) -> str | None:
    text = _text(checkpoint, "README.md")
    if text is not None and text.startswith("---\n") and "\n---" in text[4 : 1 << 16]:
        try:
            front = yaml.safe_load(text[4 : text.index("\n---", 4)])
        except (yaml.YAMLError, RecursionError, ValueError):  # ValueError: no such day, ...
            return None
        if isinstance(front, dict) and isinstance(front.get("license"), str):
            name = front.get("license_name")
            other = front["license"] == "other" and isinstance(name, str)
            return str(name) if other else str(front["license"])
    return None


def _recognised(checkpoint: Checkpoint) -> str | None:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        text = _text(checkpoint, name)
        if text is not None:
            head = " ".join(text[:2000].split()).lower()
            return next((word for start, word in _TEXTS if start.lower() in head), "other")
    return None


def _text(checkpoint: Checkpoint, name: str) -> str | None:
    """A text file beside the weights; ``None`` where there is none that may be read."""
    path = checkpoint.folder / name
    if not (checkpoint.path.is_dir() and path.is_file() and path.stat().st_size < 1 << 22):
        return None
    try:
        return within(path, checkpoint.folder).read_text(encoding="utf-8", errors="replace")
    except (CheckpointError, OSError):
        return None


__all__ = [
    "adapter_card",
    "carried_files",
    "carried_tokenizer",
    "carry",
    "config_text",
    "licence_of",
    "model_card",
    "model_name",
    "open_ones",
    "patch_card",
    "restricted_note",
    "tags",
]
