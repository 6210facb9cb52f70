"""The folder that a run leaves: the base's tensors with the trained ones in their places."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from suture.checkpoints.checkpoint import Checkpoint
from suture.evals.base import Metric
from suture.runs.card import (
    carry,
    config_text,
    licence_of,
    model_name,
    open_ones,
    restricted_note,
    tags,
)
from suture.runs.weights import disk_error
from suture.training.models import Head, save_head
from suture.verbs.finetune.recipe import Finetune

PATCH = "tuned.patch.safetensors"


def write_beside(
    base: Checkpoint,
    recipe: Finetune,
    record: Mapping[str, Any],
    head: Head | None,
    folder: Path,
    name: str,
) -> None:
    """Write configuration, tokenizer, head, card and provenance."""
    try:
        texts = {}
        if recipe.form != "patch":  # the patched base has these of its own
            carry([base], folder)
            texts["config.json"] = config_text(base.config, recipe.dtype)
        texts |= {
            "suture.json": json.dumps(record, indent=2, ensure_ascii=False) + "\n",
            "README.md": card(base, recipe, record, name),
        }
        if record.get("restricted") and (folder / "adapter").is_dir():
            texts["adapter/README.md"] = texts["README.md"]  # it may be used by itself
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        if head is not None:
            save_head(head, folder / "head.safetensors")
    except (OSError, SafetensorError) as error:
        raise disk_error(folder, error) from error


def card(base: Checkpoint, recipe: Finetune, record: Mapping[str, Any], name: str) -> str:
    """The README of a fine-tuned model: front matter for the hub, then what was done, in words."""
    secret = record.get("restricted") is True
    front: dict[str, Any] = {
        "tags": tags("fine-tuning", restricted=secret),
        "library_name": "transformers",
        "base_model": [model_name(c) for c in open_ones([base])],
    }
    licence = licence_of(base)
    if licence:
        front["license"] = licence
    results = record["results"]
    strategy = recipe.line
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"Fine-tuned with Suture {record['suture']} by **{strategy.title}** ({strategy.paper}).\n",
        f"{strategy.equation}\n",
    ]
    if record["form"] != "plain":
        lines.append(
            "**These weights are those of a linearized model.** They are the base plus a "
            "direction; evaluate them to first order around the base "
            "(`suture.load_tuned`), not as an ordinary model.\n"
        )
    if recipe.form != "model":
        lines.append(
            f"`{PATCH}` makes this model of its base, bit for bit:\n\n```text\n"
            f"suture patch apply BASE {name}/{PATCH} -o OUT\n```\n"
        )
    lines.append(restricted_note(["base"] if base.restricted else []) if secret else "## Result\n")
    if not secret:
        lines += [
            f"- {results['trained']:,} entries trained, {results['share']:.2%} of the model",
            f"- {results['steps']} steps, loss {results['loss']['first']:.4g} to "
            f"{results['loss']['last']:.4g}",
        ]
    if results["metric"] and not secret:
        before, after = Metric.read(results["base_metric"]), Metric.read(results["metric"])
        lines.append(
            f"- {after.name} on {after.n} validation rows {after.value:.4g} "
            f"[{after.low:.4g}, {after.high:.4g}]; "
            f"the base has {before.value:.4g} [{before.low:.4g}, {before.high:.4g}]"
        )
    lines.append(f"- output fingerprint `{record['output']['fingerprint']}`")
    return "\n".join(lines) + "\n"
