"""Tokens by id, and the tokenizer files of an output; JSON only, no tokenizer library.

A vocabulary is read as ``transformers`` would see it: ``tokenizer.json``, or ``vocab.json`` or
``vocab.txt`` with ``added_tokens.json``, then the tokens that ``tokenizer_config.json`` adds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import within
from suture.checkpoints.headers import read_json
from suture.errors import CheckpointError

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files that make a tokenizer."""
FILE_LIMIT = 200_000_000
"""Bytes of a file beside the weights that will be carried over."""
TOKEN_LIMIT = 1 << 24
"""Ids a tokenizer may have."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
           "mask_token")  # fmt: skip
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
          "special": False}  # fmt: skip

UNION = "union"
BASE = "base"
ZERO = "zero"


# -- what a recipe says ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenRule:
    """Where the embedding of one token comes from in models that lack it."""

    source: str | None = None
    """The name of a model, or ``zero``; ``None`` leaves it to the default."""
    token: str | None = None
    """Another token of that model, whose row is taken."""
    token_id: int | None = None
    """The same, by id."""
    force: bool = False
    """Whether models that have the token take this row, too."""

    def plain(self) -> dict[str, Any]:
        """As a recipe writes it."""
        found: dict[str, Any] = {}
        if self.token is not None or self.token_id is not None:
            key = "token" if self.token is not None else "token_id"
            which = self.token if self.token is not None else self.token_id
            found["source"] = {"kind": "model_token", "model": self.source, key: which}
        elif self.source is not None:
            found["source"] = {"kind": "zero"} if self.source == ZERO else self.source
        return found | ({"force": True} if self.force else {})


@dataclass(frozen=True)
class Wanted:
    """The tokenizer that an output shall have, and how embeddings are matched to it."""

    source: str = UNION
    """``union``, the name of a model, or the path of a folder with a tokenizer."""
    base: str | None = None
    """The model whose row stands in where others lack a token; ``None``: their mean does."""
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    keep_rows: bool = False
    """Whether rows of the source model without a token are kept, rather than cut off."""

    def beside(self, base: str | None, first: str | None) -> Wanted:
        """Return the same where the recipe's base and its first model have these names."""
        base = base if self.base is None else self.base
        source = base or first or BASE if self.source == BASE else self.source
        return replace(self, source=source, base=base)

    def plain(self) -> dict[str, Any]:
        """As a recipe writes it."""
        found: dict[str, Any] = {"source": self.source, "base": self.base}
        if self.tokens:
            found["tokens"] = {token: rule.plain() for token, rule in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            found["pad_to_multiple_of"] = self.pad_to_multiple_of
        return found


# -- what a folder holds ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one tokenizer."""

    ids: Mapping[str, int]
    """Every token and its id."""
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """How added tokens are matched, by token, as ``tokenizer.json`` writes it without the id."""

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    def below(self, rows: int) -> Vocabulary:
        """Only the tokens that an embedding of ``rows`` rows has a row for."""
        if self.size <= rows:
            return self
        kept = {token: i for token, i in self.ids.items() if i < rows}
        return Vocabulary(kept, {t: how for t, how in self.added.items() if t in kept})


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The tokens of the tokenizer in ``folder``; ``None`` where there is none.

    Raises:
        CheckpointError: its files cannot be read, or hold no token ids.
    """
    ids: dict[str, int] = {}
    added: dict[str, Mapping[str, Any]] = {}
    if (whole := json_file(folder, "tokenizer.json")) is not None:
        ids |= _loaded_ids(whole, folder)
        for entry in _entries(whole.get("added_tokens"), folder):
            added[entry["content"]] = {k: bool(entry.get(k, d)) for k, d in _PLAIN.items()}
    elif (words := json_file(folder, "vocab.json")) is not None:
        ids |= _whole(words, folder / "vocab.json")
    elif (folder / "vocab.txt").is_file():
        lines = within(folder / "vocab.txt", folder).read_text("utf-8", "replace").split("\n")
        ids |= {line.rstrip("\r"): n for n, line in enumerate(lines) if line.rstrip("\r")}
    elif any((folder / n).is_file() for n in TOKENIZER if n.endswith(".model")):
        raise CheckpointError(
            f"{folder}: its tokens are only in a sentencepiece model; convert it once: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes a tokenizer.json"
        )
    else:
        return None
    if whole is None:
        more = json_file(folder, "added_tokens.json") or {}
        ids |= _whole(more, folder / "added_tokens.json")
        added |= {token: _PLAIN for token in more}
    _configured(folder, ids, added, numbered=whole is None)
    if not ids or max(ids.values()) >= TOKEN_LIMIT:
        raise CheckpointError(f"{folder}: a tokenizer without tokens, or with absurd ids")
    return Vocabulary(ids, added)


def json_file(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object beside the weights; ``None`` where there is no such file."""
    path = folder / name
    return read_json(within(path, folder), FILE_LIMIT) if path.is_file() else None


def _pieces(model: object, folder: Path) -> dict[str, int]:
    """The ``vocab`` of a tokenizer.json: ids by token, or tokens with scores in order of ids."""
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        if not all(isinstance(p, list) and p and isinstance(p[0], str) for p in vocab):
            raise CheckpointError(f"{folder / 'tokenizer.json'}: its vocab is no list of tokens")
        return {piece[0]: number for number, piece in enumerate(vocab)}
    if not isinstance(vocab, dict):
        raise CheckpointError(f"{folder / 'tokenizer.json'}: has no vocab")
    return _whole(vocab, folder / "tokenizer.json")


def _whole(ids: Mapping[str, Any], path: Path) -> dict[str, int]:
    if not all(type(i) is int and i >= 0 for i in ids.values()):
        raise CheckpointError(f"{path}: maps tokens to what are no whole numbers")
    return dict(ids)


def _loaded_ids(whole: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """The id of every token as a tokenizer has it that is loaded from ``tokenizer.json``.

    Added tokens that the vocabulary lacks are numbered anew, in the order of the file: whatever ids
    stand there, they go on from the number of tokens, without gaps (tokenizers 0.23.3).
    """
    ids = _pieces(whole.get("model"), folder)
    _entries(whole.get("added_tokens"), folder)
    for entry in whole.get("added_tokens") or ():
        ids.setdefault(entry["content"], len(ids))
    return ids


def _entries(raw: object, folder: Path) -> list[dict[str, Any]]:
    """The ``added_tokens`` of a tokenizer.json, in order of ids."""
    entries = [] if raw is None else raw
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("content"), str) and type(e.get("id")) is int
        and e["id"] >= 0 for e in entries
    ):  # fmt: skip
        raise CheckpointError(f"{folder / 'tokenizer.json'}: its added_tokens are not understood")
    return sorted(entries, key=lambda entry: int(entry["id"]))


