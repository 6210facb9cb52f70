"""A checkpoint folder as a model with its tokenizer, and back; the only importer of transformers.

Nothing here downloads, unpickles or runs code that came with a checkpoint. Models are thin
``nn.Module``s with one plain ``forward``, so that the rest of the library needs no transformers:

- ``Encoder``: token ids to one vector a text (masked mean of the last layer)
- ``ImageEncoder``: pixels to one vector an image (the class token of the last layer)
- ``LanguageModel``: token ids to next-token logits
- ``Classifier``: an encoder and a linear head; the head is saved beside, never merged
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from safetensors import SafetensorError, safe_open

from suture.checkpoints.atomic import replacing
from suture.errors import (
    CheckpointError,
    MismatchError,
    MissingExtraError,
    OutputError,
    RecipeError,
)

try:
    import torch
    import transformers
    from safetensors.torch import save_file
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtraError("loading a model", "models") from error


FLOAT32 = torch.float32
"""What models are loaded in to be measured, whatever their files hold."""


class Tokenizer(Protocol):
    """The part of a tokenizer that the library uses."""

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills short rows, if there is one."""

    def __call__(self, text: list[str], *, truncation: bool, max_length: int) -> Any:
        """Token ids of every text, under the key ``input_ids``."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the tokenizer files into a folder."""


class Weights(Protocol):
    """Tensors that lie in memory, where a folder has none."""

    def __iter__(self) -> Iterator[str]:
        """The names that they would have in a file."""

    def tensor(self, name: str) -> Tensor:
        """One of them."""


class Tokens(Protocol):
    """A padded batch: what a model reads, and which rows of the data it holds."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids, ``(batch, length)`` int64."""

    @property
    def attention_mask(self) -> Tensor:
        """1 for a token, 0 for padding, ``(batch, length)`` int64."""

    @property
    def rows(self) -> Sequence[int]:
        """The positions of these rows in the data."""


class Encoder(nn.Module):
    """A transformer that gives every text one vector: the masked mean of its last layer."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors ``(batch, dim)`` of token ids ``(batch, length)``; padding has no influence."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        return masked_mean(hidden.last_hidden_state, attention_mask)


class ImageEncoder(Encoder):
    """A vision transformer that gives every image one vector.

    It is the class token of the last layer; of a model that has none, the mean of the patches.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.by_token = any(
            name.rpartition(".")[2] in ("cls_token", "class_embedding")
            for name, _ in backbone.named_parameters()
        )
        # models that do not stretch their position table unasked say so in their signature
        asked = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
        self.stretch = {"interpolate_pos_encoding": True} if asked else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors ``(batch, dim)`` of pixels ``(batch, channels, height, width)``."""
        hidden: Tensor = self.backbone(pixel_values=input_ids, **self.stretch).last_hidden_state
        return hidden[:, 0] if self.by_token else hidden.mean(1)


class LanguageModel(nn.Module):
    """A causal language model that gives every position the logits of the next token."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self._plain: bool | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``(batch, length, vocabulary)`` of token ids ``(batch, length)``."""
        logits: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the read-out reads: the last hidden states ``(batch, length, dim)``."""
        body: Any = self.backbone.base_model
        states: Tensor = body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states

    def read_out(self) -> nn.Linear | None:
        """The matrix that turns hidden states into logits, if nothing else does.

        Some models scale or cap their logits; whether this one does is seen by trying, once.
        """
        if self._plain is None:
            head: Any = getattr(self.backbone, "get_output_embeddings", lambda: None)()
            body = getattr(self.backbone, "base_model", self.backbone)
            self._plain = type(head) is nn.Linear and body is not self.backbone
            if self._plain:
                ids = torch.tensor([[0, 1, 2]], device=head.weight.device) % len(head.weight)
                device = head.weight.device.type
                with (
                    evaluating(self.backbone),
                    torch.no_grad(),
                    torch.autocast(device, enabled=False),
                ):
                    whole = LanguageModel.forward(self, ids, torch.ones_like(ids))
                    parts = head(self.hidden(ids, torch.ones_like(ids)))
                self._plain = bool(torch.allclose(whole, parts, rtol=1e-4, atol=1e-5))
        backbone: Any = self.backbone
        found: nn.Linear | None = backbone.get_output_embeddings() if self._plain else None
        return found


@dataclass(frozen=True, eq=False)
class Head:
    """The linear read-out of one task; every task keeps its own, and no merge touches it."""

    labels: tuple[str, ...]
    """Class names, in the order of the rows of ``weight``."""
    weight: Tensor
    """``(classes, dim)`` float32."""
    bias: Tensor
    """``(classes,)`` float32."""
    cosine: bool = False
    """Whether features are scaled to length 1 before they are read."""


class Classifier(nn.Module):
    """An encoder with a linear head on top.

    The head is frozen unless ``train_head`` is set, so that after fine-tuning the whole difference
    between two classifiers lies in their encoders.
    """

    def __init__(self, encoder: Encoder, head: Head, *, train_head: bool = False) -> None:
        super().__init__()
        classes, dim = head.weight.shape
        self.labels = head.labels
        self.cosine = head.cosine
        self.encoder = encoder
        self.linear = nn.Linear(dim, classes, device=head.weight.device)
        with torch.no_grad():
            self.linear.weight.copy_(head.weight)
            self.linear.bias.copy_(head.bias)
        self.linear.requires_grad_(train_head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of token ids ``(batch, length)``."""
        features: Tensor = self.encoder(input_ids, attention_mask)
        if self.cosine:
            features = nn.functional.normalize(features, dim=-1)
        logits: Tensor = self.linear(features)
        return logits

    def with_body(self, body: nn.Module) -> Classifier:
        """The same head, this very module of it, on another body."""
        other = Classifier.__new__(Classifier)
        nn.Module.__init__(other)
        other.labels, other.cosine = self.labels, self.cosine
        other.encoder, other.linear = body, self.linear  # type: ignore[assignment]
        other.train(self.training)
        return other

    def head(self) -> Head:
        """The head as a value of its own, on the CPU."""
        weight, bias = self.linear.weight.detach().cpu(), self.linear.bias.detach().cpu()
        return Head(self.labels, weight.clone(), bias.clone(), self.cosine)


