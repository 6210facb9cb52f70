"""Folders to models and back; heads; masked means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_model
from suture.errors import CheckpointError, OutputError
from suture.training.data import tokenise
from suture.training.loop import to
from suture.training.models import (
    Classifier,
    Head,
    embed,
    load_encoder,
    load_head,
    load_language_model,
    masked_mean,
    save_head,
    save_model,
)

HEAD = Head(("no", "yes"), torch.randn(2, 16), torch.randn(2))


def test_an_encoder_comes_back_bit_for_bit(tmp_path: Path) -> None:
    before = tiny_model.encoder()
    save_model(before, tiny_model.tokenizer(), tmp_path / "m")

    after = load_encoder(tmp_path / "m").model

    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_a_tokenizer_comes_back(tmp_path: Path) -> None:
    tokenizer = tiny_model.loaded(tiny_model.folder(tmp_path / "m")).tokenizer

    assert tokenise(tiny_model.rows(), tokenizer, max_length=8) == tokenise(
        tiny_model.rows(), tiny_model.tokenizer(), max_length=8
    )


def test_a_language_model_comes_back(tmp_path: Path) -> None:
    before = tiny_model.language_model()
    save_model(before, tiny_model.tokenizer(), tmp_path / "m")

    after = load_language_model(tmp_path / "m").model

    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(after(ids, torch.ones_like(ids)), before(ids, torch.ones_like(ids)))


def test_saving_never_replaces_a_folder(tmp_path: Path) -> None:
    tiny_model.folder(tmp_path / "m")

    with pytest.raises(OutputError, match="exists already"):
        tiny_model.folder(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_missing_weights_are_refused_and_not_made_up(tmp_path: Path) -> None:
    folder = tiny_model.folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckpointError, match=r"missing: encoder\.layer\.1\.output\.dense\.weight"):
        load_encoder(folder)


def test_a_pooler_may_be_missing(tmp_path: Path) -> None:
    """The masked mean does not use it; nothing random takes its place when it is saved again."""
    folder = tiny_model.folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith("pooler")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})

    model, tokenizer = load_encoder(folder)
    save_model(model, tokenizer, tmp_path / "again")

    assert load_file(tmp_path / "again" / "model.safetensors").keys() == kept.keys()


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = tiny_model.folder(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_encoder(folder)


@pytest.mark.parametrize("break_it", ["config", "shape", "tokenizer"])
def test_broken_folders_are_refused(tmp_path: Path, break_it: str) -> None:
    folder = tiny_model.folder(tmp_path / "m")
    if break_it == "config":
        (folder / "config.json").unlink()
    elif break_it == "shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 31}))
    else:
        (folder / "tokenizer.json").write_text("{")

    with pytest.raises(CheckpointError, match=str(folder)):
        load_encoder(folder)


def test_a_dtype_can_be_asked_for(tmp_path: Path) -> None:
    folder = tiny_model.folder(tmp_path / "m")

    model = load_encoder(folder, dtype=torch.bfloat16).model

    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_masked_mean_is_the_mean_of_the_tokens() -> None:
    hidden, mask = torch.randn(3, 5, 4), torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [0] * 5])

    mean = masked_mean(hidden, mask)

    torch.testing.assert_close(mean[0], hidden[0].mean(0))
    torch.testing.assert_close(mean[1], hidden[1, :2].mean(0))
    assert mean[2].tolist() == [0.0] * 4


def test_vectors_come_in_the_order_of_the_data_whatever_the_batches() -> None:
    encoder = tiny_model.encoder()
    data = tokenise(tiny_model.rows(20), tiny_model.tokenizer(), max_length=8)

    one_by_one = torch.cat([embed(encoder, [b]) for i in range(20) for b in _only(data, i)])

    torch.testing.assert_close(embed(encoder, data.batches(7)), one_by_one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        embed(encoder, data.batches(3, seed=5)), one_by_one, rtol=1e-4, atol=1e-5
    )
    assert embed(encoder, []).shape == (0, 16)


def _only(data, row):  # type: ignore[no-untyped-def]
    from suture.training.data import collate

    return [collate(data, [row])._replace(rows=(0,))]


def test_embedding_leaves_the_model_in_its_mode() -> None:
    encoder = tiny_model.encoder().train()

    embed(encoder, [])

    assert encoder.training


def test_a_head_comes_back_with_its_labels(tmp_path: Path) -> None:
    save_head(HEAD, tmp_path / "h.safetensors")

    head = load_head(tmp_path / "h.safetensors")

    assert head.labels == HEAD.labels
    torch.testing.assert_close(head.weight, HEAD.weight, rtol=0, atol=0)
    torch.testing.assert_close(head.bias, HEAD.bias, rtol=0, atol=0)


def test_a_head_can_be_read_by_whoever_may_read_new_files(tmp_path: Path) -> None:
    """Its file has the mode of any other that is made there."""
    (tmp_path / "any").touch()
    save_head(HEAD, tmp_path / "head.safetensors")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_what_is_no_head_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, tmp_path / "a.safetensors")
    save_file(
        {"weight": torch.ones(3, 2), "bias": torch.ones(3)},
        tmp_path / "b.safetensors",
        {"labels": '["x"]'},
    )

    for name in ("a", "b", "missing"):
        with pytest.raises(CheckpointError, match=f"{name}.safetensors"):
            load_head(tmp_path / f"{name}.safetensors")


def test_a_classifier_freezes_its_head_unless_asked() -> None:
    assert not Classifier(tiny_model.encoder(), HEAD).linear.weight.requires_grad
    assert Classifier(tiny_model.encoder(), HEAD, train_head=True).linear.weight.requires_grad


def test_a_classifier_is_encoder_then_head() -> None:
    data = tokenise(tiny_model.rows(5), tiny_model.tokenizer(), max_length=8)
    (batch,) = data.batches(8)
    batch = to(batch, torch.device("cpu"))
    encoder = tiny_model.encoder()
    model = Classifier(encoder, HEAD)

    vectors = encoder(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(
        model(batch.input_ids, batch.attention_mask), vectors @ HEAD.weight.T + HEAD.bias
    )
    torch.testing.assert_close(model.head().weight, HEAD.weight)


def test_a_cosine_head_comes_back_and_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    """Its kind is told by the file; nothing in the file changes from one time to the next."""
    head = Head(("a", "b"), torch.randn(2, 4), torch.zeros(2), cosine=True)
    for name in ("one", "two"):
        save_head(head, tmp_path / name)

    assert load_head(tmp_path / "one").cosine
    assert load_head(tmp_path / "one").labels == ("a", "b")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_disk_that_refuses_a_head_is_for_the_caller_to_tell(tmp_path: Path) -> None:
    """``finetune`` says that the training is kept; half a head is left nowhere."""
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        save_head(HEAD, tmp_path / "file" / "head.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