def _configured(
    folder: Path, ids: dict[str, int], added: dict[str, Mapping[str, Any]], *, numbered: bool
) -> None:
    """Add the tokens that only the tokenizer's configuration names, as loading it would.

    Args:
        folder: of the tokenizer.
        ids: takes their ids.
        added: takes how they are matched.
        numbered: whether they have the ids that stand there; else they are numbered in order.
    """
    config = json_file(folder, "tokenizer_config.json") or {}
    special = json_file(folder, "special_tokens_map.json") or {}
    listing = config.get("added_tokens_decoder")
    for key, entry in (listing if isinstance(listing, dict) else {}).items():
        content = entry.get("content") if isinstance(entry, dict) else None
        known = str(key).isdecimal() and len(key) < 20
        if isinstance(content, str) and content not in ids and known:
            ids[content] = int(key) if numbered else len(ids)
            added[content] = {k: bool(entry.get(k, d)) for k, d in _PLAIN.items()}
    named: list[Any] = [(config.get(key) or special.get(key)) for key in SPECIAL]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        more = config.get(key) or special.get(key) or []
        named += more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    for entry in named:
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str) and content not in ids:
            ids[content] = max(ids.values(), default=-1) + 1 if numbered else len(ids)
            added[content] = {**_PLAIN, "normalized": False, "special": True}


# -- several vocabularies as one -------------------------------------------------------------------


def union(first: Vocabulary, others: Iterable[Vocabulary]) -> Vocabulary:
    """Every token of any of them; those of the first keep their ids, others follow in order.

    First come ordinary tokens, model after model in the order of their ids, then added ones. A
    token that one model adds and another has in its vocabulary is an added one.
    """
    all_of = [first, *others]
    added: dict[str, Mapping[str, Any]] = {}
    for vocabulary in all_of:
        for token in sorted(vocabulary.added, key=vocabulary.ids.__getitem__):
            added.setdefault(token, vocabulary.added[token])
    ids = dict(first.ids)
    end = first.size
    ordinary = (t for v in all_of for t in sorted(v.ids, key=v.ids.__getitem__) if t not in added)
    for token in (*ordinary, *added):
        if token not in ids:
            ids[token], end = end, end + 1
            added.setdefault(token, _PLAIN)
    return Vocabulary(ids, added)