def masked_mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding.

    ``hidden`` is ``(batch, length, dim)``, ``attention_mask`` ``(batch, length)``; the result is
    ``(batch, dim)``. A row without any token gives zeros, not NaN.
    """
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def parameters_of(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters of a model by the names that they have in its checkpoint.

    Args:
        model: a ``Classifier``, ``Encoder`` or ``LanguageModel``, or any other module.
        names: those that are wanted; by default all of the backbone, and never a head of ours.

    Raises:
        MismatchError: the model has no such parameter.
    """
    inner = model.encoder if isinstance(model, Classifier) else model
    backbone = inner.backbone if isinstance(inner, Encoder | LanguageModel) else inner
    stored = file_names(backbone)
    found = {stored[name]: p for name, p in backbone.named_parameters()}
    if names is None:
        return found
    prefix = f"{getattr(backbone, 'base_model_prefix', '')}."  # which files have or lack
    wanted: dict[str, nn.Parameter] = {}
    missing = []
    for name in names:
        parameter = found.get(name, found.get(name.removeprefix(prefix), found.get(prefix + name)))
        if parameter is None:
            missing.append(name)
        else:
            wanted[name] = parameter
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
        raise MismatchError(
            f"{type(backbone).__name__} has no parameters {shown}; leave them out of the `space`"
        )
    return wanted


def file_names(model: nn.Module) -> dict[str, str]:
    """The names that parameters have in files, by those that they have in the model.

    transformers 5 renames the tensors of some architectures, ViT and Dinov2 among them, when it
    loads them, and back when it saves them.
    """
    own = {name: p.detach() for name, p in model.named_parameters()}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 renames nothing
        return {name: name for name in own}
    by_place = {(t.data_ptr(), t.shape): name for name, t in own.items() if t.numel()}
    stored = {name: name for name in own}
    if isinstance(model, transformers.PreTrainedModel):
        for name, tensor in revert_weight_conversion(model, own).items():
            held = by_place.get((tensor.data_ptr(), tensor.shape))
            if held is not None:  # else made of several: it has no name of its own in the files
                stored[held] = name
    return stored


def named_in_files(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ``state_dict`` by the names that they have in files; see ``file_names``.

    Where an architecture joins several tensors of its files into one, they are cut apart again.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 renames nothing
        return dict(tensors)
    if not isinstance(model, transformers.PreTrainedModel):
        return dict(tensors)
    return dict(revert_weight_conversion(model, dict(tensors)))


def files_of(model: nn.Module) -> Path | None:
    """The folder that transformers loaded a model from, or its snapshot in the cache of the Hub.

    ``None`` where there is none any more, or its configuration is of another vocabulary. The Hub
    is not asked.
    """
    named = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not named:
        return None
    place = Path(named) / "config.json"
    if not place.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(named, "config.json")
        except HFValidationError:
            return None
        if not isinstance(found, str):
            return None
        place = Path(found)
    try:
        size = json.loads(place.read_bytes()).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    same = size == getattr(getattr(model, "config", None), "vocab_size", None)
    return place.parent.resolve() if same else None


@torch.inference_mode()
def embed(encoder: Encoder, batches: Iterable[Tokens], *, device: str = "cpu") -> Tensor:
    """Vectors ``(n, dim)`` of all rows on the CPU in float32, in the order of the data.

    The batches may come in any order, but every row once. The model is left in the mode it was in.
    """
    with evaluating(encoder):
        rows: list[int] = []
        vectors: list[Tensor] = []
        for batch in batches:
            out = encoder(batch.input_ids.to(device), batch.attention_mask.to(device))
            vectors.append(out.float().cpu())
            rows.extend(batch.rows)
    if not rows:
        return torch.zeros(0, encoder.dim)
    result = torch.cat(vectors)
    ordered = torch.empty_like(result)
    ordered[torch.tensor(rows)] = result
    return ordered


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU for one that has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off inside, and back to what it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def recompute_activations(backbone: nn.Module) -> None:
    """Save memory in training: activations inside of blocks are computed a second time.

    Raises:
        RecipeError: the architecture cannot do it.
    """
    # transformers 5 renames the method
    new = getattr(backbone, "activation_checkpointing_enable", None)
    old = getattr(backbone, "gradient_checkpointing_enable", None)
    try:
        if new is not None:
            new({"use_reentrant": False})
        elif old is not None:
            old({"use_reentrant": False})
        else:
            raise ValueError("it has no such switch")
    except ValueError as error:
        raise RecipeError(f"activations cannot be computed anew in this model: {error}") from error
    config: Any = getattr(backbone, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # transformers would switch it off with a notice


def device_named(word: str) -> str:
    """The device of this name; ``auto`` is the first graphics processor, else the CPU.

    Raises:
        RecipeError: there is no such device here.
    """
    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(word).type
    except RuntimeError:
        raise RecipeError(f"device: {word!r} is none; auto, cpu or cuda") from None
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise RecipeError(f"device: there is no {word} here")
    return word


def longest_of(config: Mapping[str, Any], tokenizer: Any) -> int:
    """How many tokens a model reads at most, by its configuration and its tokenizer."""
    positions = config.get("max_position_embeddings") or config.get("n_positions") or 10**6
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # positions are counted from the padding id
    return int(min(positions, getattr(tokenizer, "model_max_length", positions) or positions))


# -- folders ---------------------------------------------------------------------------------------

M = TypeVar("M", bound=nn.Module)


class Loaded(NamedTuple, Generic[M]):
    """A model and the tokenizer that stands in the same folder."""

    model: M
    tokenizer: Tokenizer


def load_encoder(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None,
    weights: Weights | None = None,
) -> Loaded[Encoder]:  # fmt: skip
    """Load an encoder folder; ``dtype`` is that of the files unless given.

    A pooling layer that the files lack is left out, because the masked mean does not use it.

    Raises:
        CheckpointError: the folder is not a readable safetensors checkpoint, or lacks weights.
    """
    backbone = _load(transformers.AutoModel, folder, device=device, dtype=dtype, weights=weights)
    return Loaded(Encoder(backbone), load_tokenizer(folder))


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a model that reads images and nothing else."""
    return "patch_size" in config and not {"vocab_size", "text_config"} & set(config)


def load_image_encoder(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None,
    weights: Weights | None = None,
) -> ImageEncoder:  # fmt: skip
    """Load a vision transformer; ``dtype`` is that of the files unless given.

    Raises:
        CheckpointError: the folder is not a readable safetensors checkpoint, lacks weights, or
            holds another kind of model.
    """
    backbone = _load(transformers.AutoModel, folder, device=device, dtype=dtype, weights=weights)
    config: Any = backbone.config
    mixing = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
    if mixing or not hasattr(config, "hidden_size") or not reads_images(config.to_dict()):
        raise CheckpointError(
            f"{folder}: {type(backbone).__name__} is no vision transformer such as ViT or Dinov2; "
            "other image models are not supported"
        )
    return ImageEncoder(backbone)


def load_language_model(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None,
    weights: Weights | None = None,
) -> Loaded[LanguageModel]:  # fmt: skip
    """Load a causal language model folder; ``dtype`` is that of the files unless given.

    Raises:
        CheckpointError: the folder is not a readable safetensors checkpoint, or lacks weights.
    """
    backbone = _load(
        transformers.AutoModelForCausalLM, folder, device=device, dtype=dtype, weights=weights
    )
    return Loaded(LanguageModel(backbone), load_tokenizer(folder))


class TextClassifier(nn.Module):
    """A transformer with a classification head of its own, as others publish them."""

    def __init__(self, backbone: nn.Module, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.labels = labels

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``(batch, labels)`` of token ids ``(batch, length)``."""
        logits: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def load_text_classifier(folder: Path, *, device: str = "cpu") -> Loaded[TextClassifier]:
    """Load the folder of a text classifier with its head and labels, in float32.

    Raises:
        CheckpointError: the folder is not a readable safetensors checkpoint, or lacks weights.
    """
    backbone = _load(
        transformers.AutoModelForSequenceClassification, folder, device=device, dtype=FLOAT32
    )
    names: Any = backbone.config.id2label  # type: ignore[union-attr]
    labels = tuple(str(names[number]) for number in sorted(names))
    return Loaded(TextClassifier(backbone, labels).eval(), load_tokenizer(folder))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    with _explained(folder, "tokenizer"):
        tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def gguf_tokenizer(path: Path) -> dict[str, bytes]:
    """The files of the tokenizer that stands in a GGUF file, by name.

    Raises:
        CheckpointError: transformers cannot convert it.
    """
    with tempfile.TemporaryDirectory() as place, _quiet(), _explained(path, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        tokenizer.save_pretrained(place)
        return {p.name: p.read_bytes() for p in sorted(Path(place).iterdir())}


def save_model(model: Encoder | LanguageModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer as one folder, whole or not at all.

    Buffers that transformers can compute again, such as position numbers, are not written.

    Raises:
        OutputError: ``out`` exists already, or cannot be written.
    """
    if out.exists():
        raise OutputError(f"{out} exists already; remove it or choose another place")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with _quiet():
            model.backbone.save_pretrained(str(partial))  # type: ignore[operator]
            tokenizer.save_pretrained(str(partial))
        partial.replace(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"{out}: cannot be written: {error}") from error


_LABELS, _COSINE = "labels", "labels of a cosine head"
"""What the labels are called in the metadata of a head's file."""


def save_shared(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, str]) -> None:
    """Write tensors so that whoever may read new files there can read them.

    Of itself the library lets only the owner read what it writes.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, dict(facts))
    path.chmod(mode)


def save_head(head: Head, path: Path) -> None:
    """Write a head as one safetensors file: ``weight``, ``bias``, the labels in its metadata."""
    tensors = {"weight": head.weight.contiguous(), "bias": head.bias.contiguous()}
    # One key: the library writes several in an order that changes from run to run.
    facts = {_COSINE if head.cosine else _LABELS: json.dumps(head.labels)}
    with replacing(path) as partial:
        save_shared(tensors, partial, facts)


def load_head(path: Path, *, device: str = "cpu") -> Head:
    """Read a head that ``save_head`` wrote.

    Raises:
        CheckpointError: the file is missing or holds no head.
    """
    try:
        with safe_open(path, "pt", device=device) as file:
            about = file.metadata()
            cosine = _COSINE in about
            labels = tuple(json.loads(about[_COSINE if cosine else _LABELS]))
            head = Head(labels, file.get_tensor("weight"), file.get_tensor("bias"), cosine)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a head saved by Suture: {error}") from error
    if head.weight.ndim != 2 or len(labels) != len(head.weight) or len(labels) != len(head.bias):
        raise CheckpointError(f"{path}: {len(labels)} labels for weights {head.weight.shape}")
    return head


def _load(
    kind: Any, folder: Path, *, device: str, dtype: torch.dtype | None,
    weights: Weights | None = None,
) -> nn.Module:  # fmt: skip
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: not a model folder: it has no config.json")
    with _quiet(), _explained(folder, "model"):
        source: Any = folder
        given: dict[str, Any] = {}
        if weights is not None:
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            with torch.device("meta"):  # only its class is wanted
                kind = type(kind.from_config(config, trust_remote_code=False))
            source = None
            given = {"config": config, "state_dict": {n: weights.tensor(n) for n in weights}}
        model, info = kind.from_pretrained(
            source,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **given,
        )
    missing = sorted(info["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler, missing = None, []
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
        raise CheckpointError(f"{folder}: weights are missing: {shown}")
    loaded: nn.Module = model.to(device)
    return loaded.eval()


@contextmanager
def _explained(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: its {what} cannot be loaded: {first}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and notices of transformers inside."""
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