def with_tokens(vocabulary: Vocabulary, tokens: Iterable[str]) -> Vocabulary:
    """The same with some more tokens at its end, where it lacks them."""
    return union(vocabulary, [Vocabulary({t: n for n, t in enumerate(tokens)})])


# -- the files of an output ------------------------------------------------------------------------


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer files of a folder, by name.

    Raises:
        CheckpointError: one of them is a link out of the folder.
    """
    found = {}
    for name in TOKENIZER:
        path = folder / name
        if path.is_file() and path.stat().st_size <= FILE_LIMIT:
            found[name] = within(path, folder)
    return found


def written(folder: Path, own: Vocabulary, out: Vocabulary) -> dict[str, bytes]:
    """The files of a tokenizer with the tokens ``out``, made of those in ``folder``.

    Where ``out`` is what the folder holds, its files are copied. Otherwise ``tokenizer.json`` is
    edited: tokens beyond are taken out, new ones are added tokens, matched as they are written.

    Raises:
        CheckpointError: there is no ``tokenizer.json`` that could be edited, or its vocabulary has
            holes, so that a loader would give new tokens the ids of others.
    """
    files = {name: path.read_bytes() for name, path in tokenizer_files(folder).items()}
    gone = own.ids.keys() - out.ids.keys()
    whole = json_file(folder, "tokenizer.json")
    if gone and whole is not None:
        # What only the configuration names is not in the file, and is left as it is.
        gone &= {*_pieces(whole.get("model"), folder), *(e["content"] for e in _entries(
            whole.get("added_tokens"), folder))}  # fmt: skip
    if not gone and own.ids.items() >= out.ids.items() and own.added.items() >= out.added.items():
        return files
    if whole is None:
        raise CheckpointError(
            f"{folder}: has no tokenizer.json, so its vocabulary cannot be changed; write one with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), or take the tokenizer "
            "as it is with `source: base`"
        )
    if gone:
        _strip(whole, out)
    kept = {entry["content"]: entry for entry in whole.get("added_tokens") or ()}
    new = {t: {"content": t, **how} for t, how in out.added.items() if t not in kept}
    entries = [*kept.values(), *(new[t] for t in sorted(new, key=out.ids.__getitem__))]
    whole["added_tokens"] = [{**e, "id": out.ids[e["content"]]} for e in entries]
    _check_loaded(whole, out, folder)
    config = json_file(folder, "tokenizer_config.json") or {}
    if isinstance(config.get("added_tokens_decoder"), dict):
        # Some tokenizer classes are built again from their vocabulary and know no other list.
        config["added_tokens_decoder"] = {
            str(out.ids[t]): {"content": t, **how} for t, how in out.added.items()
        }
    # What spells out another vocabulary than tokenizer.json would be a second truth.
    files = {n: c for n, c in files.items() if n.startswith("chat_template") or n == _MAP}
    return files | {"tokenizer.json": dumped(whole), "tokenizer_config.json": dumped(config)}


def _check_loaded(whole: Mapping[str, Any], out: Vocabulary, folder: Path) -> None:
    """Refuse a tokenizer.json from which tokens would be loaded under other ids than are meant."""
    pieces = _pieces(whole.get("model"), folder)
    for token, number in _loaded_ids(whole, folder).items():
        if out.ids.get(token, number) != number:
            raise CheckpointError(
                f"{folder}: its vocabulary has holes: {len(pieces)} tokens, with ids up to "
                f"{max(pieces.values())}; loaded again, the new token {token!r} would have the id "
                f"{number}, not {out.ids[token]}, and so the row of another. Take the tokenizer as "
                "it is with `source: base`, or that of another model by its name"
            )


_MAP = "special_tokens_map.json"


def _strip(whole: dict[str, Any], out: Vocabulary) -> None:
    """Take out of a tokenizer.json what is no token any more."""
    model = whole["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [piece for piece in vocab if piece[0] in out.ids]
    else:
        model["vocab"] = {token: i for token, i in vocab.items() if token in out.ids}
    if isinstance(model.get("merges"), list):
        parts = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [
            merge for merge, pair in zip(model["merges"], parts, strict=True)
            if all(p in out.ids for p in (*pair, "".join(pair)))
        ]  # fmt: skip
    added = whole.get("added_tokens") or []
    whole["added_tokens"] = [e for e in added if e["content"] in out.ids]


def dumped(value: Mapping[str, Any]) -> bytes:
    """A JSON file of an output."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


__all__ = [
    "TOKENIZER",
    "TokenRule",
    "Vocabulary",
    "Wanted",
    "dumped",
    "json_file",
    "read_vocabulary",
    "tokenizer_files",
    "union",
    "with_tokens",
    "written",
]
